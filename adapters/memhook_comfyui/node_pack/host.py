"""ComfyUI, asked for where it is needed: this pack can be imported and tested without it."""

from __future__ import annotations

import contextlib
import importlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from memhook.errors import MemhookError
from memhook_comfyui.wrappers import OUTER_SAMPLE, Wrapper, has_wrappers

if TYPE_CHECKING:
    from PIL.Image import Image

CATEGORY = "memhook"
KEY = "memhook"  # of this pack's wrappers


def comfy(name: str) -> Any:
    """A module of ComfyUI, such as ``"comfy.samplers"``."""
    return importlib.import_module(name)


def check_interrupted() -> None:
    """Raise ComfyUI's own exception if the user pressed Cancel."""
    comfy("comfy.model_management").throw_exception_if_processing_interrupted()


def progress(total: int) -> Any:
    """ComfyUI's progress bar, on the node that runs."""
    return comfy("comfy.utils").ProgressBar(total)


def patched(model: Any, wrapper: Wrapper) -> Any:
    """A clone of a MODEL with a wrapper around each of its runs."""
    if not has_wrappers(model):
        raise MemhookError("this ComfyUI has no model wrappers, which came in December 2024; update ComfyUI")
    clone = model.clone()
    clone.add_wrapper_with_key(OUTER_SAMPLE, KEY, wrapper)
    return clone


def unpatched(model: Any) -> Any:
    """A clone of a MODEL without this pack's wrappers, for runs that a node makes itself."""
    clone = model.clone()
    clone.remove_wrappers_with_key(OUTER_SAMPLE, KEY)
    return clone


def as_image(picture: Image) -> Tensor:
    """A picture as an IMAGE, ``(1, height, width, 3)`` in 0 to 1."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), np.float32) / 255)[None]


def preview(picture: Image, name: str) -> dict[str, str]:
    """Put a picture where the browser finds it; what ``ui.images`` wants to know of it."""
    folder = Path(comfy("folder_paths").get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    number = next(number for number in range(1_000_000) if not (folder / f"{name}_{number:05}.png").exists())
    picture.save(folder / f"{name}_{number:05}.png")
    return {"filename": f"{name}_{number:05}.png", "subfolder": "", "type": "temp"}


def shown(text: str, picture: Image, name: str, *results: Any) -> dict[str, Any]:
    """What a node with something to show returns: in the browser, and as outputs IMAGE, STRING and what follows."""
    return {"ui": {"text": (text,), "images": [preview(picture, name)]}, "result": (as_image(picture), text, *results)}


def say(text: str, node: str | None) -> None:
    """A line in the log and, where ComfyUI can show it, on the node."""
    logging.getLogger("memhook").warning("Memhook: %s", text)
    with contextlib.suppress(Exception):  # from a version that has none of it to a server that runs without a browser
        comfy("server").PromptServer.instance.send_progress_text(text, node)


def output_folder() -> Path:
    """Where calibrations are kept."""
    return Path(comfy("folder_paths").get_output_directory()) / "memhook"
