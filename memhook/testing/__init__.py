"""For tests of code that uses memhook: tiny random UNets with a guided sampler, and a conformance suite for adapters."""

from memhook.testing.checks import CHECKS, Case
from memhook.testing.conformance import AdapterConformance, check_adapter
from memhook.testing.tiny import TinyUNet, sample, tiny_unet

__all__ = ["CHECKS", "AdapterConformance", "Case", "TinyUNet", "check_adapter", "sample", "tiny_unet"]
