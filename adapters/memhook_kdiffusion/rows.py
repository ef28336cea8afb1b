"""The numbers of one evaluation of a CFG wrapper, left on the device until somebody asks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memhook.adapting.tensors import row_hash
from memhook.capture.texts import Text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from memhook_kdiffusion.calls import Call
    from memhook_kdiffusion.matching import Pairing


class Doubts:
    """What could not be told on the device, fetched for all evaluations at once when somebody asks."""

    def __init__(self) -> None:
        self._waiting: list[Tensor] = []
        self._read: list[list[bool]] = []

    def add(self, pairing: Pairing) -> int:
        """Keep what a pairing leaves open; gives the number to ask for it by."""
        self._waiting.append(torch.cat([pairing.doubts, pairing.guided]))
        return len(self._read) + len(self._waiting) - 1

    def __getitem__(self, number: int) -> tuple[list[bool], list[bool]]:
        if self._waiting:
            sizes = [len(flags) for flags in self._waiting]
            values = torch.split(torch.cat(self._waiting).cpu(), sizes)
            self._read += [flags.tolist() for flags in values]
            self._waiting = []
        flags = self._read[number]
        return flags[:4], flags[4:]


def rows_of(changed: Tensor, again: Any, output: Any) -> Any:
    """The second output, with the first one's rows for samples that did not change, to the bit."""
    if not isinstance(again, Tensor) or not isinstance(output, Tensor) or again.shape != output.shape or len(output) != len(changed):
        return again
    return torch.where(changed.reshape(-1, *[1] * (output.ndim - 1)), again, output)


def same_inputs(calls: Sequence[Call], pairing: Pairing) -> Tensor | None:
    """``(b,)`` bool: both predictions were made from one noisy sample."""
    channels = min(call.denoised.shape[1] for call in calls)
    hashes = torch.cat([row_hash(call.x[:, :channels]) for call in calls])
    return hashes[pairing.cond[:, 0]] == hashes[pairing.uncond]


def fingerprints(calls: Sequence[Call], pairing: Pairing) -> Tensor | None:
    """``(2, b)`` int64 of the conditional and the unconditional conditioning."""
    texts = [call.text for call in calls]
    if any(text is None for text in texts):
        return None
    hashes = torch.cat([row_hash(text) for text in texts if text is not None])
    places = torch.arange(1, pairing.cond.shape[1] + 1, device=hashes.device) * pairing.weights.to(hashes.device).ne(0)
    return torch.stack([(hashes[pairing.cond] * places).sum(1), hashes[pairing.uncond]])


def unconditional_text(calls: Sequence[Call], pairing: Pairing) -> Text | None:
    """A few numbers of the unconditional conditioning; None where it is no text."""
    texts = [call.text for call in calls]
    if any(text is None or text.ndim != 3 or not text.is_floating_point() for text in texts):
        return None
    found = [Text.of(text) for text in texts if text is not None]
    tokens = min(text.tokens for text in found)  # calls may differ in length; the parts that all have are compared
    numbers = zip(*(text.up_to(tokens).numbers for text in found), strict=True)
    return Text(tokens, found[0].dtype, tuple(torch.cat(parts)[pairing.uncond] for parts in numbers))
