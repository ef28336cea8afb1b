"""The node that watches a model."""

from __future__ import annotations

from typing import Any, ClassVar

import memhook
from memhook_comfyui.adapter import RunAdapter, sampler_of

from .host import CATEGORY, patched
from .runs import RUNS


def watching(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Around a run of the model: a trace for this run alone."""
    guider = executor.class_obj
    adapter = RunAdapter(guider, sampler_of(args, kwargs))
    with memhook.watch(guider, adapter=adapter) as trace:
        output = executor(*args, **kwargs)
    adapter.describe()  # while the model is loaded
    RUNS.add(output, trace)
    return output


class Watch:
    """MODEL in, MODEL out."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Measures how strongly the prompt pulls at the picture in every step. Changes nothing in the picture."
    RETURN_TYPES: ClassVar = ("MODEL",)
    OUTPUT_TOOLTIPS: ClassVar = ("The same model, watched. Connect it to your sampler.",)
    FUNCTION = "watch"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 -- ComfyUI's name
        """ComfyUI's description of the inputs."""
        return {"required": {"model": ("MODEL", {"tooltip": "The model to watch. Put LoRAs before this node."})}}

    def watch(self, model: Any) -> tuple[Any]:
        """The model with a wrapper around its runs."""
        return (patched(model, watching),)
