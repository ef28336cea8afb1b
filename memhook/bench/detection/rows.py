"""The lines of the table: each detector, number of images and step, with AUC, TPR and their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from memhook.bench.detection.sampled import Sampled, group_sizes, stages
from memhook.errors import MemhookError
from memhook.evaluation.roc import Interval, evaluate, one_per_family

if TYPE_CHECKING:
    from memhook.bench.detection.timing import Seconds

DETECTORS = {"pixels": "density, pixels (l2)", "descriptors": "density, descriptors", "magnitude": "magnitude (ours)"}


@dataclass(frozen=True)
class DetectionRow:
    """One cell of the table: a detector that sees ``images`` images of a prompt up to ``step``.

    ``seconds`` is per prompt, None where it was not measured. ``deduplicated``: of each family of memorized prompts only the first counts.
    """

    detector: str
    images: int
    step: int
    auc: Interval
    tpr_at_1_percent_fpr: Interval
    seconds: float | None = None
    deduplicated: bool = False


def detection_rows(sampled: Sampled, *, seconds: Sequence[Seconds] = (), deduplicated: bool = False, resamples: int = 2000) -> list[DetectionRow]:
    """Every detector at every number of images and step.

    Where a prompt has more images than a detector uses, the figures are means over disjoint groups of its images. The magnitude is averaged over
    the evaluations up to the step (Wen et al. 2024, section 3.3); densities are of the pictures at the step.
    """
    steps, images = sampled.magnitudes.shape[1:]
    timed = {(row.detector, row.images, row.step): row.seconds for row in seconds}
    found = []
    for detector in DETECTORS:
        for size in group_sizes(images) if detector != "magnitude" else [1, *group_sizes(images)]:
            for step in stages(steps):
                scores = _scores(sampled, detector, size, step)
                if scores is None:
                    continue
                row = _figures(sampled, scores, deduplicated=deduplicated, resamples=resamples)
                found.append(
                    replace(row, detector=detector, images=size, step=step, seconds=timed.get((detector, size, step)), deduplicated=deduplicated)
                )
    return found


def _scores(sampled: Sampled, detector: str, size: int, step: int) -> np.ndarray | None:
    """``(tries, N)``: the detector's scores on disjoint groups of ``size`` images."""
    if detector != "magnitude":
        found = sampled.densities.get(f"{detector}/{step}/{size}")
        return None if found is None else found.T
    rows = sampled.magnitudes[:, :step]
    guided = ~np.isnan(rows).all(axis=(0, 2))
    if not guided.any():
        return None
    over = rows[:, guided].mean(axis=1, dtype=np.float64)  # (N, n)
    used = over.shape[1] - over.shape[1] % size
    scores: np.ndarray = over[:, :used].reshape(len(over), -1, size).mean(axis=2).T
    return scores


def _figures(sampled: Sampled, scores: np.ndarray, *, deduplicated: bool, resamples: int) -> DetectionRow:
    memorized = np.array([row.memorized for row in sampled.prompts])
    families = np.array([row.family for row in sampled.prompts])
    places = np.flatnonzero(memorized), np.flatnonzero(~memorized)
    if not all(len(place) for place in places):
        raise MemhookError(f"there are {len(places[0])} memorized and {len(places[1])} clean prompts; expected at least one of each")
    if deduplicated:
        places = places[0][one_per_family(families[places[0]].tolist())], places[1]
    found = evaluate(
        scores[:, places[0]], scores[:, places[1]], resamples=resamples,
        memorized_families=families[places[0]].tolist(), clean_families=families[places[1]].tolist(),
    )  # fmt: skip
    return DetectionRow("", 0, 0, found.auc, found.tpr)
