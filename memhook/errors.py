"""What can go wrong, as exceptions. Every message says what was seen, what was expected, and what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memhook.capture.trace import Trace
    from memhook.detection.verdict import Detection


class MemhookError(Exception):
    """The parent of every error that memhook raises on purpose."""


class NoAdapterError(MemhookError):
    """No adapter knows how to watch this target."""


class AmbiguousAdapterError(MemhookError):
    """Two or more adapters claim the same target."""


class NoGuidanceError(MemhookError):
    """There was no unconditional prediction, so there is no magnitude to measure."""


class GuidanceLayoutError(MemhookError):
    """The calls of the denoiser do not have the form that was declared, or a form that the adapter does not know."""


class ReplayError(MemhookError):
    """A captured call cannot be run again, or running it again did not give the captured output."""


class CalibrationError(MemhookError):
    """A calibration cannot be made, read or used as asked."""


class CalibrationMismatchError(CalibrationError):
    """A calibration was made in another setting than the run that it is asked to judge."""


class MemorizationDetectedError(MemhookError):
    """A run was stopped because its prompt looks memorized; carries the evidence.

    Attributes:
        trace: What was recorded up to the stop.
        detection: The decision that stopped the run.
    """

    def __init__(self, message: str, *, trace: Trace, detection: Detection) -> None:
        super().__init__(message)
        self.trace = trace
        self.detection = detection
