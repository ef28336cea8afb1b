"""The magnitude inside a region."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from memhook.errors import MemhookError, NoGuidanceError

if TYPE_CHECKING:
    from memhook.capture.prediction import Evaluation


@dataclass(frozen=True, eq=False)
class MaskedMagnitude:
    """``‖(c - u) * m‖ / mean(m)``: the magnitude inside a region, in units of its area (Chen et al. 2025 mask it with an attention map).

    With a mask of ones it is the magnitude.

    Attributes:
        mask: ``(h, w)``, or with the prediction's other axes before; at least 0, not all zeros.

    >>> import torch
    >>> from memhook import Evaluation
    >>> half = torch.zeros(8, 8)
    >>> half[:4] = 1.0
    >>> MaskedMagnitude(half)(Evaluation(torch.ones(2, 4, 8, 8), torch.zeros(2, 4, 8, 8)))
    tensor([22.6274, 22.6274])
    """

    name: ClassVar[str] = "masked_magnitude"
    needs: ClassVar[str] = "pair"
    symmetric: ClassVar[bool] = True
    paper: ClassVar[str] = "Chen et al., ICLR 2025"

    mask: Tensor

    def __post_init__(self) -> None:
        if self.mask.ndim < 1 or not bool(torch.isfinite(self.mask).all()) or bool((self.mask < 0).any()) or not bool((self.mask > 0).any()):
            raise MemhookError(f"the mask has shape {tuple(self.mask.shape)}; expected (h, w), finite, at least 0 and not 0 everywhere")

    def __call__(self, evaluation: Evaluation) -> Tensor:
        return masked(difference(evaluation), self.mask)


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """``(b,)``: the norm of ``(b, ...)`` values times a mask (with or without an axis of samples), over the mask's mean."""
    shape, wanted = tuple(values.shape[1:]), tuple(mask.shape)
    weights = mask.to(values)
    try:
        weighted = values * weights
    except RuntimeError as error:
        raise MemhookError(f"the mask has shape {wanted}, the prediction {shape}; expected the height and width of the prediction") from error
    if weighted.shape != values.shape:
        raise MemhookError(f"the mask has shape {wanted}, the prediction {shape}; expected the height and width of the prediction")
    area = weights.flatten(1).mean(1) if weights.ndim == values.ndim else weights.mean()
    norms: Tensor = torch.linalg.vector_norm(weighted.flatten(1), dim=1)
    return norms / area


def uncond_of(evaluation: Evaluation) -> Tensor:
    """The unconditional prediction.

    Raises:
        NoGuidanceError: There is none.
    """
    if evaluation.pred_uncond is None:
        raise NoGuidanceError("this evaluation has no unconditional prediction to compare with; guide with a scale above 1")
    return evaluation.pred_uncond


def difference(evaluation: Evaluation) -> Tensor:
    """``pred_cond - pred_uncond``, ``(b, ...)``, in float32 at least."""
    cond, uncond = evaluation.pred_cond, uncond_of(evaluation)
    wide = torch.promote_types(torch.promote_types(cond.dtype, uncond.dtype), torch.float32)
    return cond.to(wide) - uncond.to(cond.device, wide)
