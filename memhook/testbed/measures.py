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

from memhook.testbed.artwork import SUBJECTS
from memhook.testbed.scenes import COLORS

COPY_THRESHOLD = 0.85
"""Similarity from which one picture counts as a copy of the other."""


def _centered(pictures: Tensor) -> Tensor:
    """Blurred pictures, each channel with mean zero, as unit vectors ``(n, 3 * 32 * 32)``."""
    soft = nn.functional.avg_pool2d(pictures, 3, 1, 1, count_include_pad=False)
    flat = (soft - soft.mean(dim=(2, 3), keepdim=True)).flatten(1)
    return nn.functional.normalize(flat, dim=1, eps=1e-3)


def copy_similarity(pictures: Tensor, others: Tensor) -> Tensor:
    """Similarity of each picture to the picture beside it: ``(n, 3, 32, 32)`` twice in -1..1 -> ``(n,)`` in -1..1; 1 for a copy."""
    return (_centered(pictures) * _centered(others)).sum(1)


def copy_similarities(pictures: Tensor, others: Tensor) -> Tensor:
    """Similarity of every picture to every other one: ``(n, 3, 32, 32)`` and ``(m, 3, 32, 32)`` -> ``(n, m)``."""
    return _centered(pictures) @ _centered(others).T


@dataclass(frozen=True)
class Reading:
    """What the reader sees in ``n`` pictures."""

    subject: Tensor  # (n, 40) logits, in the order of SUBJECTS
    color: Tensor  # (n, 8) logits, in the order of COLORS

    def subjects(self) -> list[str]:
        """The most likely subject of each picture."""
        return [list(SUBJECTS)[index] for index in self.subject.argmax(1).tolist()]

    def colors(self) -> list[str]:
        """The most likely background color of each picture."""
        return [list(COLORS)[index] for index in self.color.argmax(1).tolist()]


class Reader(nn.Module):
    """``reader(pictures (n, 3, 32, 32) in -1..1) -> Reading``."""

    def __init__(self) -> None:
        super().__init__()

        def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]

        self.features = nn.Sequential(*block(3, 24, 1), *block(24, 48, 2), *block(48, 64, 1), *block(64, 96, 2), *block(96, 96, 1))  # (n, 96, 8, 8)
        self.subject = nn.Linear(192, len(SUBJECTS))
        self.color = nn.Linear(192, len(COLORS))

    def describe(self, pictures: Tensor) -> Tensor:
        """A descriptor of each picture, ``(n, 192)``: what the reader looks at to name subject and color."""
        features = self.features(pictures)
        return torch.cat([features.amax(dim=(2, 3)), features.mean(dim=(2, 3))], dim=1)

    def forward(self, pictures: Tensor) -> Reading:
        pooled = self.describe(pictures)
        return Reading(self.subject(pooled), self.color(pooled))
