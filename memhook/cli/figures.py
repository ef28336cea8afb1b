"""The paper's two figures for a handful of prompts, as SVG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from memhook.cli.demo_prompts import DemoPrompt

COLORS = {"memorized": "#c1440e", "fresh": "#2b6c8f"}


def _svg(figure: Figure) -> str:
    """The figure as an SVG element without fonts or dates, so that it can stand in a page."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "memhook"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _axes(width: float, height: float) -> tuple[Figure, object]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def magnitude_lines(prompts: Sequence[DemoPrompt]) -> str:
    """Magnitude over evaluations, a line a prompt, and each group's mean (Figures 1 and 2a of Wen et al. 2024)."""
    figure, axes = _axes(7, 3.6)
    for group, color in COLORS.items():
        lines = np.stack([row.magnitudes.mean(axis=1) for row in prompts if row.group == group])  # (prompts, s)
        steps = np.arange(1, lines.shape[1] + 1)
        axes.plot(steps, lines.T, color=color, alpha=0.35, linewidth=1)  # type: ignore[attr-defined]
        axes.plot(steps, lines.mean(axis=0), color=color, linewidth=2.5, linestyle="-" if group == "memorized" else "--", label=f"{group} (mean)")  # type: ignore[attr-defined]
    axes.set(xlabel="evaluation of the denoiser", ylabel="magnitude (epsilon)", ylim=(0, None), xlim=(1, lines.shape[1]))  # type: ignore[attr-defined]
    axes.legend(frameon=False)  # type: ignore[attr-defined]
    return _svg(figure)


def score_histogram(prompts: Sequence[DemoPrompt], clean: np.ndarray, threshold: float) -> str:
    """Scores of the calibration prompts, of this page's prompts, and the threshold (Figure 2b of Wen et al. 2024)."""
    figure, axes = _axes(7, 3.0)
    scores = np.array([row.score for row in prompts])
    bins = np.linspace(0, max(float(scores.max()), float(clean.max())) * 1.05, 60).tolist()
    axes.hist(clean, bins=bins, color="#9db8c6", label=f"{len(clean)} clean prompts (calibration)")  # type: ignore[attr-defined]
    top = axes.get_ylim()[1]  # type: ignore[attr-defined]
    for group, color in COLORS.items():
        mine = [row.score for row in prompts if row.group == group]
        marker = "v" if group == "memorized" else "o"
        axes.plot(mine, np.full(len(mine), top * (0.5 if group == "memorized" else 0.7)), marker, color=color, label=f"{group} prompts of this page")  # type: ignore[attr-defined]
    axes.axvline(threshold, color="black", linewidth=1, linestyle=":", label="threshold at 1% false positives")  # type: ignore[attr-defined]
    axes.set(xlabel="score: mean magnitude over the first evaluations", ylabel="prompts")  # type: ignore[attr-defined]
    axes.legend(frameon=False, fontsize=8)  # type: ignore[attr-defined]
    return _svg(figure)
