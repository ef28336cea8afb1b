"""The nodes that learn what harmless prompts score, and remember it."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import memhook
from memhook.detection.calibration import Calibration
from memhook.errors import CalibrationError, MemhookError

from . import inputs
from .host import CATEGORY, check_interrupted, output_folder, progress
from .sampling import Conditioning, encode, probe

_NAME = re.compile(r"[\w][\w .-]{0,99}")


class Calibrate:
    """MODEL, CLIP and a list of prompts in; a calibration out."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Learns what harmless prompts score with this model and these settings. Runs only the first steps of each. Give at least 99 prompts for "
        "one false alarm in a hundred."
    )
    RETURN_TYPES: ClassVar = ("MEMHOOK_CALIBRATION", "STRING")
    RETURN_NAMES: ClassVar = ("calibration", "text")
    FUNCTION = "calibrate"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 -- ComfyUI's name
        """ComfyUI's description of the inputs."""
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model that makes the pictures, with its LoRAs."}),
                "clip": ("CLIP", {"tooltip": "Its text encoder."}),
                "prompts": ("STRING", {"multiline": True, "tooltip": "Prompts that you know to be harmless, one a line."}),
                "negative": inputs.negative(),
                "latent": ("LATENT", {"tooltip": "An empty latent of the size and number of your pictures."}),
                **inputs.sampler_inputs(),
                "evaluations": inputs.evaluations("Over how many of the first steps to score. Guard wants few.", least=1, most=1000),
                "name": ("STRING", {"default": "calibration", "tooltip": "Saved under this name in output/memhook, for Memhook Load Calibration."}),
            }
        }

    def calibrate(
        self, model: Any, clip: Any, prompts: str, negative: Conditioning, latent: dict[str, Any], evaluations: int, name: str, **sampler: Any
    ) -> tuple[Calibration, str]:
        """Probe every prompt."""
        lines = list(dict.fromkeys(line.strip() for line in prompts.splitlines() if line.strip()))
        if not lines:
            raise MemhookError("Memhook Calibrate has no prompts; write harmless prompts, one a line")
        if not _NAME.fullmatch(name):
            raise MemhookError(f"the name is {name!r}; expected letters, digits, spaces, dots, dashes or underscores")
        bar, traces = progress(len(lines)), []
        # The seed goes on from prompt to prompt: the scores are to vary with the noise as they will in use.
        first_seed = sampler.pop("seed")
        for number, line in enumerate(lines):
            check_interrupted()
            seed = (first_seed + number) % 2**64
            trace, _ = probe(model, encode(clip, line), negative, latent, evaluations=evaluations, seed=seed, **sampler)
            trace.setting  # noqa: B018 -- read now: the clone of the model that it ran on is gone by the next prompt
            traces.append(trace.samples(slice(None)))  # numbers only
            bar.update(1)
        calibration = memhook.calibrate(traces, first=evaluations)
        folder = output_folder()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.safetensors"
        calibration.save(path)
        scores = sorted(calibration.scores)
        text = f"{len(scores)} harmless prompts score {scores[0]:.3g} to {scores[-1]:.3g}, half of them below {scores[len(scores) // 2]:.3g}"
        return calibration, f"{text}. Saved as {path.name}"


class LoadCalibration:
    """A calibration that was saved."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Loads what Memhook Calibrate saved."
    RETURN_TYPES: ClassVar = ("MEMHOOK_CALIBRATION",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 -- ComfyUI's name
        """ComfyUI's description of the inputs."""
        names = sorted(path.stem for path in output_folder().glob("*.safetensors"))
        return {"required": {"name": (names, {"tooltip": "Calibrations in output/memhook."})}}

    @classmethod
    def IS_CHANGED(cls, name: str) -> float:  # noqa: N802 -- ComfyUI's name
        """When the file was written, so that a new one under an old name is read again."""
        path = output_folder() / f"{name}.safetensors"
        return path.stat().st_mtime if path.is_file() else 0.0

    def load(self, name: str) -> tuple[Calibration]:
        """Read the file."""
        if not _NAME.fullmatch(name):
            raise CalibrationError(f"there is no calibration named {name!r}; choose one of the list")
        return (Calibration.load(output_folder() / f"{name}.safetensors"),)
