"""Which row of an evaluation is which prediction of which sample, decided on the device by what the rows were made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memhook.adapting.tensors import row_hash

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from memhook.adapting.replay import Path
    from memhook_kdiffusion.calls import Call
    from memhook_kdiffusion.conditioning import Part


@dataclass(frozen=True, eq=False)
class Pairing:
    """The rows of an evaluation, numbered through all of its calls, that are a sample's predictions.

    Attributes:
        cond: ``(b, k)`` int64: the row of each of a sample's prompts.
        uncond: ``(b,)`` int64.
        weights: ``(b, k)``, on the CPU: of each prompt; 0 where a sample has fewer.
        guided: ``(b,)`` bool: whether there is an unconditional prediction.
        doubts: ``(4,)`` bool, see `doubt`.
    """

    cond: Tensor
    uncond: Tensor
    weights: Tensor
    guided: Tensor
    doubts: Tensor


_DOUBTS = (
    "not every sample's conditional rows were found",
    "rows with another conditioning than those in the wrapper's arguments",
    "rows with another noisy sample or noise level than the wrapper was given",
    "unconditional rows that differ in something else than the text, so it is not clear which one belongs to the conditional prediction",
)


def doubt(doubts: Sequence[bool], guided: Sequence[bool]) -> str | None:
    """Why a pairing cannot be trusted, as a part of a sentence; None where it can.

    Rows that cannot be told do not matter where every prediction was found (perturbed attention and the like call again).
    """
    cond, text, sample, unclear = doubts
    if unclear:
        return _DOUBTS[3]
    if not cond and all(guided):
        return None
    reasons = [reason for reason, found in zip(_DOUBTS[1:3], (text, sample), strict=True) if found]
    if not cond and not reasons:
        return None
    return " and ".join(reasons) if reasons else _DOUBTS[0]


def find_by(parts: Sequence[Part]) -> Callable[[Mapping[Path, Tensor]], Path | None]:
    """A finder, for `read_call`, of the input that could be one of these conditionings."""
    candidates = [candidate for part in parts for candidate in part.candidates]

    def find(inputs: Mapping[Path, Tensor]) -> Path | None:
        return next((path for path, tensor in inputs.items() if any(_comparable(tensor, candidate) for candidate in candidates)), None)

    return find


def _comparable(tensor: Tensor, candidate: Tensor) -> bool:
    """Whether rows of ``tensor`` have the form of ``candidate``, up to the number of tokens."""
    if tensor.ndim != candidate.ndim + 1 or tensor.is_floating_point() != candidate.is_floating_point():
        return False
    return tensor.shape[2:] == candidate.shape[1:] if candidate.ndim == 2 else tensor.shape[1:] == candidate.shape


@torch.no_grad()
def match(calls: Sequence[Call], cond: Sequence[Sequence[Part]], uncond: Sequence[Part], x: Tensor, sigma: Tensor) -> Pairing:
    """Find each sample's rows by their conditioning, noisy sample and noise level; nothing waits for the device.

    Args:
        calls: All calls of the denoiser in one call of the wrapper.
        cond: Each sample's prompts.
        uncond: Each sample's unconditional conditioning; empty where the wrapper was given none.
        x: What the wrapper was given, ``(b, channels, ...)``.
        sigma: Its noise levels, ``(b,)``.
    """
    slots = [part for parts in cond for part in parts] + list(uncond)
    text = match_text(calls, slots)  # (slots, rows)
    samples = match_samples(calls, x, sigma)  # (b, rows)
    others = torch.cat([call.others for call in calls])
    rows = torch.arange(len(others), device=others.device)
    used = torch.zeros(len(others), dtype=torch.bool, device=others.device)

    def take(free: Tensor) -> tuple[Tensor, Tensor]:
        """The first free row and whether there is one; rows of one kind are interchangeable."""
        nonlocal used
        index, found = free.to(torch.int8).argmax(), free.any()
        used = used | ((rows == index) & found)
        return index, found

    width = max(len(parts) for parts in cond)
    chosen, present, weights, unclear = [], [], torch.zeros(len(cond), width), []
    first = [sum(map(len, cond[:sample])) for sample in range(len(cond) + 1)]  # the slot of each sample's first prompt, and of the first `uncond`
    for sample, parts in enumerate(cond):
        mine = []
        for number, part in enumerate(parts):
            index, found = take(text[first[sample] + number] & samples[sample] & ~used)
            mine.append(index)
            present.append(found)
            weights[sample, number] = part.weight
        chosen.append(torch.stack(mine + mine[:1] * (width - len(mine))))
    lone, guided = [], []
    for sample in range(len(cond)):
        if not uncond:
            lone.append(chosen[sample][0])
            guided.append(used.new_zeros(()))
            continue
        own = others[chosen[sample][0]]
        free = text[first[-1] + sample] & samples[sample] & ~used
        alike = free & (others == own)  # differs from the conditional row in the text alone (InstructPix2Pix has one that differs in the image too)
        best = torch.where(alike.any(), alike, free)
        index, found = take(best)
        # Several rows without such a one, or a text that both roles have: then something else has to be the same.
        several = (best & (others != others[index])).any()
        both = text[first[sample]][index] & (others[index] != own)
        unclear.append(found & (several | both))
        lone.append(index)
        guided.append(found)
    doubts = torch.stack([
        ~torch.stack(present).all(),
        (~text.any(0)).any(),
        (~samples.any(0)).any(),
        torch.stack(unclear).any() if unclear else used.new_zeros(()),
    ])  # fmt: skip
    return Pairing(torch.stack(chosen), torch.stack(lone), weights, torch.stack(guided), doubts)


def match_text(calls: Sequence[Call], slots: Sequence[Part]) -> Tensor:
    """``(slots, rows)`` bool: the row has this conditioning.

    Hosts pad the shorter one of two prompts, or cut the longer one off, so tokens are compared as far as both go; where a row fits several
    conditionings, those that account for most of its tokens count, and of these one that it is the whole of.
    """
    return torch.cat([_match_text(call, slots) for call in calls], dim=1)


def _match_text(call: Call, slots: Sequence[Part]) -> Tensor:
    device = call.denoised.device
    score = torch.zeros(len(slots), call.rows, dtype=torch.int64, device=device)
    if call.text is None:
        return score.bool()
    by_shape: dict[torch.Size, list[tuple[int, Tensor]]] = {}
    for number, part in enumerate(slots):
        for candidate in part.candidates:
            by_shape.setdefault(candidate.shape, []).append((number, candidate))
    hashes: dict[int, Tensor] = {}
    for found in by_shape.values():
        candidates = torch.stack([candidate for _, candidate in found]).to(call.text)
        if not _comparable(call.text, candidates[0]):
            continue
        length, whole = 1, 1
        given = call.text
        if candidates.ndim == 3:
            length = min(candidates.shape[1], given.shape[1])
            whole = int(candidates.shape[1] == given.shape[1])
            candidates, given = candidates[:, :length], given[:, :length]
        if length not in hashes:
            hashes[length] = row_hash(given)
        same = row_hash(candidates)[:, None] == hashes[length]  # (candidates, rows)
        for (number, _), hit in zip(found, same, strict=True):
            score[number] = torch.maximum(score[number], hit * (2 * length + whole))
    return (score > 0) & (score == score.max(0).values)


def match_samples(calls: Sequence[Call], x: Tensor, sigma: Tensor) -> Tensor:
    """``(b, rows)`` bool: the row was made from this sample at its noise level. Channels that the wrapper adds (a mask) do not count."""
    return torch.cat([same_samples(call.x, call.sigma, x, sigma) for call in calls], dim=1)


def same_samples(rows: Tensor, levels: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """``(b, rows)`` bool for the rows of one call."""
    x, sigma = x.detach().to(rows), sigma.detach().to(levels)
    if rows.ndim != x.ndim or rows.shape[2:] != x.shape[2:] or rows.shape[1] < x.shape[1]:
        return torch.zeros(len(x), len(rows), dtype=torch.bool, device=rows.device)
    if rows.shape[1] > x.shape[1]:
        rows = rows[:, : x.shape[1]]
    return (row_hash(x)[:, None] == row_hash(rows)) & (sigma[:, None] == levels)


def in_order(layout: Sequence[str], samples: int, device: torch.device) -> Pairing:
    """The pairing where the order of rows is declared: blocks of a row for each sample, in one call or several."""
    order = torch.arange(samples, device=device)
    doubts = torch.zeros(4, dtype=torch.bool, device=device)
    return Pairing(
        (order + layout.index("cond") * samples)[:, None],
        order + layout.index("uncond") * samples,
        torch.ones(samples, 1),
        torch.ones(samples, dtype=torch.bool, device=device),
        doubts,
    )
