"""For tests of code that uses memhook: tiny random UNets with a guided sampler, and conformance suites for adapters and scores."""

from memhook.testing.checks import CHECKS, Case
from memhook.testing.conformance import AdapterConformance, check_adapter
from memhook.testing.scores import ScoreConformance, check_score
from memhook.testing.tiny import TinyUNet, sample, tiny_unet

__all__ = ["CHECKS", "AdapterConformance", "Case", "ScoreConformance", "TinyUNet", "check_adapter", "check_score", "sample", "tiny_unet"]
