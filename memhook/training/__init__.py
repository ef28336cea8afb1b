"""Stopping memorization where it starts: a filter for training loops (Wen et al. 2024, section 4.3).

Lives here:

    filter         `training_filter`: what a training loop attaches to its denoiser
    options        its options, checked when it is made
    masking        `keep_mask`, `masked_mean`: which samples of a batch to keep, and the loss over
                   them
    calibration    thresholds from clean data, by timestep
    thresholds     a threshold as a number, a table over timesteps, or a function of them
    timesteps      at which timesteps presentations are judged
    memory         which samples to leave out at every timestep from now on
    verdicts       what the filter finds about the samples of one batch
    counts         `FilterReport`: what was dropped, in total and by key
    calls          the denoiser's calls, noted until the loss of their batch is known
    unconditional  the extra pass with the null embedding, which leaves no trace in the loop
    cutting        that pass for some rows of a batch alone
    randomness     the random state that a forward pass draws from

May use: `memhook.mitigation` and the rooms before it. Used by: users' training loops and
`memhook.bench`.
"""

from memhook.training.calibration import BinnedThreshold, FilterCalibration
from memhook.training.counts import FilterReport, KeyCount
from memhook.training.filter import TrainingFilter, training_filter
from memhook.training.masking import keep_mask, masked_mean

__all__ = ["BinnedThreshold", "FilterCalibration", "FilterReport", "KeyCount", "TrainingFilter", "keep_mask", "masked_mean", "training_filter"]
