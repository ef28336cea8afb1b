"""The node that acts on a run while it goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import memhook
from memhook.errors import MemhookError, MemorizationDetectedError
from memhook_comfyui.adapter import RunAdapter, sampler_of

from .host import CATEGORY, comfy, patched, say
from .runs import RUNS

if TYPE_CHECKING:
    from memhook.detection.calibration import Calibration


class Guard:
    """MODEL in, MODEL out: its runs are judged at their first evaluation."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Judges every picture right at its start. If the prompt looks memorized, it either stops (as if you had pressed Cancel) or changes the "
        "prompt's encoding a little, so that another picture comes out."
    )
    RETURN_TYPES: ClassVar = ("MODEL",)
    OUTPUT_TOOLTIPS: ClassVar = ("The same model, guarded. Connect it to your sampler.",)
    FUNCTION = "guard"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 -- ComfyUI's name
        """ComfyUI's description of the inputs."""
        rate = {"default": 0.01, "min": 0.0001, "max": 0.5, "step": 0.001, "round": False}
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model to guard. Put LoRAs before this node."}),
                "action": (["mitigate", "stop"], {"tooltip": "mitigate: change the prompt's encoding and go on. stop: cancel the run."}),
                "false_alarms": (
                    "FLOAT",
                    {**rate, "tooltip": "How often a harmless prompt may be taken for a memorized one: 0.01 is one in a hundred."},
                ),
                "target": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 1000.0,
                        "step": 0.01,
                        "tooltip": "How strongly the prompt may pull after mitigation (see the Report's score). 0 takes it from the calibration.",
                    },
                ),
                "learning_rate": (
                    "FLOAT",
                    {"default": 0.05, "min": 0.0001, "max": 1.0, "step": 0.001, "round": False, "tooltip": "Larger changes more."},
                ),
                "max_steps": (
                    "INT",
                    {"default": 10, "min": 1, "max": 200, "tooltip": "How many changes at most. Each costs about three sampler steps."},
                ),
            },
            "optional": {"calibration": ("MEMHOOK_CALIBRATION", {"tooltip": "What harmless prompts score, from Memhook Calibrate. Needed to stop."})},
            "hidden": {"node": "UNIQUE_ID"},
        }

    def guard(
        self,
        model: Any,
        action: str,
        false_alarms: float,
        target: float,
        learning_rate: float,
        max_steps: int,
        calibration: Calibration | None = None,
        node: str | None = None,
    ) -> tuple[Any]:
        """The model with a wrapper around its runs."""
        if calibration is None and (action == "stop" or target <= 0):
            raise MemhookError("Memhook Guard has no calibration; connect Memhook Calibrate, or mitigate with a target above 0")

        def guarded(executor: Any, *args: Any, **kwargs: Any) -> Any:
            guider = executor.class_obj
            adapter = RunAdapter(guider, sampler_of(args, kwargs))
            shared: dict[str, Any] = {"lr": learning_rate, "max_steps": max_steps, "adapter": adapter}
            try:
                with (
                    memhook.mitigate(guider, target_magnitude=target, **shared)
                    if calibration is None
                    else memhook.guard(guider, calibration, fpr=false_alarms, action=action, target_magnitude=target or None, **shared)  # type: ignore[arg-type]
                ) as found:
                    output = executor(*args, **kwargs)
            except MemorizationDetectedError as error:
                say(str(error), node)
                raise comfy("comfy.model_management").InterruptProcessingException from error
            adapter.describe()
            RUNS.add(output, found.trace, str(found))
            return output

        return (patched(model, guarded),)
