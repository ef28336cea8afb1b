"""Loading pipelines for the command line: a folder or a hub id, quietly, with errors that help."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memhook.errors import MemhookError


def load_pipeline(model: str, *, dtype: str = "float32", device: str = "cpu") -> Any:
    """Load any diffusers pipeline.

    Args:
        model: A folder in diffusers format, or a hub id such as ``"CompVis/stable-diffusion-v1-4"``.
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        device: Where to put it, such as ``"cpu"`` or ``"cuda"``.

    Raises:
        MemhookError: The folder does not exist or holds no pipeline, a file in it is damaged, or the hub cannot be reached.
    """
    import torch
    from diffusers import DiffusionPipeline

    folder = Path(model).expanduser()
    looks_like_path = folder.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1
    if looks_like_path and not (folder / "model_index.json").is_file():
        problem = "has no model_index.json" if folder.is_dir() else "does not exist"
        raise MemhookError(
            f"the model folder {folder} {problem}; give a folder that DiffusionPipeline.save_pretrained wrote, or a hub id such as owner/name"
        )
    if dtype not in ("float32", "float16", "bfloat16"):
        raise MemhookError(f"dtype is {dtype!r}; expected float32, float16 or bfloat16")

    options: dict[str, Any] = {"torch_dtype": getattr(torch, dtype)}
    if folder.exists() and "safety_checker" in json.loads((folder / "model_index.json").read_text()):
        options["safety_checker"] = None  # it would blacken pictures that are being judged for something else
    try:
        with quiet_libraries(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch_dtype is dtype from diffusers 1.0 on
            pipeline = DiffusionPipeline.from_pretrained(str(folder) if folder.exists() else model, **options)
            pipeline = pipeline.to(device)
    except Exception as error:  # loaders raise whatever their file formats raise
        raise MemhookError(f"cannot load the model {model}: {type(error).__name__}: {_first_line(error)}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """No log lines below errors and no progress bars from diffusers and transformers inside the block."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    before = [(library, library.get_verbosity(), library.is_progress_bar_enabled()) for library in (diffusers_logging, transformers_logging)]
    for library, _, _ in before:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, verbosity, bars in before:
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else "no reason given"
