"""A captured embedding as a function of what entered the text encoders, ready for gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class EncoderInput:
    """What entered one text encoder.

    Attributes:
        embeddings: ``(b, k, e)``: the embeddings of its ``k`` tokens, a leaf that requires gradients.
        ids: ``(b, k)`` int64: the tokens.
        tokenizer: Whose they are; None where it is not known.
    """

    embeddings: Tensor
    ids: Tensor
    tokenizer: Any


@dataclass(frozen=True, eq=False)
class Lifted:
    """The conditioning of ``b`` samples, made again from the encoders' inputs.

    Attributes:
        inputs: One for each encoder, in the order of their calls.
        outputs: ``(b, ...)`` each, differentiable: the embedding, then what else the denoiser is given of the text.
        texts: ``(b,)``: the prompt of each sample.
    """

    inputs: tuple[EncoderInput, ...]
    outputs: tuple[Tensor, ...]
    texts: tuple[str, ...]


@runtime_checkable
class Liftable(Protocol):
    """An `Evaluation.encode` that also knows which of its calls made a captured embedding."""

    def lift(self, captured: Tensor) -> Lifted:
        """The captured embedding ``(b, l, d)`` made again, with gradients.

        Raises:
            ReplayError: No call that was seen made it; says why, and names the next way.
        """
