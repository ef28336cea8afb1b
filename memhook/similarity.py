"""The public name of `memhook.evaluation.similarity`."""

from memhook.evaluation.similarity import ClipScore, Descriptor, image_similarity, load_clip, load_descriptor

__all__ = ["ClipScore", "Descriptor", "image_similarity", "load_clip", "load_descriptor"]
