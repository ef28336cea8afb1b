"""Replaying the conditional rows of an evaluation, whichever calls they were in, in noise space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memhook.adapting.pairs import read_output
from memhook.adapting.replay import Replay
from memhook.adapting.tensors import copy_of
from memhook.errors import ReplayError

if TYPE_CHECKING:
    from memhook_kdiffusion.calls import Call
    from memhook_kdiffusion.space import Combined


@dataclass(frozen=True, eq=False)
class Text:
    """The conditional embeddings of an evaluation, ``(b, k, l, d)``: ``k`` prompts a sample, zeros where a sample has fewer."""

    rows: Tensor

    @property
    def embedding(self) -> Tensor:
        """``(b, k l, d)``: a sample's prompts one after the other."""
        return self.rows.flatten(1, 2)


def read_text(calls: Sequence[Call], cond: Tensor, weights: Tensor) -> Text | None:
    """The embeddings of the conditional rows; None where there are none of one length."""
    texts = [call.text for call, places in _by_call(calls, cond, weights) if len(places)]
    if not texts or any(text is None or text.ndim != 3 or not text.is_floating_point() or text.shape[1:] != texts[0].shape[1:] for text in texts):  # type: ignore[union-attr]
        return None
    first = texts[0]
    assert first is not None  # noqa: S101 -- for the type checker
    rows = copy_of(first).new_zeros(*weights.shape, *first.shape[1:])
    for call, places in _by_call(calls, cond, weights):
        for sample, part, row in places:
            if call.text is not None:
                rows[sample, part] = call.text[row]
    return Text(rows)


def _by_call(calls: Sequence[Call], cond: Tensor, weights: Tensor) -> list[tuple[Call, list[tuple[int, int, int]]]]:
    """For each call ``(sample, prompt, row of the call)`` of its conditional rows."""
    found, start = [], 0
    numbers = cond.tolist()
    for call in calls:
        places = [
            (sample, part, row - start)
            for sample, rows in enumerate(numbers)
            for part, row in enumerate(rows)
            if start <= row < start + call.rows and weights[sample, part] != 0
        ]
        found.append((call, places))
        start += call.rows
    return found


def make_replay(calls: Sequence[Call], cond: Tensor, text: Text, combined: Combined) -> DenoiserReplay | None:
    """A replay of the conditional rows; None where the calls were not kept.

    Args:
        calls: With their records.
        cond: ``(b, k)``: the conditional rows, through all calls.
        text: Their embeddings.
        combined: How they become the evaluation's prediction.
    """
    pieces = []
    for call, places in _by_call(calls, cond, combined.weights):
        if not places:
            continue
        if call.record is None or call.path is None or call.text is None:
            return None
        with torch.inference_mode(mode=False):  # an index is kept for the backward pass
            rows = torch.tensor([row for _, _, row in places])
            at = torch.tensor([(sample, part) for sample, part, _ in places])
        own = rows.to(call.denoised.device)
        embedding, expected = copy_of(call.text[own]), copy_of(call.denoised[own])
        pieces.append((Replay(call.record, rows=rows, path=call.path, embedding=embedding, expected=expected, read=read_output), at))
    return DenoiserReplay(pieces, tuple(text.rows.shape), combined.detached())


class DenoiserReplay:
    """``replay(embedding (b, k l, d)) -> pred_cond``: runs the conditional rows again and combines them as the wrapper does."""

    def __init__(self, pieces: Sequence[tuple[Replay, Tensor]], shape: tuple[int, ...], combined: Combined) -> None:
        self._pieces, self._shape, self._combined = pieces, shape, combined

    def __call__(self, embedding: Tensor) -> Tensor:
        samples, parts, length, width = self._shape
        if embedding.shape != (samples, parts * length, width):
            raise ReplayError(f"the embedding has shape {tuple(embedding.shape)}; the captured call took {(samples, parts * length, width)}")
        with torch.inference_mode(mode=False), torch.enable_grad():
            rows = embedding.reshape(self._shape)
            denoised: Tensor | None = None
            for replay, places in self._pieces:
                at = tuple(places.to(rows.device).unbind(1))
                found = replay(rows[at])
                whole = found.new_zeros(samples, parts, *found.shape[1:]) if denoised is None else denoised
                denoised = whole.index_put(at, found)
            if denoised is None:
                raise ReplayError("no conditional row was found in the captured calls, so there is nothing to replay")
            return self._combined.pred_cond(denoised)

    def take(self, samples: Tensor) -> DenoiserReplay:
        """The same replay for some of its samples, ``(k,)`` int64; those alone are run."""
        numbers = {int(sample): place for place, sample in enumerate(samples)}
        pieces = []
        for replay, places in self._pieces:
            mine = [index for index, (sample, _) in enumerate(places.tolist()) if sample in numbers]
            if mine:
                with torch.inference_mode(mode=False):
                    own = torch.tensor(mine)
                    moved = torch.tensor([(numbers[sample], part) for sample, part in places[own].tolist()])
                pieces.append((replay.take(own), moved))
        return DenoiserReplay(pieces, (len(samples), *self._shape[1:]), self._combined.take(samples))
