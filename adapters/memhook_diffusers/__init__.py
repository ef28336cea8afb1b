"""The memhook adapter for diffusers pipelines."""

from __future__ import annotations

import sys

from memhook.hookspecs import Adapter, hookimpl


@hookimpl
def memhook_adapt(target: object) -> Adapter | None:
    """Claim diffusers pipelines; diffusers itself is not imported, since a target of its kind means that it was."""
    diffusers = sys.modules.get("diffusers")
    if diffusers is None or not isinstance(target, diffusers.DiffusionPipeline):
        return None
    from memhook_diffusers.adapter import DiffusersAdapter

    return DiffusersAdapter(target)
