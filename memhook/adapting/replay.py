"""Running a captured call of a denoiser again, with another embedding."""

from __future__ import annotations

import contextlib
import copy
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memhook.adapting.checkpointing import checkpointed
from memhook.adapting.kept_state import set_aside
from memhook.adapting.tensors import copy_of, leaves, like, map_tensors, take_rows
from memhook.capture.unrecorded import unrecorded
from memhook.errors import ReplayError

Path = tuple[int | str, ...]
"""Where an argument stands: a position or a keyword, then keys into nested dicts and lists."""

# Relative difference between a replayed and the captured prediction that rounding may cause: the replay runs the
# conditional rows alone, and other batch sizes take other kernels.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def look_up(args: tuple[Any, ...], kwargs: dict[str, Any], path: Path) -> Any:
    """The argument at ``path``; None where there is none."""
    value: Any = args if isinstance(path[0], int) else kwargs
    try:
        for key in path:
            value = value[key]
    except (KeyError, IndexError, TypeError):
        return None
    return value


def put(tree: Any, path: Path, value: Any) -> Any:
    """A copy of nested dicts, lists and tuples with ``value`` at ``path``; what is not on the path is shared."""
    if not path:
        return value
    changed = put(tree[path[0]], path[1:], value)
    if isinstance(tree, Mapping):
        return like(tree, {**tree, path[0]: changed})
    items = list(tree)
    items[int(path[0])] = changed
    return like(tree, items)


