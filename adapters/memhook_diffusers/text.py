"""The text embedding among a denoiser's arguments, whatever form it has there, as ``(b, l, d)``.

Most denoisers take a tensor ``(batch, l, d)``. AnimateDiff repeats it for every frame, Z-Image takes a list with a tensor per row, Krea 2
an axis of text-encoder layers ``(batch, l, layers, d)``, whose layers count as one width, and AudioLDM and Shap-E a pooled vector
``(batch, d)``, which counts as one token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from memhook.adapting.pairs import EMBEDDING_NAMES, SAMPLE_NAMES
from memhook.adapting.replay import Path, look_up
from memhook.adapting.tensors import leaves

_USUAL = (*EMBEDDING_NAMES, "clip_text", "c", "cap_feats", "encoder_hidden_states_t5", "encoder_hidden_states_llama3", "proj_embedding")
_POOLED = ("class_labels",)
_NOT_TEXT = ("image", "rotary", "mask", "residual", "control", "ids", "cond_sample", "time", "latents", "noise")


def find_sample(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The noisy sample among the arguments: a tensor, a list with a tensor per row, or None."""
    if args and isinstance(args[0], (Tensor, list)):
        return args[0]
    return next((kwargs[name] for name in SAMPLE_NAMES if isinstance(kwargs.get(name), (Tensor, list))), None)


def find_text(args: tuple[Any, ...], kwargs: Mapping[str, Any], batch: int) -> Path | None:
    """Where the text embedding of ``batch`` rows stands: under a usual name, or else the one argument that could be it."""
    usual: list[Path] = [*((name,) for name in _USUAL), (2,)]
    for fits in (_is_embedding, _is_layered, _is_repeated, _is_listed):
        for path in usual:
            if fits(look_up(args, dict(kwargs), path), batch):
                return path
    sample = find_sample(args, kwargs)
    others = [
        path
        for path, value in leaves(args, kwargs)
        if _is_embedding(value, batch) and value is not sample and not any(word in str(path[-1]) for word in _NOT_TEXT)
    ]
    if len(others) == 1:
        return others[0]
    return next(((name,) for name in (*_USUAL, *_POOLED) if _is_vector(kwargs.get(name), batch)), None)


def read_text(value: Any, rows: slice, batch: int) -> Tensor | None:
    """Rows of the argument that `find_text` found, ``(b, l, d)``; None where they differ in length."""
    if isinstance(value, list):
        chosen = value[rows]
        return torch.stack(chosen) if all(item.shape == chosen[0].shape for item in chosen) else None
    if value.ndim == 2:
        vectors: Tensor = value[rows, None]
        return vectors
    embedding: Tensor = value[:: len(value) // batch][rows]
    if embedding.ndim == 4:
        return embedding.squeeze(1) if embedding.shape[1] == 1 else embedding.flatten(2)
    return embedding


def write_text(value: Any, embedding: Tensor, batch: int) -> Any:
    """Another embedding ``(b, l, d)`` in the form that the argument ``value`` of a call with ``batch`` rows had."""
    if isinstance(value, list):
        return list(embedding.unbind(0))
    if value.ndim == 2:
        return embedding[:, 0]
    return embedding.reshape(len(embedding), *value.shape[1:]).repeat_interleave(len(value) // batch, 0)


def row_of(args: tuple[Any, ...], kwargs: Mapping[str, Any], path: Path, batch: int) -> tuple[int | None, Path]:
    """Which row a tensor at ``path`` belongs to, if it stands in a list with an item for each of ``batch`` rows, and the path without it.

    An item may be a tensor, or a list of its own (Z-Image Omni). A list of tensors that have the batch themselves, such as one for
    each layer (Bria Fibo), is no such list, whatever its length.
    """
    for depth in range(1, len(path)):
        parent = look_up(args, dict(kwargs), path[:depth])
        if is_per_row(parent, batch):
            return int(path[depth]), (*path[:depth], *path[depth + 1 :])
    return None, path


def is_per_row(value: Any, batch: int) -> bool:
    """Whether ``value`` is a list with an item for each row of the batch."""
    if not isinstance(value, (list, tuple)) or len(value) != batch:
        return False
    return not all(isinstance(item, Tensor) and item.ndim > 2 and item.shape[0] == batch for item in value)


def _is_embedding(value: Any, batch: int) -> bool:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    sequence = value.ndim == 3 or (value.ndim == 4 and value.shape[1] == 1)  # Allegro has an axis of one before the tokens
    return sequence and value.shape[0] == batch


def _is_layered(value: Any, batch: int) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4 and value.shape[0] == batch and value.is_floating_point()


def _is_repeated(value: Any, batch: int) -> bool:
    return isinstance(value, Tensor) and value.ndim == 3 and value.shape[0] > 0 and value.shape[0] % batch == 0 and value.is_floating_point()


def _is_listed(value: Any, batch: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == batch
        and all(isinstance(item, Tensor) and item.ndim == 2 and item.is_floating_point() for item in value)
    )


def _is_vector(value: Any, batch: int) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2 and value.shape[0] == batch and value.is_floating_point()
