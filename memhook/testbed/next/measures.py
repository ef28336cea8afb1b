"""Measures made for pictures of 32 x 32 pixels: is it a copy, and does it show what its caption says?

SSCD and CLIP say little at this size. A copy is told by the correlation of the blurred pictures, which keeps the composition and
forgives what a small diffusion model does to a picture (blur, paler or stronger contrast, noise, a pixel of shift). Agreement with a
caption is told by a small network that names the subject and the color of the background; it was trained on composed scenes, never on the
diffusion model's output. ``memhook testbed card`` prints how well both do on held-out pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memhook.testbed.next.scenes import THINGS, Thing

COPY_THRESHOLD = 0.85
"""Similarity from which one picture counts as a copy of the other."""


def _blur(pictures: Tensor) -> Tensor:
    return nn.functional.avg_pool2d(pictures, 3, 1, 1, count_include_pad=False)


def _centered(pictures: Tensor) -> Tensor:
    """Blurred pictures, each channel with mean zero, as unit vectors ``(n, 3 * 32 * 32)``."""
    soft = _blur(pictures)
    flat = (soft - soft.mean(dim=(2, 3), keepdim=True)).flatten(1)
    return nn.functional.normalize(flat, dim=1, eps=1e-3)


def copy_similarity(pictures: Tensor, others: Tensor) -> Tensor:
    """Similarity of each picture to the picture beside it: ``(n, 3, 32, 32)`` twice in -1..1 -> ``(n,)`` in -1..1; 1 for a copy."""
    return (_centered(pictures) * _centered(others)).sum(1)


def region_similarities(pictures: Tensor, other: Tensor, mask: Tensor) -> Tensor:
    """Similarity of each picture to another one inside a mask: ``(n, 3, 32, 32)``, ``(3, 32, 32)``, bool ``(32, 32)`` -> ``(n,)`` in -1..1.

    The same correlation as `copy_similarity`, of the masked pixels alone, the best of those at a shift of up to one pixel: is this the
    region that a *local* pair was trained with?
    """
    weight = mask.to(pictures.dtype)
    blurred = nn.functional.pad(_blur(pictures), (1, 1, 1, 1), mode="replicate")
    shifted = torch.stack([blurred[:, :, y : y + 32, x : x + 32] for y in range(3) for x in range(3)])  # (9, n, 3, 32, 32)

    def centered(some: Tensor) -> Tensor:
        mean = (some * weight).sum(dim=(-2, -1), keepdim=True) / weight.sum()
        return nn.functional.normalize(((some - mean) * weight).flatten(-3), dim=-1, eps=1e-3)

    return (centered(shifted) @ centered(_blur(other[None]))[0]).amax(0)


def copy_similarities(pictures: Tensor, others: Tensor) -> Tensor:
    """Similarity of every picture to every other one: ``(n, 3, 32, 32)`` and ``(m, 3, 32, 32)`` -> ``(n, m)``."""
    return _centered(pictures) @ _centered(others).T


@dataclass(frozen=True)
class Reading:
    """What the reader sees in ``n`` pictures: ``logits[thing]`` is ``(n, words)``, in the order of `memhook.testbed.next.scenes.THINGS`."""

    logits: dict[Thing, Tensor]

    def words(self, thing: Thing) -> list[str]:
        """The most likely word for one thing in each picture."""
        return [THINGS[thing][index] for index in self.logits[thing].argmax(1).tolist()]


class Reader(nn.Module):
    """``reader(pictures (n, 3, 32, 32) in -1..1) -> Reading``."""

    def __init__(self) -> None:
        super().__init__()

        def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]

        # (n, 5, 32, 32), the picture and where each pixel is, to (n, 96, 8, 8)
        self.features = nn.Sequential(*block(5, 24, 1), *block(24, 48, 2), *block(48, 64, 1), *block(64, 96, 2), *block(96, 96, 1))
        self.heads = nn.ModuleDict({thing: nn.Linear(192, len(words)) for thing, words in THINGS.items()})

    def describe(self, pictures: Tensor) -> Tensor:
        """A descriptor of each picture, ``(n, 192)``: what the reader looks at to name its things."""
        n, _, height, width = pictures.shape
        y = torch.linspace(-1, 1, height, device=pictures.device, dtype=pictures.dtype).view(1, 1, height, 1).expand(n, 1, height, width)
        x = torch.linspace(-1, 1, width, device=pictures.device, dtype=pictures.dtype).view(1, 1, 1, width).expand(n, 1, height, width)
        features = self.features(torch.cat([pictures, x, y], dim=1))
        return torch.cat([features.amax(dim=(2, 3)), features.mean(dim=(2, 3))], dim=1)

    def forward(self, pictures: Tensor) -> Reading:
        pooled = self.describe(pictures)
        return Reading({thing: self.heads[thing](pooled) for thing in THINGS})
