"""Evaluations of a run, the trace they leave, and watching one."""

from memhook.capture.watching import probe, watch

__all__ = ["probe", "watch"]
