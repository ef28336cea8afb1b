"""The memhook adapter for ComfyUI: model patchers and guiders, duck-typed; ComfyUI itself is never imported here."""

from __future__ import annotations

from memhook.hookspecs import Adapter, hookimpl


@hookimpl
def memhook_adapt(target: object) -> Adapter | None:
    """Claim ComfyUI's and Forge's model patchers of denoisers, and guiders."""
    kinds = {kind.__name__ for kind in type(target).__mro__}
    if "CFGGuider" in kinds:
        target = getattr(target, "model_patcher", None)
        kinds = {kind.__name__ for kind in type(target).__mro__}
    if "ModelPatcher" not in kinds or not hasattr(target, "model_options") or not hasattr(getattr(target, "model", None), "diffusion_model"):
        return None
    from memhook_comfyui.adapter import adapter_for

    return adapter_for(target)
