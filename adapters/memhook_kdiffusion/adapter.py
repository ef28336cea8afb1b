"""Watching a CFG wrapper that a k-diffusion sampler calls."""

from __future__ import annotations

import contextlib
import weakref
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from memhook.adapting.fingerprint import Fingerprinted
from memhook.adapting.hooks import hook_arguments, hook_calls
from memhook.errors import MemhookError, NoAdapterError
from memhook_kdiffusion.conditioning import Names
from memhook_kdiffusion.run import Form, Run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from memhook.adapting.replay import Path
    from memhook.hookspecs import Watcher

Order = Literal["uncond_first", "cond_first"] | tuple[str, ...]
_ORDERS = {"uncond_first": ("uncond", "cond"), "cond_first": ("cond", "uncond")}
_DEPTH = 4  # of attributes in which the network is looked for


class KDiffusionAdapter:
    """Watch a wrapper that does classifier-free guidance around a denoiser ``(x, sigma, ...) -> x0``, for any sampler of k-diffusion.

    Without ``layout`` each row of the denoiser's calls gets its role by comparing what it was made from with the wrapper's arguments (``cond`` and
    ``uncond``, ``x``, ``sigma``), in however many calls and whatever order. Where that cannot tell, reading the trace is an error, never a guess.

    Magnitudes are in noise space, ``(x0_u - x0_c) / sigma``, also for models that predict a velocity.

    Args:
        wrapper: The module that the sampler is given; not kept alive. See `memhook_kdiffusion.wrap` for functions.
        layout: The order of rows in one evaluation, through all of its calls: ``"uncond_first"``, ``"cond_first"``, or a tuple of
            ``"cond"``, ``"uncond"`` and any other word, each a block of one row a sample, as ``("cond", "image", "uncond")``.
        denoiser: The module that the wrapper calls; its ``.inner_model`` where None.
        cond: The wrapper's parameter that holds the conditioning; found by its usual names where None.
        uncond: The same for the unconditional one.
        embedding: Where the text embedding stands among the denoiser's arguments: a keyword, a position, or a tuple of keys into nested
            arguments, such as ``("cond", "c_crossattn", 0)``. Found where None.

    >>> import torch, memhook
    >>> from memhook.testing import tiny_unet
    >>> from memhook_kdiffusion import guided
    >>> unet = tiny_unet()
    >>> model = guided(lambda x, sigma, cond: x - sigma[:, None, None, None] * unet(x, sigma, cond),
    ...                cond=torch.ones(2, 5, 6), uncond=torch.zeros(2, 5, 6), cond_scale=7.5)
    >>> with memhook.watch(model) as trace:
    ...     denoised = model(torch.randn(2, 4, 8, 8), torch.full((2,), 14.6))
    >>> trace.magnitudes.shape, trace.space, trace.roles
    ((1, 2), 'eps', 'matched')
    """

    host = "kdiffusion"
    intervenes = True

    def __init__(
        self,
        wrapper: nn.Module,
        *,
        layout: Order | None = None,
        denoiser: nn.Module | None = None,
        cond: str | None = None,
        uncond: str | None = None,
        embedding: str | int | Path | None = None,
    ) -> None:
        if not isinstance(wrapper, nn.Module):
            raise MemhookError(
                f"the wrapper is a {type(wrapper).__name__}; expected a torch.nn.Module, whose calls hooks can see. Make one of it with "
                "memhook_kdiffusion.wrap(function, denoiser=module, layout=...), and give that to the sampler"
            )
        if (
            denoiser is None
            and not hasattr(type(wrapper), "inner_model")
            and "inner_model" not in wrapper._modules
            and "inner_model" not in vars(wrapper)
        ):
            raise MemhookError(f"{type(wrapper).__name__} has no .inner_model; say which module it calls, as denoiser=module")
        self._wrapper = weakref.ref(wrapper)
        self._denoiser = weakref.ref(denoiser) if denoiser is not None else None
        signature = getattr(wrapper, "memhook_signature", wrapper.forward)
        names = Names.of(signature, cond=cond, uncond=uncond)
        self._layout = _order(layout)
        if self._layout is None and (names.cond is None or names.uncond is None):
            missing = " and ".join(role for role, name in (("conditional", names.cond), ("unconditional", names.uncond)) if name is None)
            raise MemhookError(
                f"{type(wrapper).__name__} takes ({', '.join(names.parameters)}), among which the {missing} conditioning was not found by its "
                'usual names; name it as KDiffusionAdapter(wrapper, cond="...", uncond="..."), or declare the order of rows, as layout="uncond_first"'
            )
        self._names = names
        self._path: Path | None = embedding if isinstance(embedding, tuple) or embedding is None else (embedding,)
        self._fingerprint: Fingerprinted | None = None

    @contextlib.contextmanager
    def attach(self, watcher: Watcher) -> Iterator[None]:
        wrapper = self._wrapper()
        if wrapper is None:
            raise MemhookError("the wrapper of this adapter was deleted before it was watched; make an adapter for the one that the sampler is given")
        run = Run(watcher, Form(type(wrapper).__name__, self._names, self._layout, self._path, self._find))
        with contextlib.ExitStack() as stack:
            stack.callback(run.close)
            denoiser = self._find(wrapper)
            if denoiser is not None:
                run.hook(denoiser)
            target = weakref.ref(wrapper)

            def on_open(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
                opened = target()
                if opened is not None:
                    run.on_open(opened, args, kwargs)
                return args, kwargs

            stack.enter_context(hook_arguments(wrapper, on_open))
            stack.enter_context(hook_calls(wrapper, run.on_close))
            del wrapper, denoiser  # the block must not keep them alive
            yield

    def describe(self) -> Mapping[str, Any]:
        return self.snapshot()()

    def snapshot(self) -> Callable[[], Mapping[str, Any]]:
        """What `describe` says now, to be read later."""
        if self._fingerprint is None:
            wrapper = self._wrapper()
            if wrapper is None or self._find(wrapper) is None:
                raise MemhookError(
                    "the denoiser of this trace is not known any more, so its fingerprint cannot be taken; keep it until the `with` block ends"
                )
        assert self._fingerprint is not None  # noqa: S101 -- for the type checker: found with the denoiser
        return self._fingerprint.snapshot()

    def _find(self, wrapper: nn.Module) -> nn.Module | None:
        """The module that the wrapper calls; None where it has none yet (A1111 makes it when it is first asked for)."""
        if self._denoiser is not None:
            found: Any = self._denoiser()
        else:
            try:
                found = wrapper.inner_model
            except (AttributeError, NotImplementedError):
                return None
        if not isinstance(found, nn.Module):
            return None
        if self._fingerprint is None:
            self._fingerprint = Fingerprinted({"model": find_network(found)})
        return found


def _order(layout: Order | None) -> tuple[str, ...] | None:
    if layout is None:
        return None
    order = _ORDERS.get(layout) if isinstance(layout, str) else layout
    if not isinstance(order, tuple) or order.count("cond") != 1 or order.count("uncond") != 1:
        raise MemhookError(
            f'layout is {layout!r}; expected "uncond_first", "cond_first", or a tuple of words that holds "cond" and "uncond" once each, such as '
            '("cond", "image", "uncond")'
        )
    return order


def find_network(denoiser: nn.Module) -> nn.Module:
    """The module that holds a denoiser's parameters, without the denoisers around it, so that one network has one fingerprint.

    Some denoisers hold their network in an object that is no module (the model of diffusers' k pipelines).
    """
    found: Any = denoiser
    for _ in range(_DEPTH):
        inner = getattr(found, "inner_model", None)
        if inner is None:
            break
        found = inner
    if isinstance(found, nn.Module) and next(found.parameters(), None) is not None:
        return found
    parts = [part for part in vars(found).values() if isinstance(part, nn.Module)] if hasattr(found, "__dict__") else []
    return next((part for part in parts if next(part.parameters(), None) is not None), denoiser)


def claim(target: object) -> KDiffusionAdapter | None:
    """An adapter for a module with an ``inner_model`` that is called with a conditional and an unconditional conditioning; None for others.

    Raises:
        NoAdapterError: The target is a denoiser of k-diffusion, which makes no guided calls by itself.
    """
    if not isinstance(target, nn.Module) or not (
        hasattr(type(target), "inner_model") or "inner_model" in target._modules or "inner_model" in vars(target)
    ):
        return None
    layout = getattr(target, "memhook_layout", None)
    names = Names.of(getattr(target, "memhook_signature", target.forward))
    if layout is not None or (names.cond is not None and names.uncond is not None):
        return KDiffusionAdapter(target, layout=layout)
    if hasattr(target, "get_scalings") and hasattr(target, "sigma_to_t"):
        raise NoAdapterError(
            f"a {type(target).__name__} is a denoiser, which makes no guided prediction by itself; watch the CFG wrapper around it, which "
            "the sampler is given, or make one of a function with memhook_kdiffusion.wrap"
        )
    return None
