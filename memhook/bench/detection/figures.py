"""The paper's Figures 1 and 2(b) for any model: magnitude over the evaluations, and the scores of both classes with the threshold."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memhook.detection.calibration import calibrate
from memhook.errors import CalibrationError
from memhook.files import replace_file

if TYPE_CHECKING:
    from memhook.bench.detection.sampled import Sampled

_COLORS = {"memorized": "#c1440e", "clean": "#2b6c8f"}
_FIRST = 10  # evaluations of the histogram's score


def _groups(sampled: Sampled) -> dict[str, np.ndarray]:
    """Magnitudes of each class, averaged over images: ``(N, s)``."""
    memorized = np.array([row.memorized for row in sampled.prompts])
    lines = sampled.magnitudes.mean(axis=2)
    return {"memorized": lines[memorized], "clean": lines[~memorized]}


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def magnitude_bands(sampled: Sampled, path: Path) -> None:
    """Median magnitude of both classes over the evaluations, with bands from the 10th to the 90th percentile."""
    figure, axes = _figure()
    for (name, lines), style in zip(_groups(sampled).items(), ("-", "--"), strict=True):
        steps = np.arange(1, lines.shape[1] + 1)
        low, middle, high = np.nanquantile(lines, [0.1, 0.5, 0.9], axis=0)
        axes.fill_between(steps, low, high, color=_COLORS[name], alpha=0.2, linewidth=0)
        axes.plot(steps, middle, style, color=_COLORS[name], linewidth=2, label=f"{name} ({len(lines)} prompts): median, 10% to 90%")
    axes.set(xlabel="evaluation of the denoiser", ylabel="magnitude", ylim=(0, None), xlim=(1, lines.shape[1]))
    axes.legend(frameon=False)
    replace_file(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))


def histogram(sampled: Sampled, path: Path) -> None:
    """Scores over the first ten evaluations, and the threshold that flags at most 1% of these clean prompts."""
    figure, axes = _figure()
    first = min(_FIRST, sampled.magnitudes.shape[1])
    scores = {name: np.nanmean(lines[:, :first], axis=1) for name, lines in _groups(sampled).items()}
    bins = np.linspace(min(map(np.min, scores.values())), max(map(np.max, scores.values())), 50).tolist()
    for name, values in scores.items():
        axes.hist(
            values, bins=bins, color=_COLORS[name], alpha=0.6, density=True, label=f"{name} ({len(values)} prompts)", hatch="//" * (name == "clean")
        )
    try:
        threshold = calibrate(scores["clean"]).threshold(0.01)
    except CalibrationError:
        pass  # fewer than 99 clean prompts
    else:
        axes.axvline(threshold, color="black", linestyle=":", label=f"threshold at 1% false positives: {threshold:.3g}")
    axes.set(xlabel=f"score: mean magnitude over the first {first} evaluations", ylabel="share of prompts (density)")
    axes.legend(frameon=False)
    replace_file(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))
