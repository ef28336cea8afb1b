"""Stopping memorization where it starts: a filter for training loops (Wen et al. 2024, section 4.3)."""

from memhook.training.calibration import BinnedThreshold, FilterCalibration
from memhook.training.counts import FilterReport, KeyCount
from memhook.training.filter import TrainingFilter, training_filter
from memhook.training.masking import keep_mask, masked_mean

__all__ = ["BinnedThreshold", "FilterCalibration", "FilterReport", "KeyCount", "TrainingFilter", "keep_mask", "masked_mean", "training_filter"]
