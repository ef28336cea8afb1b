"""Calls of a denoiser, cut into predictions, with fingerprints of what each prediction was made from."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from memhook.adapting.pairs import Prediction
from memhook.adapting.replay import CallRecord, Path, look_up
from memhook.adapting.tensors import copy_of, leaves, row_hash, version
from memhook.capture.texts import Text
from memhook_diffusers.outputs import Reader, noisy_part, raw_output
from memhook_diffusers.replays import PipelineCall
from memhook_diffusers.text import find_sample, find_text, read_text, row_of

if TYPE_CHECKING:
    from collections.abc import Sequence

_TIMES = ("timestep", "timesteps", "t", "sigma", "timestep_ratio", "r")


@dataclass(eq=False)
class Call:
    """One call of a module, as it was made."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    record: CallRecord | None  # where replay was asked for
    source: Tensor  # the output tensor that the host has
    version: int | None  # of that tensor, to notice changes in place
    clocks: tuple[Any, ...] = ()  # the schedulers' timesteps at the time, to notice calls of a run that broke off

    @property
    def changed(self) -> bool:
        """Whether the host has changed the output in place since."""
        return self.record is None and version(self.source) != self.version


def make_call(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, *, keep: bool, clocks: tuple[Any, ...] = ()
) -> Call | None:
    """Note a call; None if its output cannot be a prediction. With ``keep``, tensors are copied, since hosts change theirs in place."""
    values = _first_tensor(output)
    if values is None:
        return None
    whole = raw_output(output) if keep else None  # of a list with a tensor for each row, `values` is the first row alone
    rows = values if whole is None else whole
    record = PipelineCall(module, args, kwargs, batch=rows.shape[0], device=values.device) if keep and rows.ndim else None
    if record is not None:
        args, kwargs, output = record.args, record.kwargs, _with_copy(output)
    return Call(module, args, kwargs, output, record, values, version(values), clocks)


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], (tuple, list)):
        return output[0][0] if output[0] and isinstance(output[0][0], Tensor) else None
    value = output if isinstance(output, Tensor) or not hasattr(output, "sample") else output.sample
    if isinstance(value, (tuple, list)):
        return value[0] if value and isinstance(value[0], Tensor) else None
    return value if isinstance(value, Tensor) else raw_output(output)


def _with_copy(output: Any) -> Any:
    values = raw_output(output)
    return (copy_of(values),) if values is not None else output


class Conditioning:
    """Fingerprints of conditioning, which are taken again only when the host passes another tensor."""

    def __init__(self) -> None:
        self._last: dict[Path, tuple[Tensor, tuple[Any, ...], tuple[Tensor, Text]]] = {}

    def of(self, embedding: Tensor, path: Path) -> tuple[Tensor, Text]:
        """``(batch,)`` int64, and a few numbers of each text."""
        state = (embedding.data_ptr(), embedding.shape, embedding.stride(), version(embedding))
        seen = self._last.get(path)
        if seen is not None and seen[1] == state and state[-1] is not None:
            return seen[2]
        found = row_hash(embedding), Text.of(embedding)
        self._last[path] = embedding, state, found  # the tensor too: memory that is held is not given to another
        return found


def cut(call: Call, reader: Reader, values: Tensor) -> list[Prediction]:
    """The predictions in a call, in order; ``values`` is what ``reader`` read."""
    batch = values.shape[0]
    path, sample = find_text(call.args, call.kwargs, batch), find_sample(call.args, call.kwargs)
    embedding = look_up(call.args, call.kwargs, path) if path is not None else None
    found = []
    for start in range(0, batch, reader.samples):
        rows = slice(start, start + reader.samples)
        text = None if embedding is None else read_text(embedding, rows, batch)
        text = None if text is None else text.detach()
        found.append(Prediction(values[rows], _rows(sample, rows, batch), text, path, rows, call.record, reader))
    return found


def _rows(sample: Any, rows: slice, batch: int) -> Tensor | None:
    if isinstance(sample, list):
        alike = len(sample) == batch and all(isinstance(item, Tensor) and item.shape == sample[0].shape for item in sample)
        return torch.stack(sample[rows]).detach() if alike else None
    return sample[rows].detach() if isinstance(sample, Tensor) and sample.ndim and sample.shape[0] == batch else None


@torch.no_grad()
def input_hashes(call: Call, batch: int, *, alone: bool) -> Tensor:
    """``(batch,)`` int64 fingerprints of everything that each row was made from but the noisy sample and the time.

    Where it cannot be told which rows an input belongs to, every row gets a fingerprint of its own: nothing is known to be repeated.

    Args:
        call: The call.
        batch: Its rows.
        alone: All rows are one prediction, so inputs without rows are its own as well.
    """
    sample = find_sample(call.args, call.kwargs)
    of_sample = {id(item) for item in sample} if isinstance(sample, list) else {id(sample)}
    values = _first_tensor(call.output)
    total = torch.zeros(batch, dtype=torch.int64, device=values.device if values is not None else None)
    known = alone
    for path, leaf in leaves(call.args, call.kwargs):
        if id(leaf) in of_sample or path[0] in _TIMES or path == (1,) or leaf.numel() == 0 or leaf.ndim == 0:
            continue
        if not alone and _positions(path, leaf, batch):
            continue
        listed, place = row_of(call.args, call.kwargs, path, batch)
        factor = zlib.crc32(repr(place).encode()) | 1
        if listed is not None:  # one tensor per row
            total[listed] += row_hash(leaf[None])[0].to(total.device) * factor
            known = True
        elif leaf.shape[0] % batch == 0:  # several rows a sample: the frames of a video
            total += row_hash(leaf.reshape(batch, -1)).to(total.device) * factor
            known = True
        elif leaf.ndim == 1 or not leaf.is_floating_point() or alone:
            total += row_hash(leaf[None])[0].to(total.device) * factor
        else:
            known = False
            break
    return total if known else torch.arange(1, batch + 1, device=total.device) * 7046029254386353131


def _positions(path: Path, leaf: Tensor, batch: int) -> bool:
    """Whether an argument, by its name, holds positions, which belong to no row; token ids do, and there is a row of them for each."""
    if leaf.ndim == 2 and leaf.shape[0] == batch and not leaf.is_floating_point():
        return False
    return any(word in str(key) for key in path for word in ("rotary", "ids", "coords", "freqs", "shapes"))


def sample_hashes(predictions: Sequence[Prediction], *, whole: bool) -> Tensor:
    """``(n, b)`` int64 fingerprints of the noisy samples; unless ``whole``, without channels that hold an image or mask."""
    return torch.stack([_sample_hash(prediction, whole=whole) for prediction in predictions])


def _sample_hash(prediction: Prediction, *, whole: bool) -> Tensor:
    values, part = prediction.values, prediction.sample if whole else noisy_part(prediction)
    if part is None:
        return torch.zeros(values.shape[0], dtype=torch.int64, device=values.device)
    return row_hash(torch.nan_to_num(part) if part.is_floating_point() else part)
