"""What one evaluation shows about its predictions, prepared on the device and read when somebody asks.

Every pipeline combines its predictions into the ``model_output`` that it gives to the scheduler. With the first prediction
``p_0`` and the differences ``d_j = p_j - p_0``, any combination ``sum_j w_j p_j`` is ``(sum_j w_j) p_0 + sum_j w_j d_j``. The inner
products of these vectors and the model output are all that a least-squares fit of the weights needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memhook.adapting.tensors import full_precision
from memhook_diffusers.outputs import noisy_part

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from memhook.adapting.pairs import Prediction
    from memhook_diffusers.outputs import Reader


@dataclass(frozen=True, eq=False)
class Observation:
    """One evaluation, on the device.

    The vectors are ``p_0``, the differences to it, the noisy sample where it has the same form, and the model output last.
    """

    products: Tensor  # (b, k, k) inner products of the vectors
    sums: Tensor  # (b, k) sums of their elements
    predictions: int  # n; k is n + 1, or n + 2 with the noisy sample
    inputs: Tensor  # (n, b) fingerprints: everything but the noisy sample
    text: Tensor  # (n, b): the text embedding, or all inputs where none was found
    samples: Tensor  # (n, b): the noisy sample
    whole_samples: Tensor  # (n, b): the noisy sample with image and mask channels
    modules: tuple[int, ...]  # (n,) which module predicted
    ordered: bool  # whether the model output has its elements in the predictions' order
    claims: Tensor | None = None  # (m, b, q, q) inner products of the predictions, the noisy sample, and a pair that a guider was given

    def read(self) -> Observed:
        """Wait for the device."""
        hashes = torch.stack([self.inputs, self.text, self.samples, self.whole_samples]).cpu().numpy()
        products, sums = self.products.to("cpu", torch.float64).numpy(), self.sums.to("cpu", torch.float64).numpy()
        inputs, text, samples, whole_samples = hashes
        claims = None if self.claims is None else self.claims.to("cpu", torch.float64).numpy()
        return Observed(products, sums, self.predictions, inputs, text, samples, whole_samples, self.modules, self.ordered, claims)


@dataclass(frozen=True, eq=False)
class Observed:
    """An `Observation` as numbers."""

    products: np.ndarray
    sums: np.ndarray
    predictions: int
    inputs: np.ndarray
    text: np.ndarray
    samples: np.ndarray
    whole_samples: np.ndarray
    modules: tuple[int, ...]
    ordered: bool
    claims: np.ndarray | None = None


@torch.no_grad()
def observe(
    predictions: Sequence[Prediction],
    model_output: Tensor,
    *,
    reader: Reader,
    inputs: Tensor,
    text: Tensor,
    samples: Tensor,
    whole_samples: Tensor,
    modules: tuple[int, ...],
    claims: Sequence[tuple[Tensor, Tensor]] = (),
) -> Observation:
    """Prepare an `Observation` without waiting for the device.

    Args:
        predictions: The ``n`` predictions of the evaluation, ``(b, ...)`` each.
        model_output: What the scheduler was given for the same samples.
        reader: How the predictions were read.
        inputs: Fingerprints, as are the others; see `Observation`.
        text: See `Observation`.
        samples: See `Observation`.
        whole_samples: See `Observation`.
        modules: See `Observation`.
        claims: ``(pred_cond, pred_uncond)`` that a guider was given, with the samples' elements in the model output's order.
    """
    first = predictions[0].values
    wide = torch.float64 if first.device.type != "mps" else torch.float32

    def flat(values: Tensor) -> Tensor:
        return reader.flat(values.detach().to(first.device, wide))

    vectors = [flat(first)]
    vectors += [flat(prediction.values) - vectors[0] for prediction in predictions[1:]]
    noisy = noisy_part(predictions[0])
    if noisy is not None and noisy.shape == first.shape:
        vectors.append(flat(noisy))
    vectors.append(model_output.detach().to(first.device, wide).reshape(first.shape[0], -1))
    stacked = torch.stack(vectors, dim=1)  # (b, k, elements)
    ordered = reader.form != "unknown"
    whole = [flat(prediction.values) for prediction in predictions] + vectors[len(predictions) : -1]
    pairs = [[*whole, *(given.to(first.device, wide).reshape(first.shape[0], -1) for given in pair)] for pair in claims if ordered]
    with full_precision(first.device):
        products = stacked @ stacked.transpose(1, 2)  # (b, k, k)
        grams = torch.stack([basis @ basis.transpose(1, 2) for basis in (torch.stack(pair, dim=1) for pair in pairs)]) if pairs else None
    return Observation(products, stacked.sum(2), len(predictions), inputs, text, samples, whole_samples, modules, ordered, grams)
