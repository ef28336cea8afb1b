"""A pipeline's own text encoder: as a function of texts, and with gradients to the embeddings that enter it."""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memhook.adapting.replay import replayed
from memhook.capture.lifted import EncoderInput, Lifted
from memhook.errors import ReplayError
from memhook_diffusers.loading import quiet_libraries

_OFF = {"do_classifier_free_guidance": False, "num_images_per_prompt": 1, "num_videos_per_prompt": 1, "num_waveforms_per_prompt": 1}
_CALLS = 8  # of a run that are remembered: some pipelines encode prompt and negative prompt in two
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_NEXT = 'Score words by leaving them out (memhook.leave_one_out), or by the gradient at the encoder\'s output (at="output")'


class PipelineEncoder:
    """``encoder(texts)``: what the pipeline's ``encode_prompt`` makes of them: the embeddings ``(n, l, d)``, then pooled vectors and masks.

    It is asked with the settings (skipped layers, length) of the latest call that `on_use` was told of. Whoever uses it compares what it
    makes of a prompt with what was captured.
    """

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = weakref.ref(pipeline)
        self._calls: deque[tuple[list[dict[str, str]], dict[str, Any]]] = deque(maxlen=_CALLS)  # prompts by argument, and settings
        self._own = False

    def on_use(self, owner: Any, arguments: dict[str, Any]) -> None:  # noqa: ARG002 -- the form of a tap's listener
        """The pipeline encodes prompts: remember which, and how."""
        if self._own:  # memhook's own question
            return
        settings = {name: value for name, value in arguments.items() if isinstance(value, (bool, int, float, torch.device)) or name == "clip_skip"}
        given = {name: [value] if isinstance(value, str) else value for name, value in arguments.items() if name.startswith("prompt")}
        texts = {name: value for name, value in given.items() if isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value)}
        count = len(texts.get("prompt", ()))
        rows = [{name: value[row] for name, value in texts.items() if len(value) == count} for row in range(count)]
        self._calls.append((rows, settings))

    @staticmethod
    def of(pipeline: Any) -> PipelineEncoder | None:
        """The encoder of a pipeline; None where it has none that can be asked."""
        return PipelineEncoder(pipeline) if callable(getattr(pipeline, "encode_prompt", None)) else None

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> list[Tensor]:
        settings = self._calls[-1][1] if self._calls else {}
        return self._encode([{"prompt": text} for text in texts], settings)

    def lift(self, captured: Tensor) -> Lifted:
        """The captured embedding, made again by the call of the run that made it, with gradients to what enters the encoders."""
        pipeline = self._alive()
        rows, settings = self._source(captured)
        inputs: list[EncoderInput] = []
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(mode=False))
            stack.enter_context(torch.enable_grad())
            for name, encoder in _encoders(pipeline):
                tokenizer = getattr(pipeline, name.replace("text_encoder", "tokenizer"), None)
                stack.enter_context(replayed(encoder))
                stack.enter_context(_inputs_of(encoder, tokenizer, inputs))
            outputs = self._encode(rows, settings)
        name = type(pipeline).__name__
        if not inputs:
            raise ReplayError(f"{name} has no text encoder whose input embeddings can be seen (get_input_embeddings). {_NEXT}")
        odd = next((part for part in inputs if len(part.embeddings) != len(captured)), None)
        if odd is not None:
            shape = tuple(odd.embeddings.shape)
            raise ReplayError(f"{name} gave its text encoder {shape} for {len(captured)} samples, so its rows belong to no sample. {_NEXT}")
        if not outputs[0].requires_grad:
            raise ReplayError(f"{name} encodes its prompts without gradients (torch.no_grad inside encode_prompt). {_NEXT}")
        if not _near(outputs[0].detach(), captured):
            raise ReplayError(f"{name} made another embedding when it encoded its prompts again, so it keeps state or has changed since. {_NEXT}")
        return Lifted(tuple(inputs), tuple(outputs), tuple(row["prompt"] for row in rows))

    # ---- private --------------------------------------------------------------------------------------------------

    def _source(self, captured: Tensor) -> tuple[list[dict[str, str]], dict[str, Any]]:
        """For each captured row the prompt that it was made of, and the settings of that call; found by comparing."""
        name, tried = type(self._alive()).__name__, 0
        for rows, settings in reversed(self._calls):
            if not rows:
                continue
            tried += 1
            with torch.no_grad():
                made = self._encode(rows, settings)[0]
            if made.shape[1:] != captured.shape[1:]:
                continue
            near = [[_near(one[None], row[None]) for one in made] for row in captured]
            if all(any(row) for row in near):
                return [rows[row.index(True)] for row in near], settings
        if tried:
            raise ReplayError(
                f"none of the {tried} calls of {name}.encode_prompt that were seen in the run made the captured embedding: it was changed on the "
                f"way, or came from elsewhere. {_NEXT}"
            )
        raise ReplayError(
            f"{name} encoded no prompt inside the watched block, so it is not known what entered its text encoder: embeddings were passed in "
            f"(prompt_embeds). Encode inside the block (pipeline.encode_prompt), or pass the prompt itself. {_NEXT}"
        )

    def _alive(self) -> Any:
        pipeline = self._pipeline()
        if pipeline is None:
            raise ReplayError("the pipeline was deleted, so its text encoder cannot be asked; keep it while its trace is used")
        return pipeline

    def _encode(self, rows: Sequence[Mapping[str, str]], settings: Mapping[str, Any]) -> list[Tensor]:
        pipeline = self._alive()
        name, parameters = type(pipeline).__name__, inspect.signature(pipeline.encode_prompt).parameters
        given: dict[str, Any] = {key: value for key, value in {**settings, **_OFF}.items() if key in parameters}
        if "device" in parameters and given.get("device") is None:
            given["device"] = pipeline._execution_device
        # Every prompt without a default: Stable Diffusion 3 wants one for each encoder.
        needed = [key for key, kind in parameters.items() if key == "prompt" or (key.startswith("prompt_") and kind.default is kind.empty)]
        given |= {key: [row.get(key, row["prompt"]) for row in rows] for key in {*needed, *(key for row in rows for key in row)}}
        self._own = True
        try:
            with quiet_libraries():
                found = pipeline.encode_prompt(**given)
        except Exception as error:  # pipelines raise whatever their encoders raise
            raise ReplayError(f"{name}.encode_prompt cannot be asked for other texts: {type(error).__name__}: {error}") from error
        finally:
            self._own = False
        parts = [part for part in (found if isinstance(found, (tuple, list)) else [found]) if isinstance(part, Tensor) and len(part) == len(rows)]
        embeddings = [part for part in parts if part.ndim == 3 and part.is_floating_point()]
        if not embeddings:
            raise ReplayError(f"{name}.encode_prompt answered no embedding (n, l, d) for {len(rows)} texts")
        return [embeddings[0], *(part for part in parts if part is not embeddings[0] and part.ndim > 1)]


