"""The memhook adapter for k-diffusion's samplers and the CFG wrappers that everybody writes for them (CompVis, A1111, InvokeAI, InstructPix2Pix)."""

from __future__ import annotations

from memhook.hookspecs import Adapter, hookimpl
from memhook_kdiffusion.adapter import KDiffusionAdapter, claim
from memhook_kdiffusion.closures import guided, wrap
from memhook_kdiffusion.steps import step_callback

__all__ = ["KDiffusionAdapter", "guided", "step_callback", "wrap"]


@hookimpl
def memhook_adapt(target: object) -> Adapter | None:
    """Claim modules with an ``inner_model`` that take a conditional and an unconditional conditioning; no host has to be imported for that."""
    return claim(target)
