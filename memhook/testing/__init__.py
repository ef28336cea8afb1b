"""For tests of code that uses memhook: a tiny random UNet and a tiny guided sampler, in plain torch."""

from memhook.testing.tiny import TinyUNet, sample, tiny_unet

__all__ = ["TinyUNet", "sample", "tiny_unet"]
