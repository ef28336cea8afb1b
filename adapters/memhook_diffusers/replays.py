"""Replays for pipelines, whose text comes in many forms."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import Tensor

from memhook.errors import ReplayError
from memhook.replay import CallRecord, Path, look_up
from memhook.tensors import map_tensors
from memhook.whole_batch import ReplayFunction, RowsOrWhole
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
    call, path = cond.call, cond.path
    return RowsOrWhole(replay, cond, lambda: read_text(look_up(call.args, call.kwargs, path), slice(0, call.batch), call.batch))


def _text_like(call: CallRecord) -> list[str]:
    named = {**{str(index): value for index, value in enumerate(call.args)}, **call.kwargs}
    return [f"{key} {tuple(value.shape)}" for key, value in named.items() if isinstance(value, Tensor) and value.is_floating_point()]


def _refusal(reason: str) -> ReplayFunction:
    def refuse(_: Tensor) -> Tensor:
        raise ReplayError(reason)

    return refuse
