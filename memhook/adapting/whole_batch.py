"""Replays of the conditional rows alone where that works, and of the whole captured batch where the model needs it.

Perturbed attention, for one, is a layer that cuts the batch in three: it takes the conditional rows alone for something else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memhook.adapting.replay import Replay
from memhook.errors import ReplayError

if TYPE_CHECKING:
    from memhook.adapting.pairs import Prediction

ReplayFunction = Callable[[Tensor], Tensor]


class RowsOrWhole:
    """Which of the two it is shows at the first use: a replay of the rows that fails, or does not reproduce the captured ones.

    Args:
        rows: The replay of the conditional rows alone.
        cond: The conditional prediction, of a call that was kept and whose embedding was found.
        whole: The embedding of all rows of the call, ``(batch, l, d)``; None where they differ in length.
    """

    def __init__(self, rows: ReplayFunction, cond: Prediction, whole: Callable[[], Tensor | None]) -> None:
        self._rows, self._cond, self._embedding = rows, cond, whole
        self._chosen: ReplayFunction | None = None

    def __call__(self, embedding: Tensor) -> Tensor:
        if self._chosen is not None:
            return self._chosen(embedding)
        try:
            predicted = self._rows(embedding)
        except Exception as error:  # whatever a model raises when it is given another batch than it expects
            if tuple(embedding.shape) != tuple(self._cond.embedding.shape if self._cond.embedding is not None else ()):
                raise
            try:
                predicted = self._whole(embedding)
            except Exception as second:  # noqa: BLE001 -- the first error says more
                reason = f"the captured call could not be run again, neither its conditional rows ({error}) nor whole ({second})"
                raise ReplayError(reason) from error
            self._chosen = self._whole
            return predicted
        self._chosen = self._rows
        return predicted

    def take(self, samples: Tensor) -> ReplayFunction:
        """The same replay for some of its samples, ``(k,)`` int64, alone where the model allows it."""
        captured = self._cond.embedding
        take = getattr(self._rows, "take", None)
        alone: list[ReplayFunction] = [take(samples)] if take is not None and self._chosen != self._whole else []

        def taken(part: Tensor) -> Tensor:
            if alone:
                try:
                    return alone[0](part)
                except Exception:  # noqa: BLE001 -- the whole batch is tried, and says what is wrong
                    alone.clear()
            if captured is None:
                raise ReplayError("the captured call has no embedding")
            return self(captured.index_copy(0, samples.to(captured.device), part.to(captured)))[samples]

        return taken

    def reword(self, before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
        """The predictions for ``n`` other texts on every sample, text by text, ``(n b, ...)``; see `Replay.reword`."""
        captured, rows = self._cond.embedding, self._rows
        if captured is None or not isinstance(rows, Replay):
            raise ReplayError("the captured call has no embedding, so no other text can be tried on it")
        if self._chosen is None:
            self(captured.clone())
        if self._chosen is rows:
            return rows.reword(before, after)
        if rows.other_text(before, after):
            raise ReplayError(
                "this model needs its whole batch, and more of it than the embedding is made of the text; ask the host again: pass a function "
                "of texts instead of a trace"
            )
        return torch.cat([self(one.to(captured).expand_as(captured)) for one in after[0].unsqueeze(1)])

    def with_text(self, before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
        """The prediction with other tensors made of the text; see `Replay.with_text`."""
        captured, rows = self._cond.embedding, self._rows
        if captured is None or not isinstance(rows, Replay):
            raise ReplayError("the captured call has no embedding, so no other text can be tried on it")
        if self._chosen is None:
            self(captured.clone())
        if self._chosen is rows:
            return rows.with_text(before, after)
        if rows.other_text(before, after):
            raise ReplayError("this model needs its whole batch, and more of it than the embedding is made of the text")
        return self(after[0])

    def _whole(self, embedding: Tensor) -> Tensor:
        cond, call, whole = self._cond, self._cond.call, self._embedding()
        if whole is None or call is None or cond.path is None:
            raise ReplayError("the text embeddings of the batch differ in length")
        rows, everything = cond.rows, slice(0, call.batch)
        replay = Replay(call, rows=everything, path=cond.path, embedding=whole, expected=cond.values, read=self._read)
        return replay(torch.cat([whole[: rows.start], embedding.to(whole), whole[rows.stop :]]))

    def _read(self, output: object) -> Tensor:
        return self._cond.read(output)[self._cond.rows]
