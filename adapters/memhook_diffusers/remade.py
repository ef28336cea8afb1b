"""What a step predicts besides the conditional prediction from the same text, made anew with another embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memhook.adapting.replay import Replay, look_up
from memhook_diffusers.outputs import raw_output
from memhook_diffusers.text import read_text

if TYPE_CHECKING:
    from memhook_diffusers.ways import Cut


@torch.no_grad()
def remade(way: Cut, cond: int, embedding: Tensor, *, also: bool) -> dict[int, Tensor]:
    """Raw outputs ``(b, ...)`` of the predictions that had the text of the conditional one, by their number, had it been ``embedding``.

    Perturbed attention and skipped layers predict from the prompt a second time; a learned variance is given on with the
    prediction of the prompt. Each call is made again whole: such layers look at their place in the batch.

    Args:
        way: The calls of the step.
        cond: The conditional prediction.
        embedding: ``(b, l, d)``, the new text.
        also: Whether the conditional one itself is wanted, for the variance that it has.

    Raises:
        ReplayError: A call cannot be made again.
    """
    predictions = [prediction for *_, found in way for prediction in found]
    text, number = predictions[cond].embedding, 0
    result: dict[int, Tensor] = {}
    for call, _, _, found in way:
        wanted = [index for index in range(len(found)) if (also or number + index != cond) and _same(found[index].embedding, text)]
        path, record, values = found[0].path, call.record, raw_output(call.output)
        if wanted and path is not None and record is not None and values is not None and text is not None:
            whole = read_text(look_up(record.args, record.kwargs, path), slice(0, record.batch), record.batch)
            if whole is not None:
                changed = whole.clone()
                for index in wanted:
                    changed[found[index].rows] = embedding.to(whole)
                replay = Replay(record, rows=slice(0, record.batch), path=path, embedding=whole, expected=values, read=_raw)
                made = replay(changed).detach()
                result |= {number + index: made[found[index].rows] for index in wanted}
        number += len(found)
    return result


def new_variance(given: Tensor, old: Tensor, new: Tensor | None, moved: Tensor) -> Tensor | None:
    """The variance that the scheduler is to be given; None where it cannot be told what it is made of.

    Args:
        given: ``(b, v, ...)``, what it was to be given.
        old: That of the conditional prediction.
        new: The same, made anew; None where it was not.
        moved: ``(b,)`` bool: the samples that change.
    """
    if new is None or given.shape != old.shape or not torch.equal(given[moved], old[moved].to(given)):
        return None
    rows = moved.reshape(-1, *(1 for _ in given.shape[1:]))
    return torch.where(rows, new.to(given), given)


def _raw(output: object) -> Tensor:
    values = raw_output(output)
    if values is None:
        raise TypeError("the denoiser returned something else than in the captured call")
    return values


def _same(embedding: Tensor | None, text: Tensor | None) -> bool:
    return embedding is not None and text is not None and embedding.shape == text.shape and torch.equal(embedding, text)
