"""The node that changes a prompt's encoding until it pulls no harder than others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from memhook import optimize_embedding
from memhook.errors import MemhookError
from memhook_comfyui.prompts import rows_of

from . import inputs
from .host import CATEGORY, check_interrupted, progress
from .sampling import Conditioning, probe

if TYPE_CHECKING:
    from memhook.detection.calibration import Calibration


class Mitigate:
    """CONDITIONING in, CONDITIONING out."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Changes the encoding of a memorized prompt a little, until it pulls no harder than a harmless one. The text stays as it is."
    RETURN_TYPES: ClassVar = ("CONDITIONING", "STRING")
    RETURN_NAMES: ClassVar = ("positive", "text")
    OUTPUT_TOOLTIPS: ClassVar = ("Connect it to your sampler in place of the prompt.", "What was done.")
    FUNCTION = "mitigate"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 -- ComfyUI's name
        """ComfyUI's description of the inputs."""
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model that makes the pictures."}),
                "positive": ("CONDITIONING", {"tooltip": "The encoded prompt to change. It is copied, never changed itself."}),
                "negative": inputs.negative(),
                "latent": ("LATENT", {"tooltip": "An empty latent of the size of your pictures. More pictures make the change fit more seeds."}),
                **inputs.sampler_inputs(),
                "target": inputs.target("How strongly the prompt may pull (see the Report's score). 0: as harmless prompts do, by the calibration."),
                "learning_rate": inputs.learning_rate(),
                "max_steps": inputs.max_steps(most=500),
                "fixed_tokens": (
                    "INT",
                    {"default": 1, "min": 0, "max": 16, "tooltip": "Positions at the front that stay: 1 for CLIP (its start token), 0 for T5."},
                ),
            },
            "optional": {"calibration": inputs.calibration()},
        }

    def mitigate(
        self,
        model: Any,
        positive: Conditioning,
        negative: Conditioning,
        latent: dict[str, Any],
        target: float,
        learning_rate: float,
        max_steps: int,
        fixed_tokens: int,
        calibration: Calibration | None = None,
        **sampler: Any,
    ) -> tuple[Conditioning, str]:
        """Probe, optimize, and put the result into copies."""
        if target <= 0 and calibration is None:
            raise MemhookError("Memhook Mitigate has neither a target nor a calibration; set a target above 0, or connect Memhook Calibrate")
        trace, alive = probe(model, positive, negative, latent, evaluations=1, **sampler)
        first = trace.evaluations[0]
        if calibration is not None:
            calibration.using(1).check(trace)
            target = target if target > 0 else float(np.nanmedian(calibration.using(1).scores))
        if first.pred_uncond is None or first.embedding is None:
            trace.magnitudes  # noqa: B018 -- raises, with ComfyUI's reason
            raise MemhookError("this model is given no text embedding (b, l, d), so it cannot be changed")
        _check_same(positive, first.embedding)
        bar = progress(max_steps + 1)

        def objective(embedding: torch.Tensor) -> torch.Tensor:
            check_interrupted()
            value = first.objective(embedding)
            bar.update(1)
            return value

        found = optimize_embedding(
            objective, first.embedding, target=target, lr=learning_rate, max_steps=max_steps, fixed_tokens=fixed_tokens, groups=trace.groups
        )
        del alive
        return _written(positive, found.embedding, trace.groups), str(found)


def _parts(positive: Conditioning, embedding: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.split(embedding, [tensor.shape[1] for tensor, _ in positive], dim=1))


def _check_same(positive: Conditioning, embedding: torch.Tensor) -> None:
    """What the model was given has to be what stands in the CONDITIONING."""
    lengths = sum(tensor.shape[1] for tensor, _ in positive)
    same = lengths == embedding.shape[1] and all(
        torch.equal(rows_of(tensor, len(part)).to(part), part) for (tensor, _), part in zip(positive, _parts(positive, embedding), strict=True)
    )
    if not same:
        raise MemhookError(
            "this model works its prompt over before it uses it, so what was optimized cannot stand in a CONDITIONING; use Memhook Guard, which "
            "acts inside the run"
        )


def _written(positive: Conditioning, embedding: torch.Tensor, groups: np.ndarray) -> Conditioning:
    """A copy with the new embedding: one row where all samples share it."""
    rows = embedding[:1] if groups.max() == 0 else embedding
    return [[part.to(tensor).clone(), dict(options)] for (tensor, options), part in zip(positive, _parts(positive, rows), strict=True)]
