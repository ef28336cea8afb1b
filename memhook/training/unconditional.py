"""The extra pass: the same noisy sample and timestep with the null embedding, under no_grad, leaving no trace in the loop."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from memhook.adapting.pairs import find_embedding, find_sample, find_timestep, read_output
from memhook.adapting.replay import Path, look_up, put
from memhook.adapting.tensors import leaves
from memhook.capture.unrecorded import unrecorded
from memhook.errors import MemhookError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from memhook.training.calls import LoopCall

NullTensor = Tensor | Callable[[], Tensor]
"""What stands for no prompt: a tensor, or a function that gives it (where the text encoder is trained too)."""

Cut = Callable[[Any], Any]
"""Takes some rows of everything in nested arguments that has one for each sample."""

# Parts of names of other arguments that carry the prompt in diffusers' models, or were computed with it (a ControlNet's residuals); what is
# to stand there in an unconditional pass is the user's to say.
_ALSO_TEXT = (
    "encoder_hidden_states",
    "encoder_attention_mask",
    "text_emb",
    "pooled_projections",
    "prompt",
    "block_additional_residual",
    "controlnet_block",
)
# Largest difference to the null embedding, relative to its largest element, that rounding may cause where both went through the text
# encoder in batches of different sizes. Captions differ by something like 1.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


class UnconditionalPass:
    """Makes unconditional predictions for the loop's calls."""

    def __init__(self, null_embedding: NullTensor, *, path: Path | None, null_arguments: Mapping[Path, NullTensor | None]) -> None:
        self._null, self._path, self._others = null_embedding, path, null_arguments
        self._moving: list[str] | None = None  # the buffers that a forward pass changes; None until one was made
        self._encoded: tuple[weakref.ref[LoopCall], Tensor] | None = None  # the null embedding for the latest call

    def conditional_rows(self, call: LoopCall) -> Tensor:
        """``(b,)`` bool: the samples whose embedding is not the null embedding already (by conditioning dropout)."""
        path, embedding = self._embedding(call)
        null = self._null_for(call, embedding, path)
        if not embedding.is_floating_point():
            return embedding.ne(null).reshape(len(embedding), -1).any(1)
        wide = torch.promote_types(embedding.dtype, torch.float32)
        difference = (embedding.to(wide) - null.to(wide)).abs().reshape(len(embedding), -1).amax(1)
        largest = null.to(wide).abs().reshape(len(embedding), -1).amax(1)
        return ~(difference <= largest * _TOLERANCE.get(embedding.dtype, 1e-2))  # a NaN is no null embedding

    def check(self, call: LoopCall) -> None:
        """Raise now what a pass for this call would raise: a null embedding or other arguments that do not fit."""
        self._arguments(call)

    def __call__(self, module: nn.Module, call: LoopCall, cut: Cut | None = None) -> Tensor:
        """The unconditional prediction ``(b, ...)`` for the samples of ``call``, or for those that ``cut`` takes."""
        call.check_unchanged()
        return self._run(module, call, self._arguments(call), cut)

    def conditional(self, module: nn.Module, call: LoopCall, cut: Cut) -> Tensor:
        """The loop's own prediction once more, for the samples that ``cut`` takes."""
        call.check_unchanged()
        return self._run(module, call, (call.args, call.kwargs), cut)

    def _run(self, module: nn.Module, call: LoopCall, arguments: tuple[tuple[Any, ...], dict[str, Any]], cut: Cut | None) -> Tensor:
        args, kwargs = arguments if cut is None else (cut(arguments[0]), cut(arguments[1]))
        enabled, dtype = call.autocast
        # Weights that autocast casts under no_grad must not stay in its cache: in older torch the loop's next pass would take them, without
        # gradients (2.13 casts them again by itself).
        autocast = torch.autocast(call.values.device.type, dtype=dtype, enabled=enabled, cache_enabled=False)
        # The same random numbers as in the loop's pass, so that both predictions have the same dropout masks and differ by the prompt alone.
        with unrecorded(), call.random.again(), self._buffers_kept(module), autocast:
            return read_output(module(*args, **kwargs)).detach()

    def _arguments(self, call: LoopCall) -> tuple[tuple[Any, ...], dict[str, Any]]:
        path, embedding = self._embedding(call)
        args, kwargs = _put(call.args, call.kwargs, path, self._null_for(call, embedding, path))
        for other, _ in leaves(args, kwargs):
            if other != path and other not in self._others and any(word in str(key) for key in other for word in _ALSO_TEXT):
                raise MemhookError(
                    f"the denoiser was also given {_shown(other)}, which carries the prompt; expected to be told what stands there without one: "
                    f"null_arguments={{{other!r}: tensor}}, or None to leave it as it is"
                )
        for other, null in self._others.items():
            value = look_up(args, kwargs, other)
            if not isinstance(value, Tensor):
                raise MemhookError(
                    f"null_arguments names {_shown(other)}, where this call has a {type(value).__name__}; expected a tensor {_call(call)}"
                )
            if null is not None:
                args, kwargs = _put(args, kwargs, other, self._null_like(value, null, other))
        return args, kwargs

    def _embedding(self, call: LoopCall) -> tuple[Path, Tensor]:
        batch = call.values.shape[0]
        path = self._path if self._path is not None else find_embedding(call.args, call.kwargs, batch)
        value = look_up(call.args, call.kwargs, path) if path is not None else None
        if path is None or not isinstance(value, Tensor) or value.ndim == 0 or len(value) != batch:
            where = "under its usual names" if path is None else f"at {_shown(path)}"
            raise MemhookError(
                f"no embedding of {batch} rows was found {where} {_call(call)}; say where it stands: embedding=NAME, a position, or a tuple of keys"
            )
        return path, value.detach()

    def _null_for(self, call: LoopCall, embedding: Tensor, path: Path) -> Tensor:
        """The null embedding in the place of this call's; a function that gives it is called once a call."""
        if self._encoded is None or self._encoded[0]() is not call:
            self._encoded = weakref.ref(call), self._null_like(embedding, self._null, path)
        return self._encoded[1]

    @staticmethod
    def _null_like(value: Tensor, null: NullTensor, path: Path) -> Tensor:
        given = null if isinstance(null, Tensor) else null()
        if not isinstance(given, Tensor):
            raise MemhookError(f"what stands for {_shown(path)} without a prompt is a {type(given).__name__}; expected a tensor")
        row = tuple(value.shape[1:])
        if tuple(given.shape) not in (row, (1, *row), tuple(value.shape)):
            raise MemhookError(
                f"the null embedding for {_shown(path)} has shape {tuple(given.shape)}, the loop's has {tuple(value.shape)}; expected {row}: "
                "that of an empty prompt, from the same text encoder, padded to the same length"
            )
        return given.detach().to(value.device, value.dtype).expand(value.shape).contiguous()

    @contextlib.contextmanager
    def _buffers_kept(self, module: nn.Module) -> Iterator[None]:
        """Let the pass change copies of the buffers that it changes: running statistics, power iterations."""
        # Copies take their place; to set the values back would change what the loop's pass has saved for its backward pass.
        found = {f"{prefix}.{name}": (part, name, own) for prefix, part in module.named_modules() for name, own in part._buffers.items()}
        held = {key: place for key, place in found.items() if place[2] is not None and (self._moving is None or key in self._moving)}
        for part, name, own in held.values():
            part._buffers[name] = own.detach().clone() if own is not None else None
        try:
            yield
        finally:
            # By their values: batch normalization does not count its changes in the version (torch 2.13).
            moved = [key for key, (part, name, own) in held.items() if own is not None and not _equal(part._buffers[name], own)]
            self._moving = moved if self._moving is None else self._moving
            for part, name, own in held.values():
                part._buffers[name] = own