def _encoders(pipeline: Any) -> Iterator[tuple[str, nn.Module]]:
    for name, part in vars(pipeline).items():
        if name.startswith("text_encoder") and isinstance(part, nn.Module) and callable(getattr(part, "get_input_embeddings", None)):
            yield name, part


@contextlib.contextmanager
def _inputs_of(encoder: nn.Module, tokenizer: Any, found: list[EncoderInput]) -> Iterator[None]:
    """Make a leaf of what enters the encoder inside the block, and keep it."""
    named: nn.Module = encoder.get_input_embeddings()  # type: ignore[operator]
    # T5 names one module and calls another that shares its weight (transformers 5).
    tables = [part for part in encoder.modules() if part is named or (isinstance(part, nn.Embedding) and part.weight.shape == _weight(named))]

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:  # noqa: ARG001 -- torch's signature
        leaf = output.detach().clone().requires_grad_()
        found.append(EncoderInput(leaf, args[0].detach().clone(), tokenizer))
        return leaf

    handles = [table.register_forward_hook(hook) for table in tables]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _weight(embedding: nn.Module) -> Any:
    return getattr(getattr(embedding, "weight", None), "shape", None)


def _near(made: Tensor, captured: Tensor) -> bool:
    wide = captured.to(torch.promote_types(captured.dtype, torch.float32))
    return bool((made.to(wide) - wide).norm() <= _TOLERANCE.get(captured.dtype, 1e-2) * wide.norm().clamp_min(1e-30))
