"""Why a pipeline made no unconditional prediction, and what its user can do about it."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor


def why_missing(name: str, kwargs: dict[str, Any]) -> str:
    """The reason, read off the keyword arguments of a denoiser's call."""
    distilled = next((key for key in ("guidance", "timestep_cond", "guidance_scale") if isinstance(kwargs.get(key), Tensor)), None)
    if distilled is not None:
        return (
            f"{name} made no unconditional prediction: its denoiser takes the guidance scale as an input ({distilled}), so it is "
            "guidance-distilled and needs none"
        )
    return f"{name} made no unconditional prediction: guidance is off (a scale of 1 or less, or outside its interval), or the model is distilled"


def remedy(pipeline: Any) -> str:
    """What to pass so that there is guidance, read off the pipeline's signature."""
    if any("guider" in name for name in vars(pipeline)):
        return "Give the pipeline a guider such as ClassifierFreeGuidance with a guidance_scale above 1"
    parameters = inspect.signature(type(pipeline).__call__).parameters
    if "true_cfg_scale" in parameters:
        return "Pass true_cfg_scale above 1 and a negative_prompt"
    scale = next((name for name in ("guidance_scale", "prior_guidance_scale") if name in parameters), None)
    if scale is None:
        return "This pipeline has no classifier-free guidance; use one that takes a guidance_scale"
    return f"Pass {scale} above 1; a model distilled for few steps needs its undistilled original"