def _equal(tensor: Tensor | None, other: Tensor) -> bool:
    return tensor is not None and torch.equal(tensor, other)


def timesteps_of(call: LoopCall) -> Tensor:
    """``(b,)`` on the CPU: the timestep of each sample; NaN where the denoiser is given none."""
    batch = call.values.shape[0]
    found = find_timestep(call.args, call.kwargs)
    if found is None:
        return torch.full((batch,), float("nan"))
    given = torch.as_tensor(found).detach().cpu()
    own = given.ndim > 1 and len(given) == batch and given.numel() > batch  # a time for each token or frame; those that are given have a low one
    timesteps = given.flatten(1).amax(1) if own else given.reshape(-1)
    if len(timesteps) not in (1, batch):
        raise MemhookError(f"the denoiser was given {len(timesteps)} timesteps for a batch of {batch}; expected one, or one for each sample")
    return timesteps.expand(batch) if len(timesteps) == 1 else timesteps


def prediction_part(values: Tensor, call: LoopCall) -> Tensor:
    """The prediction without a learned variance, which doubles the channels (as in DiT)."""
    sample = find_sample(call.args, call.kwargs)
    if sample is None or sample.ndim != values.ndim or values.ndim < 3 or values.shape[2:] != sample.shape[2:]:
        return values
    return values[:, : sample.shape[1]] if values.shape[1] == 2 * sample.shape[1] else values


def _put(args: tuple[Any, ...], kwargs: dict[str, Any], path: Path, value: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (put(args, path, value), kwargs) if isinstance(path[0], int) else (args, put(kwargs, path, value))


def _shown(path: Path) -> str:
    return f"argument {path[0]!r}" + "".join(f"[{key!r}]" for key in path[1:])


def _call(call: LoopCall) -> str:
    return f"in a call with {len(call.args)} positional arguments and the keywords {', '.join(call.kwargs) or '(none)'}"
