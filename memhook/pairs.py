"""The public name of `memhook.adapting.pairs` for adapters written before that room was there."""

from memhook.adapting.pairs import PairRecorder, Prediction, find_embedding, find_sample, find_timestep, read_output, same_samples, split_call

__all__ = ["PairRecorder", "Prediction", "find_embedding", "find_sample", "find_timestep", "read_output", "same_samples", "split_call"]
