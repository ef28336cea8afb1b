"""Detection by density: images of a memorized prompt lie close to each other.

The baseline of Wen et al. 2024 (section 3.4): images of one prompt and several seeds are compared pair by pair, in pixel space by the tile-wise
distance of Carlini et al. 2023, *Extracting Training Data from Diffusion Models*, or in the space of a copy-detection descriptor (SSCD in the paper).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from einops import rearrange
from torch import Tensor

from memhook.errors import MemhookError

Statistic = Literal["mean", "closest"]


def tile_distances(images: Tensor, *, tiles: int = 4) -> Tensor:
    """The largest distance over tiles, for each pair of images.

    Images are cut into ``tiles x tiles`` equal parts, as far as the size divides (a remainder at the right and lower edge is left out). The
    distance of two parts is ``sqrt(mean((a - b)^2))``. Taking the largest over the parts keeps two pictures with a common empty background apart.

    Args:
        images: ``(..., n, c, h, w)`` of any numeric dtype; ``h`` and ``w`` at least ``tiles``.
        tiles: Parts in a row; 4 is Carlini et al.'s 16 tiles.

    Returns:
        ``(..., n, n)`` float32, symmetric, zeros on the diagonal.

    Raises:
        MemhookError: The images have fewer than four dimensions, or are smaller than the tiles.

    >>> tile_distances(torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])).tolist()
    [[0.0, 1.0], [1.0, 0.0]]
    """
    if images.ndim < 4 or tiles < 1 or min(images.shape[-2:]) < tiles:
        raise MemhookError(f"the images have shape {tuple(images.shape)}; expected (..., n, c, h, w) with h and w of at least tiles={tiles}")
    height, width = (size - size % tiles for size in images.shape[-2:])
    cut = images.float()[..., :height, :width]
    parts = rearrange(cut, "... n c (row h) (column w) -> ... (row column) n (c h w)", row=tiles, column=tiles)
    # The sum of squares itself rather than the expanded product, which would lose small distances in rounding.
    distances: Tensor = torch.cdist(parts, parts, compute_mode="donot_use_mm_for_euclid_dist") / parts.shape[-1] ** 0.5
    return distances.amax(-3)


def pixel_density(images: Tensor, *, tiles: int = 4, statistic: Statistic = "mean") -> Tensor:
    """How close the images of a prompt are in pixel space: minus the `tile_distances`, over all pairs. Larger is more memorized.

    Args:
        images: ``(..., n, c, h, w)``, ``n`` images of each prompt, at least 2.
        tiles: As in `tile_distances`.
        statistic: ``"mean"`` of all pairs, or the ``"closest"`` pair.

    Returns:
        ``(...)`` float32, at most 0; 0 if all images are equal.
    """
    return _over_pairs(-tile_distances(images, tiles=tiles), statistic)


def descriptor_density(descriptors: Tensor, *, statistic: Statistic = "mean") -> Tensor:
    """How close the images of a prompt are in a descriptor space: their cosine similarity, over all pairs. Larger is more memorized.

    Args:
        descriptors: ``(..., n, d)``, one vector an image, such as SSCD's; at least 2 a prompt.
        statistic: ``"mean"`` of all pairs, or the ``"closest"`` pair.

    Returns:
        ``(...)`` float32 in -1..1.

    >>> float(descriptor_density(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])))
    0.3333333432674408
    """
    if descriptors.ndim < 2:
        raise MemhookError(f"the descriptors have shape {tuple(descriptors.shape)}; expected (..., n, d)")
    unit = torch.nn.functional.normalize(descriptors.float(), dim=-1)
    return _over_pairs(unit @ unit.mT, statistic)


def _over_pairs(closeness: Tensor, statistic: Statistic) -> Tensor:
    """A statistic over the pairs of ``(..., n, n)``."""
    n = closeness.shape[-1]
    if n < 2:
        raise MemhookError(f"there is {n} image a prompt; density compares images of a prompt with each other, so expected at least 2")
    if statistic not in get_args(Statistic):
        raise MemhookError(f"statistic is {statistic!r}; expected one of {', '.join(get_args(Statistic))}")
    first, second = torch.triu_indices(n, n, offset=1)
    pairs = closeness[..., first, second]
    found: Tensor = pairs.mean(-1) if statistic == "mean" else pairs.amax(-1)
    return found
