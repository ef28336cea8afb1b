"""Replays for pipelines, whose text comes in many forms."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from memhook.adapting.replay import CallRecord, Path, look_up
from memhook.adapting.tensors import leaves, map_tensors
from memhook.adapting.whole_batch import ReplayFunction, RowsOrWhole
from memhook.errors import ReplayError
from memhook_diffusers.text import find_sample, is_per_row, read_text, write_text

if TYPE_CHECKING:
    from torch import Tensor

    from memhook.adapting.pairs import Prediction

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

        if isinstance(value, list) and (value is find_sample(self.args, self.kwargs) or is_per_row(value, self.batch)):
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
        return _refusal(_why_not(cond.call, cond.path, name))
    call, path = cond.call, cond.path
    return RowsOrWhole(replay, cond, lambda: read_text(look_up(call.args, call.kwargs, path), slice(0, call.batch), call.batch))


def _why_not(call: CallRecord, path: Path | None, name: str) -> str:
    given = look_up(call.args, call.kwargs, path) if path is not None else None
    if isinstance(given, (list, tuple)):
        lengths = ", ".join(str(len(item)) for item in given)
        return (
            f"{name} gave its denoiser text embeddings of different lengths in one call ({lengths}), so there is no one tensor (b, l, d) to "
            "replace; run one prompt at a time"
        )
    seen = [f"{'.'.join(map(str, place))} {tuple(tensor.shape)} {str(tensor.dtype)[6:]}" for place, tensor in leaves(call.args, call.kwargs)]
    return (
        f"none of what {name} gave its denoiser is a text embedding (b, l, d), so there is nothing to replace: it was given {', '.join(seen)}. "
        "Numbers are right all the same; to attribute or optimize, use a pipeline whose denoiser takes the text"
    )


def _refusal(reason: str) -> ReplayFunction:
    def refuse(_: Tensor) -> Tensor:
        raise ReplayError(reason)

    return refuse
