"""What attribution and optimization differentiate: a function from an embedding to one magnitude a sample."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from memhook.errors import MemhookError

Objective = Callable[[Tensor], Tensor]
"""``objective(embedding (b, l, d)) -> (b,)``, differentiable, each number a function of its own sample's embedding only; such as
`memhook.Evaluation.objective`."""


def check_embedding(embedding: Tensor) -> None:
    """Raise where a tensor cannot be a text embedding."""
    if not isinstance(embedding, Tensor):
        raise MemhookError(f"the embedding is a {type(embedding).__name__}; expected a tensor (samples, positions, width)")
    if embedding.ndim != 3 or not embedding.is_floating_point() or not embedding.numel():
        seen = f"shape {tuple(embedding.shape)} and dtype {embedding.dtype}"
        raise MemhookError(
            f"the embedding has {seen}; expected floating point of shape (samples, positions, width). Add the axis of samples to a lone one"
        )


def check_values(values: object, samples: int, *, name: str = "the objective") -> Tensor:
    """Raise where an objective's result is not one number a sample."""
    if not isinstance(values, Tensor) or values.shape != (samples,):
        seen = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
        raise MemhookError(f"{name} gave {seen} for {samples} samples; expected one number a sample, ({samples},)")
    return values


def independent(name: str = "the objective") -> MemhookError:
    """The error for an objective without a gradient."""
    return MemhookError(f"{name} does not depend on the embedding, or was computed without gradients (torch.no_grad or .detach() inside it)")
