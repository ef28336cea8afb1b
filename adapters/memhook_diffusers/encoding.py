"""A pipeline's own text encoder, as a function of texts."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memhook.errors import ReplayError
from memhook_diffusers.loading import quiet_libraries

_OFF = {"do_classifier_free_guidance": False, "num_images_per_prompt": 1, "num_videos_per_prompt": 1, "num_waveforms_per_prompt": 1}


class PipelineEncoder:
    """``encoder(texts)``: what the pipeline's ``encode_prompt`` makes of them: the embeddings ``(n, l, d)``, then pooled vectors and masks.

    It is asked with the settings (skipped layers, length) of the latest call that `on_use` was told of. Whoever uses it compares what it
    makes of a prompt with what was captured.
    """

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = weakref.ref(pipeline)
        self._settings: dict[str, Any] = {}

    def on_use(self, owner: Any, arguments: dict[str, Any]) -> None:  # noqa: ARG002 -- the form of a tap's listener
        """The pipeline encodes its prompts: remember how, and nothing of the prompts."""
        self._settings = {
            name: value for name, value in arguments.items() if isinstance(value, (bool, int, float, torch.device)) or name == "clip_skip"
        }

    @staticmethod
    def of(pipeline: Any) -> PipelineEncoder | None:
        """The encoder of a pipeline; None where it has none that can be asked."""
        return PipelineEncoder(pipeline) if callable(getattr(pipeline, "encode_prompt", None)) else None

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> list[Tensor]:
        pipeline = self._pipeline()
        if pipeline is None:
            raise ReplayError("the pipeline was deleted, so its text encoder cannot be asked; keep it while its trace is used")
        name, parameters = type(pipeline).__name__, inspect.signature(pipeline.encode_prompt).parameters
        given: dict[str, Any] = {key: value for key, value in {**self._settings, **_OFF}.items() if key in parameters}
        if "device" in parameters and given.get("device") is None:
            given["device"] = pipeline._execution_device
        # Every prompt without a default: Stable Diffusion 3 wants one for each encoder.
        prompts = [key for key, kind in parameters.items() if key == "prompt" or (key.startswith("prompt_") and kind.default is kind.empty)]
        given |= {key: list(texts) for key in prompts}
        try:
            with quiet_libraries():
                found = pipeline.encode_prompt(**given)
        except Exception as error:  # pipelines raise whatever their encoders raise
            raise ReplayError(f"{name}.encode_prompt cannot be asked for other texts: {type(error).__name__}: {error}") from error
        parts = [part for part in (found if isinstance(found, (tuple, list)) else [found]) if isinstance(part, Tensor) and len(part) == len(texts)]
        embeddings = [part for part in parts if part.ndim == 3 and part.is_floating_point()]
        if not embeddings:
            raise ReplayError(f"{name}.encode_prompt answered no embedding (n, l, d) for {len(texts)} texts")
        return [embeddings[0], *(part for part in parts if part is not embeddings[0] and part.ndim > 1)]
