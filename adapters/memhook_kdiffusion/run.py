"""One watch of a CFG wrapper: from its call, through the calls of its denoiser, to one evaluation."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from memhook.adapting.arguments import hook_calls_as_made
from memhook.adapting.hooks import Replaced, hook_arguments
from memhook.adapting.pairs import read_output
from memhook.adapting.substitution import replace_prediction
from memhook.adapting.tensors import version
from memhook.capture.prediction import Evaluation
from memhook.capture.trace import Row
from memhook.capture.unrecorded import unrecorded
from memhook.errors import GuidanceLayoutError
from memhook_kdiffusion.calls import Call, find_declared, find_embedding, read_call
from memhook_kdiffusion.conditioning import Names, Part, guidance_scale, read_conditioning
from memhook_kdiffusion.matching import Pairing, doubt, find_by, in_order, match
from memhook_kdiffusion.replays import Text, make_replay, read_text
from memhook_kdiffusion.rows import Doubts, fingerprints, rows_of, same_inputs, unconditional_text
from memhook_kdiffusion.space import Combined
from memhook_kdiffusion.substitution import RowSubstitution

if TYPE_CHECKING:
    from collections.abc import Callable

    from memhook.adapting.replay import Path
    from memhook.capture.intervention import Intervention
    from memhook.capture.prediction import Roles
    from memhook.hookspecs import Watcher

_RETRIED = 3  # evaluations that an adaptive sampler makes before it can reject a step

# Embeddings that watches of this thread or task put in the place of others: rows with one of them have the role of those that they stand for.
_substitutions: ContextVar[tuple[RowSubstitution, ...]] = ContextVar("memhook_kdiffusion_substitutions", default=())
_repeating: ContextVar[tuple[Run, Iterator[Tensor]] | None] = ContextVar("memhook_kdiffusion_repeating", default=None)


@dataclass(frozen=True)
class Form:
    """What is known of a wrapper beforehand.

    Attributes:
        name: Of its class, for messages.
        names: Of its parameters.
        layout: The declared order of rows; None where roles are found by identity.
        path: Where the embedding stands among the denoiser's arguments; None to find it.
        denoiser: Gives the module that the wrapper is about to call; None where it has none yet.
    """

    name: str
    names: Names
    layout: tuple[str, ...] | None
    path: Path | None
    denoiser: Callable[[nn.Module], nn.Module | None]


@dataclass(eq=False)
class _Opened:
    """A call of the wrapper that goes on."""

    x: Tensor
    sigma: Tensor  # (b,)
    cond: list[list[Part]]
    uncond: list[Part]
    scale: float | None
    denoiser: nn.Module | None
    state: dict[str, Any] | None  # the wrapper's attributes before the call
    continues: bool
    calls: list[Call] = field(default_factory=list)
    substituted: list[Tensor] = field(default_factory=list)


class Run:
    """What one watch makes of the calls that it sees."""

    def __init__(self, watcher: Watcher, form: Form) -> None:
        self._watcher, self._form = watcher, form
        self.hooks = contextlib.ExitStack()  # on denoisers, which a wrapper may make or exchange on the way
        self._hooked: list[weakref.ref[nn.Module]] = []
        self._opened: _Opened | None = None
        self._doubts = Doubts()
        self._seen: list[tuple[weakref.ref[Tensor], int | None]] = []  # noisy samples of the latest evaluations
        self._substitution: RowSubstitution | None = None

    # ---- what the hooks report ------------------------------------------------------------------------------------

    def on_open(self, wrapper: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The wrapper is about to be called."""
        if not self._watcher.listening:
            return
        self._opened = None  # what an exception has left
        named = {**getattr(wrapper, "memhook_arguments", dict)(), **self._form.names.bind(args, kwargs)}
        x, sigma = (named.get(name) for name in self._form.names.parameters[:2])
        if not isinstance(x, Tensor) or x.ndim < 2:
            raise GuidanceLayoutError(
                f"{self._form.name} was called with a {type(x).__name__} first; expected the noisy samples (b, ...), as k-diffusion's samplers "
                "call it"
            )
        samples = len(x)
        sigma = torch.as_tensor(sigma, device=x.device).detach().reshape(-1)
        cond, uncond = ([], []) if self._form.layout is not None else self._conditioning(named, samples)
        denoiser = self._form.denoiser(wrapper)
        if denoiser is not None:
            self.hook(denoiser)
        state = dict(vars(wrapper)) if self._watcher.wants_evaluations else None
        self._opened = _Opened(x, sigma.expand(samples), cond, uncond, guidance_scale(named), denoiser, state, self._tries_again(x))

    def on_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The denoiser is about to be called; the arguments that it is to get."""
        if self._substitution is None or self._opened is None or not self._watcher.listening:
            return args, kwargs
        start = sum(call.rows for call in self._opened.calls)
        return self._substitution(args, kwargs, self._opened.x, self._opened.sigma, start, self._opened.substituted)

    def on_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Replaced | None:
        """The denoiser was called."""
        repeating = _repeating.get()
        if repeating is not None and repeating[0] is self:
            values = next(repeating[1], None)
            if values is None:
                raise GuidanceLayoutError(f"{self._form.name}, asked twice for one noisy sample, called its denoiser more often the second time")
            return Replaced(replace_prediction(output, read_output(output), values))
        if self._opened is not None and self._watcher.listening:
            self._opened.calls.append(read_call(module, args, kwargs, output, find=self._finder(), keep=self._watcher.wants_evaluations))
        return None

    def keeps(self) -> bool:
        """Whether the call that is about to be made will be kept, with its tensors."""
        return self._watcher.listening and self._watcher.wants_evaluations

    def on_close(self, wrapper: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Replaced | None:
        """The wrapper has returned."""
        if not self._watcher.listening or self._opened is None:
            return None
        opened, self._opened = self._opened, None
        if opened.substituted and self._substitution is not None:
            self._substitution.substituted.append(torch.stack(opened.substituted).any())
        if not opened.calls:
            self._unseen(wrapper, opened)
            return None
        pairing = self._pair(opened)
        evaluation, combined, text = self._evaluation(opened, pairing)
        answer = self._watcher.emit(evaluation, self._row(opened, pairing, combined))
        if answer is None or evaluation.pred_uncond is None:
            return None
        if answer.embedding is not None and text is not None:
            replacement = answer.embedding.reshape(text.rows.shape)
            self._substitution = RowSubstitution(text.rows, replacement, opened.calls[0].path, answer.substituted, block=self._form.layout)
            _substitutions.set((*_substitutions.get(), self._substitution))
        if answer.pred_cond is None:
            return None
        again = self._again(wrapper, args, kwargs, opened, self._moved(opened, pairing, combined, answer))
        changed = (answer.pred_cond != evaluation.pred_cond).flatten(1).any(1)
        return Replaced(rows_of(changed, again, output))

    def close(self) -> None:
        """The block has ended, however."""
        _substitutions.set(tuple(other for other in _substitutions.get() if other is not self._substitution))
        self._opened = self._substitution = None
        self.hooks.close()

    def hook(self, denoiser: nn.Module) -> None:
        """See the calls of a denoiser from now on, to the end of the block."""
        if any(reference() is denoiser for reference in self._hooked):
            return
        self._hooked.append(weakref.ref(denoiser))
        self.hooks.enter_context(hook_arguments(denoiser, self.on_arguments))
        self.hooks.enter_context(hook_calls_as_made(denoiser, self.on_call, keep=self.keeps))

    # ---- private --------------------------------------------------------------------------------------------------

    def _conditioning(self, named: Mapping[str, Any], samples: int) -> tuple[list[list[Part]], list[Part]]:
        names, found = self._form.names, []
        for role, name in (("cond", names.cond), ("uncond", names.uncond)):
            value = named.get(name) if name is not None else None
            parts = read_conditioning(value, samples) if value is not None else None
            if parts is None and (value is not None or role == "cond"):
                seen = f"a {type(value).__name__}" + (f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else "")
                raise GuidanceLayoutError(
                    f"the argument {name or role!r} of {self._form.name} is {seen} for {samples} samples; expected their conditioning: a tensor "
                    f"with a row for each or one for all, a mapping that holds one, or the prompts of A1111. {_DECLARE}"
                )
            found.append(parts or [])
        return found[0], [parts[0] for parts in found[1]]

    def _finder(self) -> Callable[[Mapping[Path, Tensor]], Path | None]:
        if self._form.path is not None:
            return find_declared(self._form.path)
        if self._opened is None or self._form.layout is not None:
            return find_embedding
        return find_by([part for parts in self._opened.cond for part in parts])

    def _tries_again(self, x: Tensor) -> bool:
        """Whether an adaptive sampler goes back to the noisy sample of a step that it has rejected: the very same tensor, unchanged."""
        seen = any(reference() is x and changes == version(x) for reference, changes in self._seen)
        self._seen = [*self._seen[1 - _RETRIED :], (weakref.ref(x), version(x))]
        return seen

    def _unseen(self, wrapper: nn.Module, opened: _Opened) -> None:
        now = self._form.denoiser(wrapper)
        if now is None or now is opened.denoiser:
            raise GuidanceLayoutError(
                f"{self._form.name} ran without a call of its denoiser that hooks can see: it may call a plain method (apply_model, .forward) "
                "or another module than its .inner_model. Say which module it calls, as KDiffusionAdapter(wrapper, denoiser=module)"
            )
        self._watcher.missing(f"{self._form.name} exchanged its denoiser within this call; the calls after it are seen")
        nothing = torch.full_like(opened.x, torch.nan, dtype=torch.promote_types(opened.x.dtype, torch.float32))
        self._watcher.emit(
            Evaluation(nothing, None, sigma=opened.sigma.clone(), roles=self._roles),
            Row(None, sigma=opened.sigma.clone(), shape=tuple(opened.x.shape[1:]), continues=opened.continues),
        )

    @property
    def _roles(self) -> Roles:
        return "matched" if self._form.layout is None else "declared"

    def _pair(self, opened: _Opened) -> Pairing:
        layout, samples = self._form.layout, len(opened.x)
        if layout is None:
            cond = opened.cond
            for substitution in _substitutions.get():
                cond = substitution.known(cond)
            return match(opened.calls, cond, opened.uncond, opened.x, opened.sigma)
        rows = sum(call.rows for call in opened.calls)
        device = opened.calls[0].denoised.device
        if rows == len(layout) * samples:
            return in_order(layout, samples, device)
        if rows != samples:
            raise GuidanceLayoutError(
                f"{self._form.name} called its denoiser on {rows} rows for {samples} samples, where the layout {layout} expects "
                f"{len(layout) * samples}; declare the order of rows in one evaluation, through all calls"
            )
        lone = in_order(("cond", "uncond"), samples, device)
        return Pairing(lone.cond, lone.cond[:, 0], lone.weights, torch.zeros_like(lone.guided), lone.doubts)

    def _evaluation(self, opened: _Opened, pairing: Pairing) -> tuple[Evaluation, Combined, Text | None]:
        denoised = torch.cat([call.denoised for call in opened.calls])
        x = torch.cat([call.x[:, : denoised.shape[1]] for call in opened.calls])[pairing.cond[:, 0]]
        wide = torch.promote_types(denoised.dtype, torch.float32)
        combined = Combined(x.to(wide), opened.sigma.to(wide), denoised[pairing.uncond].to(wide), pairing.weights, pairing.guided)
        pred_cond = combined.pred_cond(denoised[pairing.cond])
        pred_uncond: Tensor | None = combined.pred_uncond()
        text, replay = None, None
        if self._watcher.wants_roles:  # they are decided now
            doubts, guided = (flags.tolist() for flags in (pairing.doubts, pairing.guided))
            self._decide(doubts, guided)
            pred_uncond = pred_uncond if any(guided) else None
        if self._watcher.wants_evaluations:
            text = read_text(opened.calls, pairing.cond, pairing.weights)
            replay = make_replay(opened.calls, pairing.cond, text, combined) if text is not None else None
        embedding = text.embedding if text is not None else None
        evaluation = Evaluation(pred_cond, pred_uncond, roles=self._roles, sigma=opened.sigma.clone(), embedding=embedding, replay=replay)
        return evaluation, combined, text

    def _row(self, opened: _Opened, pairing: Pairing, combined: Combined) -> Row:
        denoised = torch.cat([call.denoised for call in opened.calls])
        magnitude = torch.linalg.vector_norm(combined.difference(denoised[pairing.cond]).flatten(1), dim=1)
        number = self._doubts.add(pairing)

        def settle(row: Row) -> bool:
            doubts, guided = self._doubts[number]
            self._decide(doubts, guided)
            if not any(guided):
                row.magnitude = None
            if row.unconditional is not None:
                row.unconditional = row.unconditional.rows([at for at, has in enumerate(guided) if has]) if any(guided) else None
            return True

        return Row(
            torch.where(pairing.guided, magnitude, torch.nan),
            sigma=opened.sigma,
            same_inputs=same_inputs(opened.calls, pairing) if self._form.layout is not None else None,
            conditioning=fingerprints(opened.calls, pairing),
            unconditional=unconditional_text(opened.calls, pairing),
            shape=tuple(denoised.shape[1:]),
            roles="matched" if self._form.layout is None else None,
            scale=None if opened.scale is None else np.full(len(opened.x), opened.scale),
            settle=settle,
            continues=opened.continues,
        )

    def _decide(self, doubts: Sequence[bool], guided: Sequence[bool]) -> None:
        """Raise where roles are not clear, and say why what is missing is missing."""
        reason = doubt(doubts, guided)
        if reason is not None:
            raise GuidanceLayoutError(f"the roles of {self._form.name}'s predictions are not clear: it called its denoiser on {reason}. {_DECLARE}")
        if not all(guided):
            self._watcher.missing(
                f"{self._form.name} made no unconditional pass in this evaluation (guidance is off, or this host skips it at some noise levels); "
                "use a scale above 1, and turn off what skips it (A1111: negative guidance minimum sigma, skip early CFG)"
            )

    def _moved(self, opened: _Opened, pairing: Pairing, combined: Combined, answer: Intervention) -> list[Tensor]:
        """The denoiser's outputs, call by call, had the conditional prediction been the answer's."""
        assert answer.pred_cond is not None  # noqa: S101 -- for the type checker
        denoised = torch.cat([call.denoised for call in opened.calls])
        old = denoised[pairing.cond]  # (b, k, ...)
        moved = combined.moved(old, answer.pred_cond).to(denoised)
        present = pairing.weights.to(denoised.device).ne(0) & (answer.pred_cond != combined.pred_cond(old)).flatten(1).any(1)[:, None]  # (b, k)
        denoised[pairing.cond[present]] = moved[present]
        return list(torch.split(denoised, [call.rows for call in opened.calls]))

    def _again(self, wrapper: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], opened: _Opened, outputs: Sequence[Tensor]) -> Any:
        """Let the wrapper combine other predictions, whatever its formula is; it counts as one call for what the wrapper counts."""
        for name, value in (opened.state or {}).items():
            if wrapper.__dict__.get(name) is not value:
                wrapper.__dict__[name] = value
        token = _repeating.set((self, iter(outputs)))
        try:
            with unrecorded():
                return wrapper(*args, **kwargs)
        finally:
            _repeating.reset(token)


_DECLARE = (
    'Declare the order of rows in one evaluation: KDiffusionAdapter(wrapper, layout="uncond_first"), "cond_first", or a tuple such as '
    '("cond", "other", "uncond")'
)
