"""How much a fine-tuned denoiser has memorized, and how well it still does its work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from memhook.bench.training.finetune import Model, noised
from memhook.capture.watching import watch
from memhook.evaluation.roc import roc_auc
from memhook.testbed.bundle import GUIDANCE_SCALE, load_reader
from memhook.testbed.measures import COPY_THRESHOLD, copy_similarity
from memhook.testbed.scenes import draw
from memhook.testbed.train.autoencoder import to_pixels

if TYPE_CHECKING:
    from memhook.bench.training.recipe import Data, Pair
    from memhook.training import FilterReport, KeyCount

_NOISES = 4  # noise draws for each held-out pair, for the loss


@dataclass(frozen=True)
class Judgment:
    """Figures of one run.

    Attributes:
        similarity: Mean copy similarity of the planted captions' pictures to their training picture; lower is less memorized.
        copies: The share of these pictures that count as copies.
        magnitude: Mean detection score (first evaluation) of the planted captions.
        clean_magnitude: The same of held-out captions.
        detection_auc: How well the score tells planted captions from held-out ones; 0.5 is what a model that memorized nothing gives.
        agreement: The share of held-out pictures that show the subject of their caption.
        clean_loss: Loss on held-out pairs, weighted as in training.
        flagged_planted: The share of judged presentations of planted pairs that were over the threshold; None without a filter.
        flagged_fresh: The same, of fresh pairs.
        out_planted: The share of all presentations of planted pairs that were left out of the loss, by their own magnitude or by memory.
        out_fresh: The same, of fresh pairs.
        list_auc: How well the order of the filter's report puts planted pairs before fresh ones.
        list_top: The share of planted pairs among as many first rows of the report as there are planted pairs.
        excess_auc: How well the mean of magnitude / threshold puts planted pairs first.
    """

    similarity: float
    copies: float
    magnitude: float
    clean_magnitude: float
    detection_auc: float
    agreement: float
    clean_loss: float
    flagged_planted: float | None = None
    flagged_fresh: float | None = None
    out_planted: float | None = None
    out_fresh: float | None = None
    list_auc: float | None = None
    list_top: float | None = None
    excess_auc: float | None = None


@torch.no_grad()
def judge(model: Model, unet: nn.Module, data: Data) -> Judgment:
    """Make pictures with the fine-tuned denoiser, and look at them."""
    recipe = data.recipe
    unet.eval()
    planted = [pair for pair in data.planted for _ in range(recipe.pictures)]
    pictures, scores = _pictures(model, unet, [*planted, *data.held_out], seed=1000 * data.seed, steps=recipe.sampling_steps)
    similarity = copy_similarity(pictures[: len(planted)], to_pixels([draw(pair.scene) for pair in planted]))
    own, clean = scores[: len(planted)], scores[len(planted) :]
    subjects = load_reader()(pictures[len(planted) :]).subjects()
    right = [subject == pair.caption.subject for subject, pair in zip(subjects, data.held_out, strict=True)]
    return Judgment(
        similarity=float(similarity.mean()),
        copies=float((similarity >= COPY_THRESHOLD).float().mean()),
        magnitude=float(own.mean()),
        clean_magnitude=float(clean.mean()),
        detection_auc=roc_auc(own.reshape(recipe.planted, -1).mean(1), clean),
        agreement=float(np.mean(right)),
        clean_loss=_clean_loss(model, unet, data),
    )


def _pictures(model: Model, unet: nn.Module, pairs: list[Pair], *, seed: int, steps: int) -> tuple[Tensor, np.ndarray]:
    """Pictures ``(n, 3, 32, 32)`` in -1..1, and the magnitude of each at the first evaluation."""
    pipeline = model.pipeline
    own, pipeline.unet = pipeline.unet, unet
    found, scores = [], []
    try:
        for start in range(0, len(pairs), 32):
            part = pairs[start : start + 32]
            generators = [torch.Generator().manual_seed(seed + start + number) for number in range(len(part))]
            with watch(pipeline) as trace:
                images = pipeline(
                    [str(pair.caption) for pair in part],
                    num_inference_steps=steps,
                    guidance_scale=GUIDANCE_SCALE,
                    generator=generators,
                    output_type="pt",
                ).images
            found.append(2 * images - 1)
            scores.append(trace.magnitudes[0])
    finally:
        pipeline.unet = own
    return torch.cat(found), np.concatenate(scores)


def _clean_loss(model: Model, unet: nn.Module, data: Data) -> float:
    captions = [str(pair.caption) for pair in data.held_out]
    draws = [noised(model, data.held_out, captions, seed=(3, data.seed, number), dropout=0.0).losses(unet) for number in range(_NOISES)]
    return float(torch.cat(draws).mean())


def list_figures(report: FilterReport, shown_planted: int, shown_fresh: int) -> dict[str, float]:
    """What a filter's report says about planted and fresh pairs, of which so many presentations were shown."""
    planted = [row for row in report.rows if _is_planted(row)]
    fresh = [row for row in report.rows if not _is_planted(row)]
    places = {row.key: -float(place) for place, row in enumerate(report.rows)}

    def flagged(rows: list[KeyCount]) -> float:
        judged = sum(row.judged for row in rows)
        return sum(row.dropped for row in rows) / judged if judged else 0.0

    def out(rows: list[KeyCount], shown: int) -> float:
        return sum(row.dropped + row.remembered for row in rows) / shown if shown else 0.0

    figures = {
        "flagged_planted": flagged(planted), "flagged_fresh": flagged(fresh),
        "out_planted": out(planted, shown_planted), "out_fresh": out(fresh, shown_fresh),
    }  # fmt: skip
    if planted and fresh:
        figures["list_auc"] = roc_auc([places[row.key] for row in planted], [places[row.key] for row in fresh])
        figures["list_top"] = float(np.mean([_is_planted(row) for row in report.rows[: len(planted)]]))
        figures["excess_auc"] = roc_auc([row.excess for row in planted], [row.excess for row in fresh])
    return figures


def _is_planted(row: KeyCount) -> bool:
    return str(row.key).startswith("planted")
