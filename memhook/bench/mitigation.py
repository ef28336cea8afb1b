"""``memhook bench mitigation``: similarity to the training picture against agreement with the prompt (Figure 4 of the paper), with intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from memhook.bench.resampling import Estimate, estimate, family_weights, weighted_means
from memhook.bench.samples import BATCH, Judged, Pictures, Sample, Studio, fresh_caption, judge, kept
from memhook.capture.prediction import magnitude
from memhook.errors import MemhookError
from memhook.mitigation.embedding import Optimizer, optimize_embedding
from memhook.mitigation.random_additions import add_embedding_noise, add_random_numbers, add_random_tokens, repeat_words
from memhook.testbed.bundle import clean
from memhook.testbed.measures import COPY_THRESHOLD

if TYPE_CHECKING:
    from memhook.testbed.plan import Source

NONE, OPTIMIZED, REFERENCE = "no mitigation", "optimized embedding", "fresh caption (reference)"
BASELINES = ("random tokens", "random numbers", "repeated words", "noise on the embedding")
COUNTS = (1, 2, 4, 6, 8)  # the paper's, section 4.4
FEWER_COUNTS = (2, 4, 8)  # of numbers and repeated words, which the paper leaves out
CLEAN_PROMPTS = 64  # whose median magnitude targets are multiples of
SCALES = (1.0, 2.0, 4.0, 8.0)  # of the embedding's root mean square
TARGETS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)  # of the clean prompts' median magnitude at the first evaluation
_SOURCES: tuple[Source, ...] = ("once", "held-out", "foreign", "random")
Verdict = Literal["better", "worse", "not told apart", "beyond the curve"]


@dataclass(frozen=True)
class Descent:
    """How embeddings are optimized; the defaults are the paper's and those of `memhook.optimize_embedding`."""

    optimizer: Optimizer = "adam"
    lr: float = 0.05
    max_steps: int = 10


@dataclass(frozen=True)
class Way:
    """One way of changing a prompt: its family, and how strongly."""

    family: str
    setting: float


def all_ways(targets: Sequence[float] = TARGETS) -> list[Way]:
    """Every point of the figure: no mitigation first."""
    settings: Mapping[str, Sequence[float]] = {
        NONE: (0,),
        OPTIMIZED: sorted(targets, reverse=True),
        BASELINES[0]: COUNTS,
        **dict.fromkeys(BASELINES[1:3], FEWER_COUNTS),
        BASELINES[3]: SCALES,
        REFERENCE: (0,),
    }
    return [Way(family, setting) for family, found in settings.items() for setting in found]


@dataclass(frozen=True, eq=False)
class Outcome:
    """What came of all samples in one way."""

    way: Way
    pictures: Pictures
    judged: Judged
    cut_off: float  # share of the changed prompts that are longer than the text encoder's window


@dataclass(frozen=True)
class Point:
    """One point of the curve.

    Attributes:
        family: What was done.
        setting: Words added, scale of the noise, or target over the clean prompts' median magnitude.
        magnitude: At the first evaluation, with the changed prompt.
        similarity: To the training picture.
        copies: Share of pictures that count as copies.
        alignment: With the caption, 0 to 1.
        cut_off: Share of changed prompts that did not fit the window of the text encoder.
        gain: How much higher the alignment of the optimized embedding is at the same similarity, on the line through its points and the
            one without mitigation; None for the optimized embedding itself, and where the line does not come down to that similarity.
    """

    family: str
    setting: float
    magnitude: Estimate
    similarity: Estimate
    copies: Estimate
    alignment: Estimate
    cut_off: float
    gain: Estimate | None = None
    verdict: Verdict | None = field(default=None)


def clean_median(studio: Studio) -> float:
    """The median magnitude of clean prompts of the calibration split at the first evaluation, in the setting of this run."""
    each = CLEAN_PROMPTS // len(_SOURCES)
    rows = [row for source in _SOURCES for row in clean(split="calibration", source=source, folder=studio.folder)[:each]]
    embeddings, noise = studio.encode([row.prompt for row in rows]), studio.noise(range(len(rows)))
    found = [studio.evaluations(embeddings[i : i + BATCH], noise[i : i + BATCH])[0] for i in range(0, len(rows), BATCH)]
    magnitudes = [magnitude(first.pred_cond, first.pred_uncond) for first in found if first.pred_uncond is not None]
    return float(torch.cat(magnitudes).median())


def run_ways(
    studio: Studio,
    samples: Sequence[Sample],
    ways: Sequence[Way],
    *,
    clean_magnitude: float,
    descent: Descent | None = None,
    work: Path | None = None,
    track: Callable[[Sequence[Way]], Iterable[Way]] = iter,
) -> list[Outcome]:
    """Make every sample's picture in every way, from the same noise; or go on where an earlier run in ``work`` stopped.

    Args:
        studio: The model.
        samples: Which prompts, and from which noise.
        ways: What to do with the prompts.
        clean_magnitude: What targets are multiples of.
        descent: How embeddings are optimized.
        work: Folder for one file a way.
        track: Wraps the ways, to show progress.
    """
    descent = descent if descent is not None else Descent()
    noise = studio.noise([sample.seed for sample in samples])
    setting = [[sample.prompt.prompt, sample.seed] for sample in samples]
    found = []
    for way in track(ways):
        identity: list[Any] = [vars(way), setting, studio.identity()]
        if way.family == OPTIMIZED:
            identity += [vars(descent), clean_magnitude]

        def make(way: Way = way) -> dict[str, np.ndarray]:
            embeddings, cut_off = _changed(studio, samples, noise, way, clean_magnitude, descent)
            pictures = studio.make(embeddings, noise)
            return {"images": pictures.images, "magnitudes": pictures.magnitudes, "cut_off": np.array([cut_off])}

        part = kept(work, f"{way.family.split(' (')[0].replace(' ', '-')}-{way.setting:g}", identity, make)
        pictures = Pictures(part["images"], part["magnitudes"])
        found.append(Outcome(way, pictures, judge(pictures, samples), float(part["cut_off"][0])))
    return found


def _changed(studio: Studio, samples: Sequence[Sample], noise: Tensor, way: Way, clean_magnitude: float, descent: Descent) -> tuple[Tensor, float]:
    """Every sample's embedding ``(n, l, d)`` in this way, and the share of texts that were too long."""
    prompts = [sample.prompt.prompt for sample in samples]
    count, tokenizer = int(way.setting), studio.pipeline.tokenizer
    write: dict[str, Callable[[Sample], str]] = {
        BASELINES[0]: lambda sample: add_random_tokens(sample.prompt.prompt, tokenizer, count=count, seed=sample.seed),
        BASELINES[1]: lambda sample: add_random_numbers(sample.prompt.prompt, count=count, seed=sample.seed),
        BASELINES[2]: lambda sample: repeat_words(sample.prompt.prompt, count=count, seed=sample.seed),
        REFERENCE: fresh_caption,
    }
    texts = [write[way.family](sample) for sample in samples] if way.family in write else prompts
    embeddings = studio.encode(texts)
    if way.family == BASELINES[3]:
        embeddings = add_embedding_noise(embeddings, scale=way.setting, seeds=[sample.seed for sample in samples])
    elif way.family == OPTIMIZED:
        target = way.setting * clean_magnitude
        embeddings = torch.cat([_optimized(studio, embeddings[i : i + BATCH], noise[i : i + BATCH], target, descent) for i in _starts(samples)])
    return embeddings, float(studio.cut_off(texts).mean())


def _starts(samples: Sequence[Sample]) -> range:
    return range(0, len(samples), BATCH)


def _optimized(studio: Studio, embeddings: Tensor, noise: Tensor, target: float, descent: Descent) -> Tensor:
    [first] = studio.evaluations(embeddings, noise)
    return optimize_embedding(
        first.objective, embeddings, target=target, lr=descent.lr, max_steps=descent.max_steps, optimizer=descent.optimizer
    ).embedding


def points(outcomes: Sequence[Outcome], samples: Sequence[Sample]) -> list[Point]:
    """Means with bootstrap intervals over families, and every baseline against the optimized embedding at the same similarity."""
    weights = family_weights([sample.prompt.family for sample in samples])
    means = [
        (weighted_means(weights, outcome.judged.similarity), weighted_means(weights, outcome.judged.alignment)) for outcome in outcomes
    ]  # a pair of (1 + draws,) for each way
    curve = [index for index, outcome in enumerate(outcomes) if outcome.way.family in (NONE, OPTIMIZED)]
    if len(curve) < 2:
        raise MemhookError("there is no curve to compare with; run no mitigation and the optimized embedding too")
    similarity, alignment = (np.stack([means[index][part] for index in curve], axis=1) for part in (0, 1))  # (1 + draws, points)
    found = []
    for outcome, (mine, agreement) in zip(outcomes, means, strict=True):
        gain, verdict = None, None
        if outcome.way.family in BASELINES:
            gain, verdict = _gain(similarity, alignment, mine, agreement)
        found.append(
            Point(
                outcome.way.family,
                outcome.way.setting,
                estimate(weighted_means(weights, outcome.pictures.magnitudes)),
                estimate(mine),
                estimate(weighted_means(weights, outcome.judged.similarity >= COPY_THRESHOLD)),
                estimate(agreement),
                outcome.cut_off,
                gain,
                verdict,
            )
        )
    return found


def _gain(similarity: np.ndarray, alignment: np.ndarray, mine: np.ndarray, agreement: np.ndarray) -> tuple[Estimate | None, Verdict]:
    """The curve's alignment at a baseline's similarity, minus the baseline's, in every bootstrap sample."""
    if mine[0] < similarity[0].min():
        return None, "beyond the curve"
    order = np.argsort(similarity, axis=1)
    xs, ys = np.take_along_axis(similarity, order, 1), np.take_along_axis(alignment, order, 1)
    there = np.array([np.interp(at, x, y) for at, x, y in zip(mine, xs, ys, strict=True)])
    gain = estimate(there - agreement)
    return gain, "better" if gain.low > 0 else "worse" if gain.high < 0 else "not told apart"
