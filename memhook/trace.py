"""The public name of `Row` and `Trace` for adapters written before `memhook.capture` was a folder."""

from memhook.capture.rows import Row
from memhook.capture.trace import Trace

__all__ = ["Row", "Trace"]
