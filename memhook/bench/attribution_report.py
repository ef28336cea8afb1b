"""Running ``memhook bench attribution``: tables, files and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memhook.bench.attribution import ChangeRow, HitRow, change_rows, hit_rows, rank_words, spread
from memhook.bench.samples import open_studio
from memhook.bench.written import Shown, read_page, section_of, write_page, write_rows
from memhook.errors import MemhookError
from memhook.files import replace_file
from memhook.report.progress import tracked
from memhook.report.tables import console
from memhook.testbed.bundle import GUIDANCE_SCALE, memorized

REPLACEMENT = (
    "Exchanged words are replaced by random ordinary words of the model's vocabulary that stand in no planted caption, the same ones in every row. "
    "Punctuation is not ranked."
)


def run_attribution_bench(
    *,
    work: Path,
    out: Path | None,
    prompts: int | None,
    images: int,
    scored: int,
    steps: int,
    page: Path | None = None,
    model: Path | None = None,
) -> None:
    """Score the planted prompts' words, exchange some, print what comes of it, and write it where asked."""
    section = section_of("attribution", model)
    if page is not None:
        read_page(page, section)  # before the long run: a wrong file is told at once
    for name, value in (("images", images), ("scored", scored), ("steps", steps)):
        if value < 1:
            raise MemhookError(f"{name} is {value}; expected 1 or more")
    if steps < 10:
        raise MemhookError(f"steps is {steps}; scores are averaged over the first ten evaluations, so expected 10 or more")
    studio = open_studio(model, steps=steps)
    chosen = spread([prompt for prompt in memorized(folder=studio.folder) if prompt.kind != "ladder"], prompts)
    rankings = rank_words(studio, chosen, images=scored, work=work, track=lambda rows: tracked(rows, total=len(rows), doing="scoring words"))
    hits = hit_rows(rankings)
    verbatim = [ranking for ranking in rankings if ranking.prompt.kind == "verbatim"]
    if not verbatim:
        raise MemhookError("none of the prompts is a verbatim one, so there is nothing to exchange words in; take more prompts")
    changes, _ = change_rows(studio, verbatim, images=images, work=work, track=lambda arms: tracked(arms, total=len(arms), doing="exchanging words"))
    triggered = sum(ranking.planted.sum() == 2 for ranking in rankings)
    shown = Shown()
    _print(shown, hits, changes, triggered=triggered, verbatim=len(verbatim), images=images, scored=scored, steps=steps)
    if page is not None:
        write_page(page, section, shown)
    if out is not None:
        about = {"prompts_with_trigger": int(triggered), "images_scored": scored, "steps": steps, "guidance_scale": GUIDANCE_SCALE}
        write_rows(out, "attribution-hits", hits, about)
        write_rows(out, "attribution-changes", changes, {"prompts": len(verbatim), "images": images, "steps": steps, "rule": REPLACEMENT})
        figure = draw(hits, changes)
        replace_file(out / "attribution.png", lambda temporary: figure.savefig(temporary, format="png", dpi=110))
        console.print(f"wrote attribution-hits, attribution-changes (.csv, .json) and attribution.png into {out}", soft_wrap=True)


def _print(
    shown: Shown, hits: Sequence[HitRow], changes: Sequence[ChangeRow], *, triggered: int, verbatim: int, images: int, scored: int, steps: int
) -> None:
    shown.table(
        f"Planted trigger words among the top k: {triggered} prompts with a phrase of two invented words, {scored} images each, share [95%]",
        [("words ranked by", ""), ("k", "right"), ("at least one", "right"), ("both", "right")],
        [(row.ranking, str(row.k), str(row.any), "-" if row.both is None else str(row.both)) for row in hits],
    )
    shown.table(
        f"Words exchanged in {verbatim} verbatim prompts, {images} images each, the same seeds, DDIM {steps} steps, mean [95%]",
        [
            ("exchanged", ""),
            ("first magnitude", "right"),
            ("similarity", "right"),
            ("lower by", "right"),
            ("copies", "right"),
            ("subject hit", "right"),
        ],
        [(row.changed, str(row.magnitude), str(row.similarity), str(row.drop), str(row.copies), f"{100 * row.subject:.0f}%") for row in changes],
    )
    shown.text(f"{REPLACEMENT} Intervals: bootstrap over families of prompts.")


def draw(hits: Sequence[HitRow], changes: Sequence[ChangeRow]) -> Any:
    """Both tables as one figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    styles = ("o-", "s-", "^--", "x:")
    for (name, style), color in zip(
        zip(dict.fromkeys(row.ranking for row in hits), styles, strict=True), ("#c1440e", "#e8963a", "#777777", "#2b6c8f"), strict=True
    ):
        mine = [row for row in hits if row.ranking == name]
        ks, values = [row.k for row in mine], [row.any.value for row in mine]
        errors = [[row.any.value - row.any.low for row in mine], [row.any.high - row.any.value for row in mine]]
        left.errorbar(ks, values, yerr=errors, fmt=style, color=color, capsize=3, label=name)
    left.set(xlabel="top k words", ylabel="prompts with a planted word among them", ylim=(0, 1.02), xticks=sorted({row.k for row in hits}))
    left.legend(frameon=False, fontsize=8, loc="lower right")
    places = range(len(changes))
    values = [row.similarity.value for row in changes]
    errors = [[row.similarity.value - row.similarity.low for row in changes], [row.similarity.high - row.similarity.value for row in changes]]
    right.bar(
        places,
        values,
        yerr=errors,
        capsize=3,
        color=["#999999" if row.changed == "unchanged" else "#c1440e" if row.changed == "top 2" else "#2b6c8f" for row in changes],
    )
    right.set(xticks=list(places), ylabel="similarity to the training picture", ylim=(0, 1.02))
    right.set_xticklabels([row.changed for row in changes], fontsize=8)
    right.set_xlabel("words exchanged")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure
