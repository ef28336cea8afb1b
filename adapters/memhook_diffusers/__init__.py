"""The memhook adapter for diffusers pipelines."""

from __future__ import annotations

import sys

from memhook.hookspecs import Adapter, hookimpl


@hookimpl
def memhook_adapt(target: object) -> Adapter | None:
    """Claim diffusers pipelines; diffusers itself is not imported, since a target of its kind means that it was."""
    if not any(
        kind.__module__.startswith("diffusers.") and kind.__name__ in ("DiffusionPipeline", "ModularPipeline") for kind in type(target).__mro__
    ):
        return None
    if "diffusers" not in sys.modules:
        return None
    from memhook_diffusers.adapter import DiffusersAdapter

    return DiffusersAdapter(target)
