"""What can go wrong, as exceptions. Every message says what was seen, what was expected, and what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np


class Recorded(Protocol):
    """What an error says of a `memhook.Trace`."""

    @property
    def magnitudes(self) -> np.ndarray:
        """``(s, b)``: magnitudes of each evaluation."""

    @property
    def groups(self) -> np.ndarray:
        """``(b,)``: to which prompt each sample belongs."""

    def score(self, *, first: int | None = None) -> np.ndarray:
        """``(b,)``: mean magnitude of the first so many evaluations."""

    def __len__(self) -> int: ...


class Verdict(Protocol):
    """What an error says of a `memhook.Detection`."""

    @property
    def scores(self) -> np.ndarray:
        """``(p,)``."""

    @property
    def p_values(self) -> np.ndarray:
        """``(p,)``."""

    @property
    def memorized(self) -> np.ndarray:
        """``(p,)`` bool."""

    @property
    def undecided(self) -> np.ndarray:
        """``(p,)`` bool."""


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
        trace: What was recorded up to the stop, a `memhook.Trace`.
        detection: The decision that stopped the run, a `memhook.Detection`.
    """

    def __init__(self, message: str, *, trace: Recorded, detection: Verdict) -> None:
        super().__init__(message)
        self.trace = trace
        self.detection = detection
