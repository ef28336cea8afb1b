"""One guided evaluation of a denoiser, and the magnitude of its text-conditional prediction."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from memhook.errors import MemhookError, NoGuidanceError, ReplayError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Encode = Callable[[Sequence[str]], Tensor | Sequence[Tensor]]
    """``encode(texts)``: embeddings ``(n, l, d)``; or these and what else a denoiser is given of a text, such as pooled vectors."""

Space = Literal["eps", "v", "x0", "flow"]
"""What the denoiser predicts: the noise, the velocity of v-prediction, the clean sample, or a rectified flow's velocity."""

Roles = Literal["declared", "matched", "fitted", "assumed"]
"""How it was found which prediction is the conditional one: told by the user, by the identity of its conditioning, by the
host's own guidance arithmetic, or by convention only."""

SPACES: tuple[str, ...] = get_args(Space)


def magnitude(pred_cond: Tensor, pred_uncond: Tensor) -> Tensor:
    """The magnitude of the text-conditional prediction, one number a sample (Wen et al. 2024, section 3.3).

    The Euclidean norm of ``pred_cond - pred_uncond`` over everything but the batch axis, in the unit of the prediction
    and not multiplied by the guidance scale. Computed in float32 at least, whatever the model's dtype; differentiable.

    Args:
        pred_cond: Conditional prediction, ``(b, ...)``, floating point.
        pred_uncond: Unconditional prediction of the same shape.

    Returns:
        ``(b,)``, float32 (float64 for float64 input), on the device of the predictions.

    Raises:
        MemhookError: The shapes differ, there is no axis besides the batch, or a prediction is not floating point.

    >>> import torch
    >>> magnitude(torch.ones(2, 4, 8, 8), torch.zeros(2, 4, 8, 8))
    tensor([16., 16.])
    """
    if pred_cond.shape != pred_uncond.shape:
        raise MemhookError(
            f"pred_cond has shape {tuple(pred_cond.shape)} and pred_uncond {tuple(pred_uncond.shape)}; "
            "both must be predictions for the same samples. Split a guided batch into its halves first"
        )
    if pred_cond.ndim < 2:
        raise MemhookError(f"the predictions have shape {tuple(pred_cond.shape)}; expected a batch axis and at least one more")
    if not (pred_cond.is_floating_point() and pred_uncond.is_floating_point()):
        raise MemhookError(f"the predictions have dtypes {pred_cond.dtype} and {pred_uncond.dtype}; expected floating point")
    dtype = torch.promote_types(torch.promote_types(pred_cond.dtype, pred_uncond.dtype), torch.float32)
    difference = (pred_cond.to(dtype) - pred_uncond.to(dtype)).flatten(1)  # (b, everything else)
    norms: Tensor = torch.linalg.vector_norm(difference, dim=1)
    return norms


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One guided evaluation of the denoiser: ``b`` samples at one noise level.

    Attributes:
        pred_cond: Conditional prediction ``(b, ...)``.
        pred_uncond: Unconditional prediction ``(b, ...)``; None where the host ran none.
        space: What the predictions are.
        roles: How it is known which one is conditional.
        timestep: The timestep given to the denoiser, as the host gave it.
        sigma: The noise level, for hosts that count in sigmas.
        embedding: Conditional text embedding ``(b, l, d)`` of the call; None where none was found or calls are not kept.
        replay: ``replay(embedding) -> pred_cond`` runs the captured call again, conditional rows only, differentiable
            with respect to ``embedding``. None where calls are not kept.
        encode: What the host's own text encoder makes of other texts, in the form of ``embedding``; None where it is not known.
    """

    pred_cond: Tensor
    pred_uncond: Tensor | None
    space: Space = "eps"
    roles: Roles = "declared"
    timestep: Tensor | float | None = None
    sigma: Tensor | float | None = None
    embedding: Tensor | None = None
    replay: Callable[[Tensor], Tensor] | None = None
    encode: Encode | None = None

    def take(self, samples: Tensor) -> Evaluation:
        """The same evaluation for some of its samples, ``(k,)`` int64; a replay runs these alone where the host's can."""
        with torch.inference_mode(mode=False):  # autograd keeps the index, which a host may have had made in that mode
            samples = samples.cpu().clone()  # an index on the CPU fits tensors on every device
        replay, embedding = self.replay, self.embedding
        taken: Callable[[Tensor], Tensor] | None = None
        if replay is not None and hasattr(replay, "take"):
            taken = replay.take(samples)
        elif replay is not None and embedding is not None:  # a host's own, which knows only the whole batch

            def whole(part: Tensor) -> Tensor:
                return replay(embedding.index_copy(0, samples.to(embedding.device), part.to(embedding)))[samples]

            taken = whole
        pred_uncond = self.pred_uncond[samples] if self.pred_uncond is not None else None
        some = embedding[samples] if embedding is not None else None
        return replace(self, pred_cond=self.pred_cond[samples], pred_uncond=pred_uncond, embedding=some, replay=taken)

    def objective(self, embedding: Tensor) -> Tensor:
        """The magnitude as a function of the conditional embedding, Eq. 5 of Wen et al. 2024.

        Args:
            embedding: ``(b, l, d)``, like `Evaluation.embedding`.

        Returns:
            ``(b,)``, differentiable with respect to ``embedding``; the unconditional prediction is a constant.

        Raises:
            NoGuidanceError: This evaluation has no unconditional prediction.
            ReplayError: The call was not kept or cannot be replayed.
        """
        if self.pred_uncond is None:
            raise NoGuidanceError("this evaluation has no unconditional prediction, so it has no magnitude; guide with a scale above 1")
        if self.replay is None and self.embedding is None:
            raise ReplayError(
                "no text embedding (b, l, d) is known for this evaluation, so its call cannot be replayed with another; record it by watching "
                'with keep="calls", or say where it stands among the arguments, as ModuleAdapter(..., embedding=...)'
            )
        if self.replay is None:
            raise ReplayError('this evaluation was captured without its call; watch with keep="calls", or use memhook.probe')
        predicted = self.replay(embedding)
        # Also where it is asked inside the run (on_evaluation), which hosts make under no_grad or inference_mode.
        with torch.inference_mode(mode=False), torch.enable_grad():
            return magnitude(predicted, self.pred_uncond.to(predicted.device))
