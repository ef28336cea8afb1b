"""Mitigating some samples of one evaluation, as an answer that repairs the run."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from memhook.capture.intervention import Intervention
from memhook.capture.prediction import magnitude
from memhook.errors import ReplayError
from memhook.mitigation.embedding import OptimizedEmbedding, optimize_embedding

if TYPE_CHECKING:
    from memhook.capture.prediction import Evaluation


@dataclass(frozen=True)
class Settings:
    """How `optimize_embedding` is to run, and above which magnitude it has failed."""

    target: float
    tolerable: float
    lr: float = 0.05
    max_steps: int = 10
    fixed_tokens: int = 1


def mitigate_samples(evaluation: Evaluation, flagged: np.ndarray, settings: Settings) -> tuple[Intervention, OptimizedEmbedding]:
    """Optimize the flagged samples' embeddings at this evaluation; all other rows of the answer are as they were, to the bit.

    Args:
        evaluation: With its replay.
        flagged: ``(b,)`` bool, at least one.
        settings: Of the optimization.

    Returns:
        The answer for the whole batch, and the optimization of the flagged samples, in their order.

    Raises:
        ReplayError: The evaluation cannot be replayed, or has no unconditional prediction.
    """
    samples = torch.from_numpy(np.flatnonzero(flagged))
    part = evaluation.take(samples)
    replay, pred_uncond, embedding = part.replay, part.pred_uncond, part.embedding
    if replay is None or pred_uncond is None or embedding is None or evaluation.embedding is None:
        raise ReplayError(
            "the evaluation at which the guard decided has no unconditional prediction or no text embedding, so it cannot be mitigated; "
            'use action="stop", or say where the embedding stands (memhook.ModuleAdapter(embedding=...))'
        )
    predictions: list[Tensor] = []  # the last one: that of the final embeddings

    def objective(embedding: Tensor) -> Tensor:
        """`Evaluation.objective`, whose prediction is wanted too."""
        predicted = replay(embedding)
        predictions[:] = [predicted.detach()]
        return magnitude(predicted, pred_uncond.to(predicted.device))

    optimized = optimize_embedding(
        objective, embedding, target=settings.target, lr=settings.lr, max_steps=settings.max_steps, fixed_tokens=settings.fixed_tokens
    )
    failed = optimized.after > settings.tolerable
    if failed.any():
        warnings.warn(
            f"the samples {samples[torch.from_numpy(failed)].tolist()} did not come down to the magnitude {settings.tolerable:.3g} in "
            f"{settings.max_steps} updates: they are at {optimized.after.max():.3g} at most. Raise max_steps or the target, or stop such runs",
            stacklevel=2,
        )
    pred_cond = _with_rows(evaluation.pred_cond, samples, predictions[0])
    return Intervention(pred_cond, _with_rows(evaluation.embedding, samples, optimized.embedding)), optimized


def _with_rows(whole: Tensor, samples: Tensor, rows: Tensor) -> Tensor:
    changed = whole.clone()
    changed[samples] = rows.to(changed)
    return changed
