"""Mitigation by disturbing the prompt: random words put in, or noise on its embedding.

The family of Somepalli et al. 2023, *Understanding and Mitigating Copying in Diffusion Models*, which Wen et al. 2024 (section 4.4) compare
with: random token addition with 1, 2, 4, 6 or 8 tokens. Everything is a function of its seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memhook.capture.objective import check_embedding
from memhook.errors import MemhookError

_LARGEST = 100_000  # random numbers are below it
_TRIES = 1_000  # draws for one token that can be written as a word


def add_random_tokens(prompt: str, tokenizer: Any, *, count: int, seed: int) -> str:
    """Put random entries of the vocabulary into a prompt, each as a word of its own at a random place between its words.

    A piece of a word that stands alone may be encoded as several tokens, so the prompt can grow by more than ``count`` tokens.

    Args:
        prompt: The prompt.
        tokenizer: A Hugging Face tokenizer, from whose vocabulary (without special tokens) is drawn, uniformly.
        count: How many; 0 or more.
        seed: Of the draws; the same seed gives the same prompt.

    Raises:
        MemhookError: ``count`` is negative, or the vocabulary has no entry that can be written.
    """
    rng = _generator(count, seed)
    special = {int(token) for token in tokenizer.all_special_ids}

    def draw() -> str:
        for _ in range(_TRIES):
            token = int(rng.integers(len(tokenizer)))
            text = "" if token in special else str(tokenizer.decode([token])).strip()
            if text and text.isprintable() and "\N{REPLACEMENT CHARACTER}" not in text:  # that is a part of a character
                return text
        raise MemhookError(f"none of {_TRIES} random tokens of the {type(tokenizer).__name__} can be written as a word; expected a text tokenizer")

    return _insert(prompt, draw, count, rng)


def add_random_numbers(prompt: str, *, count: int, seed: int) -> str:
    """Put random numbers below 100,000 into a prompt, at random places between its words.

    >>> len(add_random_numbers("a red fox", count=2, seed=0).split())
    5
    """
    rng = _generator(count, seed)
    return _insert(prompt, lambda: str(rng.integers(_LARGEST)), count, rng)


def repeat_words(prompt: str, *, count: int, seed: int) -> str:
    """Put random words of the prompt into it once more, at random places between its words.

    >>> sorted(set(repeat_words("a red fox", count=2, seed=0).split()))
    ['a', 'fox', 'red']
    """
    rng = _generator(count, seed)
    words = prompt.split()
    if count and not words:
        raise MemhookError("the prompt is empty, so it has no word to repeat; give it some text")
    return _insert(prompt, lambda: words[int(rng.integers(len(words)))], count, rng)


def add_embedding_noise(embedding: Tensor, *, scale: float, seeds: Sequence[int], fixed_tokens: int = 1) -> Tensor:
    """Add Gaussian noise to text embeddings.

    Args:
        embedding: ``(b, l, d)``.
        scale: Standard deviation of the noise over the root mean square of the sample's embedding, so that scales can be compared
            between encoders; 0 or more.
        seeds: One for each of the ``b`` samples, whose noise does not depend on the others.
        fixed_tokens: How many positions at the front stay as they are, as in `memhook.optimize_embedding`.

    Returns:
        ``(b, l, d)`` in the dtype and on the device of ``embedding``.
    """
    check_embedding(embedding)
    if not scale >= 0:
        raise MemhookError(f"scale is {scale}; a standard deviation is never negative, so expected 0 or more")
    if len(seeds) != len(embedding):
        raise MemhookError(f"there are {len(seeds)} seeds for {len(embedding)} samples; expected one a sample")
    if not 0 <= fixed_tokens < embedding.shape[1]:
        raise MemhookError(f"fixed_tokens is {fixed_tokens}; the embedding has {embedding.shape[1]} positions")
    moved = embedding[:, fixed_tokens:].float()  # (b, l - fixed, d)
    # Made on the CPU, so that a seed gives the same noise on every device.
    noise = torch.stack([torch.randn(moved.shape[1:], generator=torch.Generator().manual_seed(int(seed))) for seed in seeds]).to(moved.device)
    unit = moved.square().mean(dim=(1, 2), keepdim=True).sqrt()
    return torch.cat([embedding[:, :fixed_tokens], (moved + scale * unit * noise).to(embedding.dtype)], dim=1)


def _generator(count: int, seed: int) -> np.random.Generator:
    if count < 0:
        raise MemhookError(f"count is {count}; expected 0 or more")
    return np.random.default_rng(seed)


def _insert(prompt: str, draw: Any, count: int, rng: np.random.Generator) -> str:
    """``count`` words put in one after the other, each at one of the places between the words there are by then, or at an end."""
    words = prompt.split()
    for _ in range(count):
        word = draw()
        words.insert(int(rng.integers(len(words) + 1)), word)
    return " ".join(words)
