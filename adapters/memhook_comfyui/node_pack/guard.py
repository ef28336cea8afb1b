"""The node that acts on a run while it goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import memhook
from memhook.errors import MemhookError, MemorizationDetectedError
from memhook_comfyui.adapter import RunAdapter, sampler_of

from . import inputs
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
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model to guard. Put LoRAs before this node."}),
                "action": (["mitigate", "stop"], {"tooltip": "mitigate: change the prompt's encoding and go on. stop: cancel the run."}),
                "false_alarms": inputs.false_alarms(),
                "target": inputs.target(
                    "How strongly the prompt may pull after mitigation (see the Report's score). 0 takes it from the calibration."
                ),
                "learning_rate": inputs.learning_rate(),
                "max_steps": inputs.max_steps(" Each costs about three sampler steps.", most=200),
            },
            "optional": {"calibration": inputs.calibration(" Needed to stop.")},
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
