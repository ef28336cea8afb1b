"""For tests of code that uses memhook: tiny random UNets with a guided sampler, and conformance suites for adapters and scores.

Lives here:

    tiny         random UNets with cross-attention, small enough for unit tests, and a sampler for
                 them
    conformance  `AdapterConformance`: the suite as a pytest class to subclass, and as a function
    checks       its checks: what has to hold for every adapter
    state        what a host looks like from outside, which a watch must leave as it was
    scores       `ScoreConformance`: the suite for scores

May use: `memhook.capture` and `memhook.adapting`. Used by: authors of adapters and of scores, and this
project's own tests.
"""

from memhook.testing.checks import CHECKS, Case
from memhook.testing.conformance import AdapterConformance, check_adapter
from memhook.testing.scores import ScoreConformance, check_score
from memhook.testing.tiny import TinyUNet, sample, tiny_unet

__all__ = ["CHECKS", "AdapterConformance", "Case", "ScoreConformance", "TinyUNet", "check_adapter", "check_score", "sample", "tiny_unet"]
