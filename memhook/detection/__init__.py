"""From scores to p-values and verdicts."""

from memhook.detection.verdict import Detection, detect

__all__ = ["Detection", "detect"]