class CallRecord:
    """One call of a denoiser, kept as it was made: copies of the arguments, autocast state, and the module, weakly."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, batch: int, device: torch.device) -> None:
        self._module = weakref.ref(module)
        self.args: tuple[Any, ...] = map_tensors(args, copy_of)
        self.kwargs: dict[str, Any] = map_tensors(kwargs, copy_of)
        self.batch = batch
        self.changes: Sequence[tuple[Path, Tensor]] = ()  # other arguments that are to be exchanged, for the rows that are run
        self._device_type = device.type
        self._autocast = (torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type))

    def again(self, rows: slice | Tensor, path: Path, embedding: Tensor) -> Any:
        """Call the module with these rows of the batch and another embedding, and give its output."""
        module = self._module()
        if module is None:
            raise ReplayError("the model of this captured call was deleted; replay while it is alive")
        if any(parameter.is_inference() for parameter in module.parameters()):
            raise ReplayError("the model was made under torch.inference_mode, so no gradient can pass through it; load it outside of that block")
        args = take_rows(self.args, rows, of=self.batch)
        kwargs = take_rows(self.kwargs, rows, of=self.batch)
        if isinstance(path[0], int):
            args = put(args, path, embedding)
        else:
            kwargs = put(kwargs, path, embedding)
        for place, value in self.changes:
            args, kwargs = (put(args, place, value), kwargs) if isinstance(place[0], int) else (args, put(kwargs, place, value))
        enabled, dtype = self._autocast
        autocast = torch.autocast(self._device_type, dtype=dtype, enabled=enabled)
        with replayed(module), checkpointed(module, lambda: replayed(module)), autocast, _saved_as_used():
            return module(*args, **kwargs)

    def changed(self, changes: Sequence[tuple[Path, Tensor]]) -> CallRecord:
        """The same call with other arguments exchanged, each for the rows that will be run."""
        part = copy.copy(self)
        part.changes = changes
        return part


class Replay:
    """``replay(embedding) -> pred_cond``: the captured call, conditional rows only, differentiable.

    Its first use is checked against the captured prediction: a replay that does not reproduce it raises `ReplayError`.
    """

    def __init__(
        self,
        call: CallRecord,
        *,
        rows: slice | Tensor,
        path: Path,
        embedding: Tensor,
        expected: Tensor,
        read: Callable[[Any], Tensor],
        against: tuple[CallRecord, slice | Tensor] | None = None,
    ) -> None:
        self._call, self._rows, self._path = call, rows, path
        self._embedding, self._expected, self._read = embedding, expected, read
        self._against = against  # where the unconditional rows stand: what differs between the two depends on the text
        self._checked = False  # each by itself: a cache may have computed one evaluation and skipped the next

    def __call__(self, embedding: Tensor) -> Tensor:
        if embedding.shape != self._embedding.shape:
            raise ReplayError(f"the embedding has shape {tuple(embedding.shape)}; the captured call took {tuple(self._embedding.shape)}")
        with torch.inference_mode(mode=False), torch.enable_grad():
            if not self._checked and not torch.equal(embedding.detach().to(self._embedding), self._embedding):
                with torch.no_grad():
                    self._check(self._run(self._embedding.clone()))
            predicted = self._run(embedding)
            if not self._checked:
                self._check(predicted.detach())
        return predicted

    def take(self, samples: Tensor) -> Replay:
        """The same replay for some of its samples, ``(k,)`` int64."""
        samples = samples.cpu()  # an index on the CPU fits tensors on every device
        rows = torch.arange(self._call.batch)[self._rows][samples]
        return Replay(
            self._call, rows=rows, path=self._path, embedding=self._embedding[samples], expected=self._expected[samples], read=self._read,
            against=self._against,
        )  # fmt: skip

    def reword(self, before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
        """The predictions for ``n`` other texts on every captured sample, text by text, ``(n b, ...)``.

        Args:
            before: What the text encoder makes of the captured prompt, ``(1, ...)`` each, the embedding first.
            after: The same for the other texts, ``(n, ...)`` each.

        Raises:
            ReplayError: The call depends on more of the text than the encoder's answers.
        """
        changes = self.other_text(before, after)
        if not self._checked:
            self(self._embedding.clone())
        samples = len(self._embedding)
        taken = self.take(torch.arange(samples).repeat(len(after[0])))
        taken._checked = True  # the same call, row by row
        taken._call = self._call.changed([(place, value.repeat_interleave(samples, 0)) for place, value in changes])
        return taken(after[0].to(self._embedding).repeat_interleave(samples, 0))

    def with_text(self, before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
        """The prediction with other tensors made of the text, differentiable in all of them.

        Args:
            before: What the text encoder makes of each sample's prompt, ``(b, ...)`` each, the embedding first.
            after: What takes the place of these, ``(b, ...)`` each.

        Raises:
            ReplayError: The call depends on more of the text than these.
        """
        changes = self.other_text(before, after)
        if not self._checked:
            self(self._embedding.clone())
        changed = copy.copy(self)
        changed._call = self._call.changed(changes)
        return changed(after[0])

    def other_text(self, before: Sequence[Tensor], after: Sequence[Tensor]) -> list[tuple[Path, Tensor]]:
        """What `reword` exchanges beside the embedding: where it stands, and its rows ``(n, ...)`` for the other texts."""
        return _other_text(self._call, self._rows, self._path, self._against, list(zip(before, after, strict=True))[1:])

    def _run(self, embedding: Tensor) -> Tensor:
        return self._read(self._call.again(self._rows, self._path, embedding.to(self._embedding.dtype)))

    def _check(self, predicted: Tensor) -> None:
        expected = self._expected.to(predicted.device)
        if predicted.shape != expected.shape:
            raise ReplayError(f"the replayed prediction has shape {tuple(predicted.shape)}, the captured one {tuple(expected.shape)}")
        wide = torch.promote_types(expected.dtype, torch.float32)
        error = float((predicted.to(wide) - expected.to(wide)).norm() / expected.to(wide).norm().clamp_min(1e-30))
        tolerance = _TOLERANCE.get(expected.dtype, 1e-2)
        if not error <= tolerance:
            raise ReplayError(
                f"running the captured call again gave another prediction (relative difference {error:.2g}, expected at most {tolerance:g}). "
                "The model may be in training mode (dropout), keep state between calls (caching), or have changed since; "
                "call model.eval() and replay inside the watch"
            )
        self._checked = True


def _other_text(
    call: CallRecord,
    rows: slice | Tensor,
    path: Path,
    against: tuple[CallRecord, slice | Tensor] | None,
    known: Sequence[tuple[Tensor, Tensor]],
) -> list[tuple[Path, Tensor]]:
    """What else of a call's arguments is made of the text, such as a pooled vector or a mask, each with what takes its place.

    Args:
        call: The captured call.
        rows: Its conditional rows.
        path: Where the embedding stands, which is not meant.
        against: The call and rows of the unconditional prediction.
        known: What the text encoder makes of the captured prompt ``(1, ...)``, and of the other texts ``(n, ...)``.

    Raises:
        ReplayError: An argument differs between the conditional and the unconditional rows and is nothing that the encoder made.
    """
    found: list[tuple[Path, Tensor]] = []
    for place, leaf in leaves(call.args, call.kwargs):
        if place[: len(path)] == path or leaf.ndim == 0 or not call.batch or leaf.shape[0] % call.batch:
            continue
        mine = leaf.reshape(call.batch, -1)[rows]
        match = next((after for before, after in known if leaf.shape[0] == call.batch and _is_made_of(before, leaf[rows])), None)
        if match is not None:
            found.append((place, match.to(leaf)))
        elif against is not None and not _is_sample(place) and not _same_rows(mine, look_up(against[0].args, against[0].kwargs, place), against):
            where = ".".join(map(str, place))
            raise ReplayError(
                f"the denoiser is given more of the text than its embedding: {where} {tuple(leaf.shape)} differs between the conditional and the "
                "unconditional rows, and it is nothing that encode made of the prompt. Let encode answer it too, after the embedding, or ask the "
                "host again: pass a function of texts instead of a trace"
            )
    return found


def _is_made_of(before: Tensor, rows: Tensor) -> bool:
    if rows.shape[1:] != before.shape[1:] or rows.is_floating_point() != before.is_floating_point():
        return False
    if not rows.is_floating_point():
        return torch.equal(rows, before.to(rows).expand_as(rows))
    wide = torch.promote_types(rows.dtype, torch.float32)
    expected = before.to(rows.device, wide).expand_as(rows)
    return bool((rows.to(wide) - expected).norm() <= _TOLERANCE.get(rows.dtype, 1e-2) * expected.norm().clamp_min(1e-30))


def _is_sample(place: Path) -> bool:
    return place[0] in (0, "sample", "hidden_states", "x", "latent_model_input", "latents")


def _same_rows(mine: Tensor, other: Any, against: tuple[CallRecord, slice | Tensor]) -> bool:
    record, rows = against
    if not isinstance(other, Tensor) or other.ndim == 0 or other.shape[0] % record.batch:
        return False
    theirs = other.reshape(record.batch, -1)[rows]
    return theirs.shape == mine.shape and bool(theirs.eq(mine).logical_or(theirs.ne(theirs) & mine.ne(mine)).all())


@contextlib.contextmanager
def replayed(module: nn.Module) -> Iterator[None]:
    """Calls inside the block are recorded by no watch, and leave the parameters and what the model keeps between calls alone."""
    with unrecorded(), set_aside(module), _frozen(module):
        yield


def _saved_as_used() -> contextlib.AbstractContextManager[Any]:
    """What a call saves for its backward pass stays what the call used.

    Layerwise casting and group offloading exchange a weight's data after its layer has run. Autograd saves the weight itself, and would
    find the data in the dtype of its storage, or on another device; an alias of the data that was used is out of their reach.
    """
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach(), lambda tensor: tensor)


_freeze_lock = threading.Lock()
_freezes: weakref.WeakKeyDictionary[nn.Module, tuple[int, dict[str, nn.Parameter]]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Parameters take no part in autograd inside the block: no ``.grad``, no saved activations for them."""
    with _freeze_lock:
        count, parameters = _freezes.get(module, (0, {}))
        if count == 0:
            parameters = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
            for parameter in parameters.values():
                parameter.requires_grad = False
        _freezes[module] = (count + 1, parameters)
    try:
        yield
    finally:
        with _freeze_lock:
            count, parameters = _freezes[module]
            if count == 1:
                current = dict(module.named_parameters())  # offloading may have put others in their place
                for name, parameter in parameters.items():
                    parameter.requires_grad = True
                    current.get(name, parameter).requires_grad = True
                del _freezes[module]
            else:
                _freezes[module] = (count - 1, parameters)
