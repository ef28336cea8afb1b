"""Density baselines, against loops over pairs and tiles."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memhook import MemhookError
from memhook.scores.density import descriptor_density, pixel_density, tile_distances


def transcribed(a, b, tiles):
    """Carlini et al. 2023: the largest l2 distance of non-overlapping tiles, normalized by their size."""
    height, width = a.shape[1] // tiles, a.shape[2] // tiles
    found = []
    for row, column in itertools.product(range(tiles), range(tiles)):
        place = (slice(None), slice(row * height, (row + 1) * height), slice(column * width, (column + 1) * width))
        found.append(np.sqrt(np.mean((a[place] - b[place]) ** 2)))
    return max(found)


@given(st.integers(2, 5), st.integers(1, 3), st.integers(4, 11), st.integers(4, 11), st.integers(1, 4), st.integers(0, 10**6))
def test_distances_are_the_largest_over_tiles(n, channels, height, width, tiles, seed):
    images = np.random.default_rng(seed).normal(size=(2, n, channels, height, width))
    found = tile_distances(torch.tensor(images), tiles=tiles)
    for prompt, i, j in itertools.product(range(2), range(n), range(n)):
        assert float(found[prompt, i, j]) == pytest.approx(transcribed(images[prompt, i], images[prompt, j], tiles), rel=1e-5, abs=1e-6)


def test_one_changed_tile_counts_in_full():
    pictures = torch.zeros(2, 3, 32, 32)
    pictures[1, :, :8, :8] = 1.0
    assert float(pixel_density(pictures)) == -1.0
    assert float(pixel_density(pictures, tiles=1)) == pytest.approx(-0.25)


def test_small_distances_survive_large_values():
    pictures = torch.full((2, 3, 16, 16), 255.0)
    pictures[1] += 0.01
    assert float(pixel_density(pictures)) == pytest.approx(-0.01, rel=1e-2)


def test_bytes_are_pictures_too():
    pictures = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    assert float(pixel_density(pictures)) == -255.0


@given(st.integers(2, 6), st.integers(0, 10**6))
def test_descriptor_density_is_the_mean_cosine_of_pairs(n, seed):
    vectors = np.random.default_rng(seed).normal(size=(n, 7))
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in itertools.combinations(vectors, 2)]
    assert float(descriptor_density(torch.tensor(vectors))) == pytest.approx(np.mean(cosines), abs=1e-5)
    assert float(descriptor_density(torch.tensor(vectors), statistic="closest")) == pytest.approx(max(cosines), abs=1e-5)


@given(st.permutations(range(4)))
def test_the_order_of_images_does_not_matter(order):
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(pixel_density(images[list(order)]), pixel_density(images))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pixel_density(torch.zeros(1, 3, 8, 8)), "1 image a prompt"),
        (lambda: tile_distances(torch.zeros(3, 8, 8)), r"shape \(3, 8, 8\)"),
        (lambda: tile_distances(torch.zeros(2, 3, 8, 3)), "at least tiles=4"),
        (lambda: descriptor_density(torch.zeros(3)), r"shape \(3,\)"),
        (lambda: descriptor_density(torch.zeros(3, 2), statistic="median"), "'median'; expected one of mean, closest"),
    ],
)
def test_what_has_no_density_says_why(call, message):
    with pytest.raises(MemhookError, match=message):
        call()
