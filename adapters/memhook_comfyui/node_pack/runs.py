"""The runs that were watched, found again by the latent that they made.

A report has to be of the run that made the picture in question, and nodes are cached: with two samplers in a workflow, after a new seed, or
when only the report itself runs again, neither the order of runs nor the model says which one that was. The latent's own bits do.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memhook.adapting.tensors import row_hash
from memhook.errors import MemhookError

if TYPE_CHECKING:
    from memhook.capture.trace import Trace

_Key = tuple[tuple[int, ...], int]
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # into which ComfyUI may convert what a sampler returned


@dataclass(frozen=True, eq=False)
class WatchedRun:
    """What was recorded of a run: numbers, and what a guard did."""

    trace: Trace
    notes: tuple[str, ...] = ()


class Runs:
    """The latest runs; numbers only, a few kilobytes each.

    Args:
        most: How many are kept.
    """

    def __init__(self, most: int = 256) -> None:
        self._found: OrderedDict[_Key, WatchedRun] = OrderedDict()
        self._most = most * len(_DTYPES)

    def add(self, latent: Tensor, trace: Trace, *notes: str) -> None:
        """Keep a run, with the notes that it has already: a guard inside a watch sees the same one."""
        for dtype in _DTYPES:
            key = _key(latent.to(dtype))
            earlier = self._found.pop(key, None)
            self._found[key] = WatchedRun(trace, (*(earlier.notes if earlier is not None and not notes else ()), *notes))
        while len(self._found) > self._most:
            self._found.popitem(last=False)

    def find(self, latent: Tensor) -> WatchedRun:
        """The run that made this latent.

        Raises:
            MemhookError: None of them did.
        """
        found = self._found.get(_key(latent))
        if found is None:
            raise MemhookError(
                "this latent was not made by a sampler with a watched model, or too long ago. Put Memhook Watch between the model and the "
                "sampler, connect the sampler's own LATENT output here, and run the sampler again (with another seed, if it is cached)"
            )
        return found


def _key(latent: Tensor) -> _Key:
    return tuple(latent.shape), int(row_hash(latent.reshape(1, -1)))


RUNS = Runs()
