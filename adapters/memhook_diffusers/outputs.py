"""Reading a denoiser's output as predictions of the form that the scheduler is given."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from memhook.adapting.pairs import Prediction

Form = Literal["same", "frames_moved", "unknown"]
"""How the elements of a sample stand in what the scheduler is given: in the same order, with the frame axis moved, or not known."""


@dataclass(frozen=True)
class Reader:
    """One way to read an output as ``(n b, ...)``: ``n`` predictions of ``b`` samples.

    Attributes:
        samples: The samples ``b``.
        axis: The axis that holds more than the prediction (learned variance, tokens of a reference image); 0 for none.
        start: Where on that axis the prediction starts,
        stop: and ends.
        form: How a prediction relates to what the scheduler is given.
    """

    samples: int
    axis: int = 0
    start: int = 0
    stop: int = 0
    form: Form = "same"

    @property
    def doubt(self) -> int:
        """How far the output's shape is from what the scheduler is given: exact, a part of it, or in another order."""
        return 2 if self.form == "unknown" else int(self.axis > 0)

    def __call__(self, output: Any) -> Tensor:
        values = raw_output(output)
        if values is None:
            raise TypeError("the denoiser returned something else than in the captured call")
        return self.part(values)

    def part(self, values: Tensor) -> Tensor:
        """The prediction in a raw output, or in some rows of it."""
        return values if self.axis == 0 else values.narrow(self.axis, self.start, self.stop - self.start)

    def flat(self, prediction: Tensor) -> Tensor:
        """A prediction ``(b, ...)`` with its elements in the scheduler's order, ``(b, elements)``."""
        return (prediction.transpose(1, 2) if self.form == "frames_moved" else prediction).flatten(1)


def raw_output(output: Any) -> Tensor | None:
    """The prediction in an output: a tensor, ``.sample``, the first of a tuple, or a list with a tensor per sample; else None."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping) or hasattr(output, "sample"):
        value = output.get("sample") if isinstance(output, Mapping) else output.sample
        if value is None and isinstance(output, Mapping):  # other output classes: the first field
            value = next(iter(output.values()), None)
    elif isinstance(output, (tuple, list)) and output:
        value = output[0]
    else:
        return None
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, Tensor) and item.shape == value[0].shape for item in value):
        return torch.stack(list(value))  # Z-Image
    return value if isinstance(value, Tensor) else None


def noisy_part(prediction: Prediction) -> Tensor | None:
    """The noisy sample without channels or tokens that hold an image, a mask, or text: where the output has the prediction."""
    sample, values, read = prediction.sample, prediction.values, prediction.read
    if sample is None or sample.ndim != values.ndim:
        return sample
    if isinstance(read, Reader) and read.axis and read.stop <= sample.shape[read.axis]:
        sample = sample.narrow(read.axis, read.start, read.stop - read.start)
    return sample[(slice(None), *(slice(0, size) for size in values.shape[1:]))]


def readers(output: Any, shape: tuple[int, ...]) -> list[Reader]:
    """The ways to read ``output`` if the scheduler is given ``shape``, the likeliest first; empty if it is no prediction."""
    if not _plausible(output, shape):
        return []
    values = raw_output(output)
    if values is None or values.ndim < 2 or not values.is_floating_point():
        return []
    seen, samples = tuple(values.shape), shape[0]
    if [size for size in seen[1:] if size > 1] == [size for size in shape[1:] if size > 1]:
        return [Reader(samples)] if seen[0] % samples == 0 else []
    if len(seen) == len(shape) and seen[0] % samples == 0:
        other = [axis for axis in range(1, len(shape)) if seen[axis] != shape[axis]]
        if len(other) == 1 and seen[other[0]] > shape[other[0]]:
            axis, size = other[0], shape[other[0]]
            first, last = Reader(samples, axis, 0, size), Reader(samples, axis, seen[axis] - size, seen[axis])
            learned_variance = len(shape) == 4 and axis == 1
            return [first] if learned_variance else [first, last]
    return _reordered(seen, shape)


def _reordered(seen: tuple[int, ...], shape: tuple[int, ...]) -> list[Reader]:
    count, rest = divmod(math.prod(seen), math.prod(shape))
    if rest or count == 0 or seen[0] % count:
        return []
    samples = seen[0] // count
    moved = (seen[2], seen[1], *seen[3:]) if len(seen) == 5 else None  # (b, c, f, h, w) stepped as (b f, c, h, w), or the other way
    if moved is not None and shape in ((samples, *moved), (samples * moved[0], *moved[1:])):
        return [Reader(samples, form="frames_moved")]
    return [Reader(samples, form="unknown")]


def _plausible(output: Any, shape: tuple[int, ...]) -> bool:
    """Spare the stacking of lists that cannot be predictions (a ControlNet's)."""
    value = output[0] if isinstance(output, (tuple, list)) and output else output
    if isinstance(value, (list, tuple)):
        return bool(value) and isinstance(value[0], Tensor) and value[0].numel() == math.prod(shape[1:])
    return True
