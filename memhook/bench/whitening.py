"""``memhook bench whitening``: the plain magnitude against the whitened one, at the first evaluation, on known prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from einops import rearrange

from memhook.bench.resampling import Estimate
from memhook.bench.samples import BATCH, Studio, open_studio
from memhook.bench.written import Shown, read_page, section_of, write_page, write_rows
from memhook.capture.prediction import Evaluation, magnitude
from memhook.errors import MemhookError
from memhook.evaluation.roc import evaluate
from memhook.report.progress import tracked
from memhook.scores.spectrum import SHRINKAGE, CleanSpectrum
from memhook.testbed.bundle import CleanPrompt, MemorizedPrompt, clean, memorized

if TYPE_CHECKING:
    from memhook.testbed.plan import Source

SOURCES: tuple[Source, ...] = ("once", "held-out", "foreign", "random")
FITTED = (64, 256, 1024)  # clean prompts behind a spectrum
IMAGES = 4
FPR = 0.01
SEED = 44_000_000


@dataclass(frozen=True)
class WhiteningRow:
    """How well one score separates memorized prompts from clean ones.

    Attributes:
        score: Its name.
        fitted: Clean prompts behind the spectrum; 0 for the plain magnitude.
        images: A prompt's images that the score averages; with 1, figures are the means over the images.
        auc: With its 95% interval over families.
        tpr: At a false-positive rate of 1%.
    """

    score: str
    fitted: int
    images: int
    auc: Estimate
    tpr: Estimate


def first_evaluations(
    studio: Studio,
    prompts: Sequence[MemorizedPrompt | CleanPrompt],
    *,
    images: int,
    seed: int,
    track: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> list[Evaluation]:
    """The first evaluation of every prompt's images, prompts in order and a prompt's images side by side, in batches."""
    found = []
    count = BATCH // images
    for start in track(range(0, len(prompts), count)):
        batch = prompts[start : start + count]
        embeddings = studio.encode([prompt.prompt for prompt in batch]).repeat_interleave(images, dim=0)
        noise = studio.noise([seed + start * images + number for number in range(len(embeddings))])
        [first] = studio.evaluations(embeddings, noise)
        found.append(replace(first, embedding=None, replay=None))  # the call is not needed, and holds the whole batch
    return found


def scored_memorized(studio: Studio) -> list[MemorizedPrompt]:
    """The planted prompts but those that were shown a few times by design."""
    return [row for row in memorized(folder=studio.folder) if row.kind != "ladder"]


def plain(evaluation: Evaluation) -> torch.Tensor:
    """The paper's magnitude."""
    if evaluation.pred_uncond is None:
        raise MemhookError("an evaluation of the bundled model has no unconditional prediction; expected guided sampling")
    return magnitude(evaluation.pred_cond, evaluation.pred_uncond)


def whitening_rows(
    studio: Studio,
    *,
    per_source: int,
    fitted: Sequence[int] = FITTED,
    images: int = IMAGES,
    track: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> list[WhiteningRow]:
    """Fit spectra on clean prompts of the calibration split, and score memorized prompts and clean ones of the test split.

    Args:
        studio: The model.
        per_source: Clean test prompts of each of the four sources.
        fitted: How many clean prompts to fit a spectrum on, evenly from the sources.
        images: Of a test prompt; prompts that a spectrum is fitted on have one.
        track: Wraps the batches, to show progress.
    """
    calibration = clean(split="calibration", folder=studio.folder)
    tested = [clean(split="test", source=source, folder=studio.folder) for source in SOURCES]
    for name, value, most in (("per-source", per_source, min(map(len, tested))), ("fitted", max(fitted), len(calibration))):
        if not 1 <= value <= most:
            raise MemhookError(f"{name} is {value}; expected 1 to {most}")
    positives, negatives = scored_memorized(studio), [row for rows in tested for row in rows[:per_source]]
    fit = first_evaluations(studio, calibration[: max(fitted)], images=1, seed=SEED, track=track)
    test = first_evaluations(studio, [*positives, *negatives], images=images, seed=SEED + 10_000_000, track=track)
    scores: list[tuple[str, int, Callable[[Evaluation], torch.Tensor]]] = [("magnitude", 0, plain)]
    scores += [("whitened magnitude", count, CleanSpectrum.fit(_first(fit, count)).magnitude) for count in fitted]
    rows = []
    for name, count, score in scores:
        values = rearrange(torch.cat([score(evaluation) for evaluation in test]).numpy(), "(prompts images) -> images prompts", images=images)
        for used in (1, images) if images > 1 else (1,):
            tries = values if used == 1 else values.mean(axis=0)[None]
            found = evaluate(
                tries[:, : len(positives)],
                tries[:, len(positives) :],
                fpr=FPR,
                memorized_families=[row.family for row in positives],
                clean_families=[row.family for row in negatives],
            )
            auc, tpr = (Estimate(figure.value, figure.low, figure.high) for figure in (found.auc, found.tpr))
            rows.append(WhiteningRow(name, count, used, auc, tpr))
    return rows


def _first(evaluations: Sequence[Evaluation], count: int) -> list[Evaluation]:
    """So many samples from the front of a list of batches."""
    found, left = [], count
    for evaluation in evaluations:
        here = min(left, len(evaluation.pred_cond))
        if here:
            found.append(evaluation.take(torch.arange(here)))
        left -= here
    return found


def run_whitening_bench(*, per_source: int, out: Path | None, page: Path | None, model: Path | None) -> None:
    """Print the rows, and write them where asked."""
    section = section_of("whitening", model)
    if page is not None:
        read_page(page, section)  # before the run: a wrong file is told at once
    studio = open_studio(model)
    rows = whitening_rows(studio, per_source=per_source, track=lambda items: tracked(items, total=len(items), doing="first evaluations"))
    planted, fresh = len(scored_memorized(studio)), len(SOURCES) * per_source
    shown = Shown()
    shown.table(
        f"First evaluation only, {planted} memorized and {fresh} clean prompts, DDIM {studio.steps} steps [95%]",
        [("score", ""), ("clean prompts fitted on", "right"), ("images", "right"), ("AUC", "right"), ("TPR at 1% FPR", "right")],
        [(row.score, str(row.fitted) if row.fitted else "-", str(row.images), f"{row.auc.value:.4f}", str(row.tpr)) for row in rows],
    )
    shown.text(
        f"Shrinkage {SHRINKAGE:g}, one image of each prompt that a spectrum is fitted on; none of these is among the test prompts. "
        "With one image, figures are means over the images. Intervals: bootstrap over families."
    )
    if page is not None:
        write_page(page, section, shown)
    if out is not None:
        write_rows(out, "whitening", rows, {"steps": studio.steps, "per_source": per_source, "shrinkage": SHRINKAGE, "fpr": FPR})
