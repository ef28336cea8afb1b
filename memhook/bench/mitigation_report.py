"""Running ``memhook bench mitigation``: tables, files, a plot and a sheet of pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from memhook.bench.attribution import seeds_of, spread
from memhook.bench.guarded import GuardedRow, guarded_rows
from memhook.bench.mitigation import (
    BASELINES,
    CLEAN_PROMPTS,
    NONE,
    OPTIMIZED,
    REFERENCE,
    TARGETS,
    Descent,
    Outcome,
    Point,
    all_ways,
    clean_median,
    points,
    run_ways,
)
from memhook.bench.samples import Sample, open_studio
from memhook.bench.written import Shown, read_page, section_of, write_page, write_rows
from memhook.errors import MemhookError
from memhook.files import replace_file
from memhook.report.progress import tracked
from memhook.report.tables import console
from memhook.testbed.bundle import memorized

_LOOKS = {
    OPTIMIZED: ("o-", "#c1440e"),
    BASELINES[0]: ("s--", "#2b6c8f"),
    BASELINES[1]: ("^--", "#5a9bb8"),
    BASELINES[2]: ("v--", "#8a7fb5"),
    BASELINES[3]: ("D--", "#6b8e4e"),
    NONE: ("*", "black"),
    REFERENCE: ("P", "#777777"),
}
_SHOWN = ((NONE, 0.0), (OPTIMIZED, 1.0), (OPTIMIZED, 0.5), (BASELINES[0], 4.0), (BASELINES[0], 8.0), (BASELINES[3], 4.0))


def run_mitigation_bench(
    *,
    work: Path,
    out: Path | None,
    verbatim: int | None,
    templates: int | None,
    images: int,
    steps: int,
    descent: Descent,
    guarded: int,
    page: Path | None = None,
    model: Path | None = None,
) -> None:
    """Run (or go on running) every way on both kinds of prompts, print the points, and write them where asked."""
    section = section_of("mitigation", model)
    if page is not None:
        read_page(page, section)  # before the long run: a wrong file is told at once
    for name, value in (("images", images), ("steps", steps)):
        if value < 1:
            raise MemhookError(f"{name} is {value}; expected 1 or more")
    shown = Shown()
    studio = open_studio(model, steps=steps)
    clean = clean_median(studio)
    ways = all_ways(TARGETS)
    found: dict[str, tuple[list[Sample], list[Outcome], list[Point]]] = {}
    for kind, count in (("verbatim", verbatim), ("template", templates)):
        chosen = spread(memorized(kind="verbatim" if kind == "verbatim" else "template", folder=studio.folder), count)
        samples = [Sample(prompt, seed) for prompt in chosen for seed in seeds_of(prompt, images)]
        outcomes = run_ways(
            studio,
            samples,
            ways,
            clean_magnitude=clean,
            descent=descent,
            work=work,
            track=partial(tracked, total=len(ways), doing=f"ways, {kind} prompts"),
        )
        found[kind] = samples, outcomes, points(outcomes, samples)
        _print(shown, kind, found[kind][2], samples, steps)
    shown.text(
        f"Targets are multiples of {clean:.3g}, the median magnitude of {CLEAN_PROMPTS} clean prompts at the first evaluation, per sample; "
        f"{descent.optimizer}, learning rate {descent.lr:g}, at most {descent.max_steps} updates. Noise is in units of the embedding's "
        "root mean square. "
        "Gain: alignment of the optimized embedding at the same similarity minus the baseline's. Intervals: 95%, bootstrap over families."
    )
    for kind, (_, _, rows) in found.items():
        shown.text(verdict(kind, rows))
    checked = (
        guarded_rows(studio, per_source=guarded, track=lambda items: tracked(items, total=len(items), doing="guarded batches")) if guarded else []
    )
    if checked:
        _print_guarded(shown, checked)
    if page is not None:
        write_page(page, section, shown)
    if out is not None:
        about = {"steps": steps, "images": images, "clean_median_magnitude": clean, "descent": vars(descent)}
        for kind, (samples, _, rows) in found.items():
            write_rows(out, f"mitigation-{kind}", rows, {**about, "samples": len(samples)})
        if checked:
            write_rows(out, "mitigation-guard", checked, {"false_positive_rate": 0.01})
        plot = draw({kind: rows for kind, (_, _, rows) in found.items()})
        replace_file(out / "mitigation.png", lambda temporary: plot.savefig(temporary, format="png", dpi=110))
        sheet = contact_sheet(found["verbatim"][0], found["verbatim"][1])
        replace_file(out / "mitigation-pictures.png", lambda temporary: sheet.save(temporary, "PNG", optimize=True))
        console.print(f"wrote tables (.csv, .json), mitigation.png and mitigation-pictures.png into {out}", soft_wrap=True)


def _print(shown: Shown, kind: str, rows: Sequence[Point], samples: Sequence[Sample], steps: int) -> None:
    prompts = len({sample.prompt.id for sample in samples})
    shown.table(
        f"Mitigation of {prompts} {kind} prompts, {len(samples)} pictures, the same seeds in every row, DDIM {steps} steps, mean [95%]",
        [
            ("way", ""),
            ("setting", "right"),
            ("first magnitude", "right"),
            ("similarity", "right"),
            ("copies", "right"),
            ("alignment", "right"),
            ("gain", "right"),
            ("", ""),
        ],
        [
            (
                row.family,
                "" if row.family in (NONE, REFERENCE) else f"{row.setting:g}",
                f"{row.magnitude.value:.2f}",
                str(row.similarity),
                f"{row.copies.value:.2f}",
                str(row.alignment),
                "" if row.gain is None else str(row.gain),
                row.verdict or "",
            )
            for row in rows
        ],
    )


def verdict(kind: str, rows: Sequence[Point]) -> str:
    """Whether the optimized embedding dominates, in one sentence that counts."""
    baselines = [row for row in rows if row.verdict is not None]
    counts = {name: sum(row.verdict == name for row in baselines) for name in ("better", "not told apart", "worse", "beyond the curve")}
    dominates = counts["better"] == len(baselines)
    said = "dominates every baseline" if dominates else "does not dominate every baseline"
    return (
        f"{kind}: the optimized embedding {said}; of {len(baselines)} baseline points it is better than {counts['better']}, not told apart from "
        f"{counts['not told apart']}, worse than {counts['worse']}, and does not come down to the similarity of {counts['beyond the curve']}."
    )


def _print_guarded(shown: Shown, rows: Sequence[GuardedRow]) -> None:
    shown.table(
        "Prompts under a mitigating guard, clean and memorized ones in one batch, four pictures each",
        [
            ("group", ""),
            ("prompts", "right"),
            ("flagged", "right"),
            ("pictures changed, not flagged", "right"),
            ("pictures changed, flagged", "right"),
        ],
        [
            (
                row.group,
                str(row.prompts),
                str(row.flagged),
                str(row.changed_though_not_flagged),
                f"{row.changed_where_flagged} of {row.pictures_flagged}",
            )
            for row in rows
        ],
    )


def draw(kinds: Mapping[str, Sequence[Point]]) -> Any:
    """Alignment over similarity, a panel for each kind of prompts; up and to the left is better."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(kinds), 4.3), layout="constrained")
    for axes, (kind, rows) in zip(np.atleast_1d(figure.subplots(1, len(kinds), sharey=True)), kinds.items(), strict=True):
        for family, (style, color) in _LOOKS.items():
            mine = [row for row in rows if row.family == family]
            if family == OPTIMIZED:
                mine = [row for row in rows if row.family == NONE] + mine
            xs, ys = (np.array([getattr(row, name).value for row in mine]) for name in ("similarity", "alignment"))
            errors = [
                np.array([[getattr(row, name).value - getattr(row, name).low, getattr(row, name).high - getattr(row, name).value] for row in mine]).T
                for name in ("similarity", "alignment")
            ]
            faint = 0.35 if family != OPTIMIZED else 0.6
            axes.errorbar(xs, ys, xerr=errors[0], yerr=errors[1], fmt="none", ecolor=color, elinewidth=0.8, alpha=faint)
            axes.plot(
                xs, ys, style, color=color, label=family, linewidth=2.2 if family == OPTIMIZED else 1.1, markersize=9 if style in ("*", "P") else 5
            )
        axes.set(title=f"{kind} prompts", xlabel="similarity to the training picture (lower: less copied)")
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel("alignment with the caption")
            axes.legend(frameon=False, fontsize=8)
    return figure


