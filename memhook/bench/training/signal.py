"""What the filter would see of pairs that the bundled model has memorized already, at the noisy samples of a training loop."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from memhook.bench.training.finetune import Model, noised
from memhook.bench.training.recipe import Data, Pair, Recipe
from memhook.evaluation.roc import roc_auc
from memhook.testbed.plan import planted
from memhook.training import training_filter

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from memhook.training import FilterCalibration

_NOISES = 4  # presentations of each memorized pair
_RATE = 0.05


@dataclass(frozen=True)
class Signal:
    """Shares of presentations, before any fine-tune.

    Attributes:
        memorized: Presentations of verbatim memorized pairs.
        clean: Presentations of pairs that were neither trained on nor calibrated with.
        flagged: The share of the memorized ones above the calibrated threshold of 5%.
        flagged_clean: The same of the clean ones; what the calibration promises to be 5%.
        auc: How well magnitude / threshold tells a memorized presentation from a clean one.
        auc_number: How well the magnitude alone does, which is what one number for all timesteps goes by.
        edges: ``(k - 1,)``: the calibration's inner edges between bins of timesteps.
        auc_bins: ``(k,)``: the AUC within each bin.
        flagged_bins: ``(k,)``: the share of memorized presentations in each bin that are flagged.
    """

    memorized: int
    clean: int
    flagged: float
    flagged_clean: float
    auc: float
    auc_number: float
    edges: list[float]
    auc_bins: list[float]
    flagged_bins: list[float]


def signal(model: Model, recipe: Recipe, calibration: FilterCalibration) -> Signal:
    """Measure on the bundled model as it is."""
    pairs = [Pair(pair.id, pair.caption, pair.scene) for pair in planted() if pair.kind == "verbatim"] * _NOISES
    data = Data(recipe, 0)
    own = [pairs[start : start + recipe.batch] for start in range(0, len(pairs), recipe.batch)]
    clean = [data.clean_batch(recipe.observed + number) for number in range(recipe.observed)]  # after those of the calibration
    threshold = calibration.threshold(fpr=_RATE)
    magnitudes, excess, places = [], [], []
    for seed, batches in enumerate((own, clean)):
        timesteps, norms = _observed(model, batches, seed=seed)
        magnitudes.append(norms)
        excess.append(norms / threshold(torch.from_numpy(timesteps)).numpy())
        places.append(np.searchsorted(calibration.edges, timesteps, side="right"))
    parts = [[values[place == number] for values, place in zip(excess, places, strict=True)] for number in range(len(calibration.edges) + 1)]
    return Signal(
        memorized=len(excess[0]),
        clean=len(excess[1]),
        flagged=float(np.mean(excess[0] > 1)),
        flagged_clean=float(np.mean(excess[1] > 1)),
        auc=roc_auc(*excess),
        auc_number=roc_auc(*magnitudes),
        edges=list(calibration.edges),
        auc_bins=[roc_auc(*part) for part in parts],
        flagged_bins=[float(np.mean(part[0] > 1)) for part in parts],
    )


def _observed(model: Model, batches: Iterable[Sequence[Pair]], *, seed: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Timesteps and magnitudes ``(n,)`` of these pairs, each with noise of its own."""
    unet = model.denoiser()
    with training_filter(unet, null_embedding=model.encode([""])[0], threshold=None) as f, torch.no_grad():
        for number, pairs in enumerate(batches):
            f.mean(noised(model, pairs, [str(pair.caption) for pair in pairs], seed=(5, seed, number), dropout=0.0).losses(unet))
    found = f.calibration(bins=1)
    return found.timesteps, found.magnitudes
