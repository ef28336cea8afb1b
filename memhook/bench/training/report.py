"""The benchmark's table, files and plot: ``memhook bench training``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from memhook.bench.training.judging import Judgment
from memhook.bench.training.recipe import Recipe, ways
from memhook.bench.training.runs import Results, run_all
from memhook.bench.written import Shown, read_page, write_page
from memhook.errors import MemhookError
from memhook.files import csv_text, replace_file, write_text
from memhook.report.progress import tracked
from memhook.report.tables import console

if TYPE_CHECKING:
    from memhook.bench.training.signal import Signal

_COLUMNS = (
    "similarity", "less than without", "copies", "detection AUC", "agreement", "clean loss", "flagged: planted / fresh", "left out: planted / fresh",
    "list: AUC / top",
)  # fmt: skip
_PLAIN = "no filter"


@dataclass(frozen=True)
class Line:
    """A way's figures over the seeds: means, and standard deviations (0 for one seed); None where a way has no such figure.

    ``less`` holds, seed by seed, the similarity without a filter minus that of this way: both runs saw the same pairs with the same noise.
    """

    way: str
    seeds: int
    mean: dict[str, float | None]
    deviation: dict[str, float | None]
    less: tuple[float, ...] = ()


def lines(results: Results) -> list[Line]:
    """The table: the model before, then way by way."""
    names = list(dict.fromkeys(run.way.name for run in results.runs))
    groups = {"before the fine-tune": results.start} | {name: [run.judgment for run in results.runs if run.way.name == name] for name in names}
    plain = [judgment.similarity for judgment in groups.get(_PLAIN, [])]
    compared = {name for name in names if name != _PLAIN and plain}
    return [_line(name, group, plain if name in compared else []) for name, group in groups.items()]


def _line(name: str, group: Sequence[Judgment], plain: Sequence[float]) -> Line:
    mean: dict[str, float | None] = {}
    deviation: dict[str, float | None] = {}
    for field in fields(Judgment):
        values = [getattr(judgment, field.name) for judgment in group]
        known = not any(value is None for value in values)
        mean[field.name] = float(np.mean(values)) if known else None
        deviation[field.name] = _spread(values) if known else None
    less = tuple(without - judgment.similarity for without, judgment in zip(plain, group, strict=bool(plain)))
    return Line(name, len(group), mean, deviation, less)


def _cells(line: Line) -> list[str]:
    def mean(key: str, digits: int = 2) -> str:
        value = line.mean[key]
        return "-" if value is None else f"{value:.{digits}f}"

    filtered = line.mean["flagged_planted"] is not None
    return [
        line.way,
        f"{mean('similarity')} ± {line.deviation['similarity']:.2f}",
        f"{np.mean(line.less):.2f} ± {_spread(line.less):.2f}" if line.less else "-",
        mean("copies"),
        mean("detection_auc"),
        mean("agreement"),
        f"{mean('clean_loss', 4)} ± {line.deviation['clean_loss']:.4f}",
        f"{mean('flagged_planted')} / {mean('flagged_fresh')}" if filtered else "-",
        f"{mean('out_planted')} / {mean('out_fresh')}" if filtered else "-",
        f"{mean('list_auc')} / {mean('list_top')}" if filtered else "-",
    ]


def _spread(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def about(results: Results, seeds: int) -> str:
    """The sentence below the table."""
    recipe, cost = results.recipe, results.overhead
    return (
        f"{recipe.steps} steps of {recipe.batch} pairs, {recipe.share:.0%} of them showing one of {recipe.planted} planted pairs (about "
        f"{recipe.steps * recipe.batch * recipe.share / recipe.planted:.0f} times each); mean ± standard deviation over {seeds} seeds. "
        f"A step with the filter takes {cost.step:.2f} of the time of one without ({cost.step_seconds:.2f} s CPU), {cost.half:.2f} with the pass at "
        f"every other step, {cost.judged:.2f} with the pass for the samples at t >= 800 alone ({cost.judged_share:.0%} of them) and memory; forward "
        f"and backward pass of the denoiser alone {cost.denoiser:.2f}; the extra pass {cost.forward:.2f} of the loop's forward pass; peak memory "
        f"{cost.peak:.2f} and, with the pass at t >= 800, {cost.judged_peak:.2f}."
    )


def seen(results: Results) -> str:
    """The sentence about pairs that are memorized already."""
    found = results.signal
    return (
        f"Before the fine-tune, at the noisy samples of training: {found.flagged:.0%} of {found.memorized} presentations of the bundled model's "
        f"verbatim memorized pairs are above the calibrated threshold of 5%, and {found.flagged_clean:.1%} of {found.clean} presentations of other "
        f"clean pairs. Magnitude over threshold tells them apart with an AUC of {found.auc:.3f}, the magnitude alone with {found.auc_number:.3f}. "
        f"By timestep, {_bins(found)}."
    )


def _bins(found: Signal) -> str:
    edges = [f"{edge:.0f}" for edge in found.edges]
    spans = ["all", *[f"from {edge}" for edge in edges]] if not edges else [f"below {edges[0]}", *[f"from {edge}" for edge in edges]]
    figures = zip(spans, found.auc_bins, found.flagged_bins, strict=True)
    return "AUC and share flagged: " + "; ".join(f"{span} {auc:.2f}, {flagged:.0%}" for span, auc, flagged in figures)


def write(out: Path, results: Results, seeds: int) -> None:
    """``training.csv``, ``training.json``, ``training-dropped.csv`` and ``training.svg``."""
    table = lines(results)
    rows = [
        {"way": line.way, "seeds": line.seeds, "less": float(np.mean(line.less)) if line.less else None, "less_sd": _spread(line.less)}
        | {k: v for key in line.mean for k, v in _columns(key, line).items()}
        for line in table
    ]
    write_text(out / "training.csv", _csv(rows))
    write_text(out / "training-dropped.csv", _csv(results.dropped))
    runs = [{"way": run.way.name, "seed": run.seed, **asdict(run.judgment)} for run in results.runs]
    whole = {
        "recipe": asdict(results.recipe), "seeds": seeds, "overhead": asdict(results.overhead),
        "signal": asdict(results.signal), "before": [asdict(judgment) for judgment in results.start], "runs": runs, "dropped": results.dropped,
    }  # fmt: skip
    write_text(out / "training.json", json.dumps(whole, indent=2) + "\n")
    replace_file(out / "training.svg", lambda temporary: _plot(temporary, table))


def _columns(key: str, line: Line) -> dict[str, float | None]:
    return {key: line.mean[key], f"{key}_sd": line.deviation[key]}


def _csv(rows: Sequence[Mapping[str, object]]) -> str:
    return csv_text(rows, line_end="\n") if rows else ""


def _plot(path: Path, table: Sequence[Line]) -> None:
    """Memorization against quality, a point a way."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, key, title in ((panels[0], "agreement", "agreement with held-out captions"), (panels[1], "clean_loss", "loss on held-out pairs")):
        for line in table:
            kind = "s" if "random" in line.way else "D" if line.way.startswith(("before", _PLAIN)) else "o"
            mean, deviation = line.mean, line.deviation
            axes.errorbar(
                mean["similarity"], mean[key], xerr=deviation["similarity"], yerr=deviation[key], marker=kind, capsize=2, label=line.way
            )  # fmt: skip
        axes.set(xlabel="similarity to the training picture", ylabel=title)
        axes.spines[["top", "right"]].set_visible(False)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False, fontsize=8)
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "memhook"}):
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def run_training_bench(
    work: Path,
    recipe: Recipe,
    *,
    seeds: int,
    taus: Sequence[float] | None,
    rounds: int,
    out: Path | None,
    page: Path | None,
    names: Sequence[str] | None = None,
) -> Results:  # fmt: skip
    """Run (or go on running), print the table, and write it where asked."""
    if seeds < 1 or rounds < 1:
        raise MemhookError(f"seeds is {seeds} and rounds is {rounds}; expected at least 1 each")
    if page is not None:
        read_page(page, "training")  # before the long run: a wrong file is told at once
    compared = ways(taus, names)
    results = run_all(
        work, recipe, compared, seeds=seeds, rounds=rounds, track=lambda steps, doing: tracked(steps, total=len(steps), doing=doing)
    )  # fmt: skip
    shown = Shown()
    shown.table(
        "A fine-tune of the bundled model", [("way", ""), *((title, "right") for title in _COLUMNS)], [_cells(line) for line in lines(results)]
    )  # fmt: skip
    shown.text(about(results, seeds))
    shown.text(seen(results))
    if out is not None:
        write(out, results, seeds)
        console.print(f"wrote training.csv, training.json, training-dropped.csv and training.svg to {out}", soft_wrap=True)
    if page is not None:
        write_page(page, "training", shown)
    return results