def contact_sheet(samples: Sequence[Sample], outcomes: Sequence[Outcome], *, columns: int = 10) -> Any:
    """A column for each of some prompts: the training picture, then the first seed in four ways (Figure 5 of the paper)."""
    from PIL import Image, ImageDraw

    by_way = {(outcome.way.family, outcome.way.setting): outcome for outcome in outcomes}
    shown = [(way, by_way[way]) for way in _SHOWN if way in by_way]
    firsts = [index for index, sample in enumerate(samples) if index == 0 or sample.prompt.id != samples[index - 1].prompt.id]
    chosen = [firsts[int(at)] for at in np.linspace(0, len(firsts) - 1, min(columns, len(firsts))).round()]
    side, gap, left = 64, 4, 150
    sheet = Image.new("RGB", (left + len(chosen) * (side + gap), (1 + len(shown)) * (side + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    labels = ["training picture", *(f"{family}{'' if family == NONE else f' {setting:g}'}" for (family, setting), _ in shown)]
    for row, label in enumerate(labels):
        pen.text((4, row * (side + gap) + side // 2 - 6), label, fill="black")
        for column, index in enumerate(chosen):
            picture = samples[index].prompt.image() if row == 0 else Image.fromarray(shown[row - 1][1].pictures.images[index])
            sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST), (left + column * (side + gap), row * (side + gap)))
    return sheet
