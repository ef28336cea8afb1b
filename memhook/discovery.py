"""The public name of `memhook.detection.discovery`."""

from memhook.detection.discovery import PValueCounts

__all__ = ["PValueCounts"]
