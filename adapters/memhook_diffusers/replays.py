"""Replays for pipelines: the conditional rows alone where that works, the whole batch where the model needs it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memhook.errors import ReplayError
from memhook.replay import CallRecord, Path, Replay, look_up
from memhook.tensors import map_tensors
from memhook_diffusers.text import read_text, write_text

if TYPE_CHECKING:
    from memhook.pairs import Prediction

_PER_FRAME = ("residual", "control")  # inputs with several rows a sample, beside the embedding


class PipelineCall(CallRecord):
    """A captured call whose text may come in other forms than one tensor ``(batch, l, d)``."""

    def again(self, rows: slice | Tensor, path: Path, embedding: Tensor) -> Any:
        """Call the module with these rows of the batch and another embedding ``(b, l, d)``, and give its output."""
        part = copy.copy(self)
        part.args = tuple(self._rows(str(index), value, rows) for index, value in enumerate(self.args))
        part.kwargs = {name: self._rows(name, value, rows) for name, value in self.kwargs.items()}
        part.batch = -1  # nothing left to cut
        return CallRecord.again(part, slice(None), path, write_text(look_up(self.args, self.kwargs, path), embedding, self.batch))

    def _rows(self, name: str, value: Any, rows: slice | Tensor) -> Any:
        def cut(tensor: Tensor) -> Tensor:
            count = len(tensor) // self.batch if tensor.ndim and len(tensor) % self.batch == 0 else 0
            if count == 1:
                return tensor[rows]
            if count > 1 and any(word in name for word in _PER_FRAME):
                return tensor.reshape(self.batch, count, *tensor.shape[1:])[rows].flatten(0, 1)
            return tensor

        if isinstance(value, list) and len(value) == self.batch and all(isinstance(item, Tensor) for item in value):  # a tensor per row
            return value[rows] if isinstance(rows, slice) else [value[int(row)] for row in rows]
        return map_tensors(value, cut)


ReplayFunction = Callable[[Tensor], Tensor]


def make_replay(replay: ReplayFunction | None, cond: Prediction, name: str) -> ReplayFunction | None:
    """The best replay of a captured call; one that says why, where there can be none.

    Args:
        replay: The conditional rows alone, if the embedding was found.
        cond: The conditional prediction.
        name: The pipeline's.
    """
    if cond.call is None:
        return replay
    if replay is None or cond.path is None:
        found = ", ".join(_text_like(cond.call)) or "none"
        return _refusal(
            f"{name}'s text does not reach its denoiser as an embedding of one length for all samples, so it cannot be replaced. Run one prompt "
            f"at a time if their lengths differ; floating-point inputs: {found}"
        )
    return _Rows(replay, cond, cond.call, cond.path)


def _text_like(call: CallRecord) -> list[str]:
    named = {**{str(index): value for index, value in enumerate(call.args)}, **call.kwargs}
    return [f"{key} {tuple(value.shape)}" for key, value in named.items() if isinstance(value, Tensor) and value.is_floating_point()]


def _refusal(reason: str) -> ReplayFunction:
    def refuse(_: Tensor) -> Tensor:
        raise ReplayError(reason)

    return refuse


class _Rows:
    """Replays conditional rows alone; models whose layers look at the whole guided batch (perturbed attention) get it whole."""

    def __init__(self, rows: ReplayFunction, cond: Prediction, call: CallRecord, path: Path) -> None:
        self._rows, self._cond, self._call, self._path = rows, cond, call, path
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

    def _whole(self, embedding: Tensor) -> Tensor:
        call, cond, rows = self._call, self._cond, self._cond.rows
        whole = read_text(look_up(call.args, call.kwargs, self._path), slice(0, call.batch), call.batch)
        if whole is None:
            raise ReplayError("the text embeddings of the batch differ in length")
        replay = Replay(call, rows=slice(0, call.batch), path=self._path, embedding=whole, expected=cond.values, read=self._read, checked=[])
        return replay(torch.cat([whole[: rows.start], embedding.to(whole), whole[rows.stop :]]))

    def _read(self, output: object) -> Tensor:
        return self._cond.read(output)[self._cond.rows]
