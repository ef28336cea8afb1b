"""Finding adapters and scores: entry points are loaded lazily and one by one, so that a broken one hurts nobody else."""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

import pluggy

from memhook import hookspecs
from memhook.errors import AmbiguousAdapterError, MemhookError, NoAdapterError
from memhook.hookspecs import PROJECT, Adapter

if TYPE_CHECKING:
    from collections.abc import Mapping

_lock = threading.RLock()
_OWN = "memhook"  # the plugin that offers the published scores
_OWN_SCORES = "memhook.scores.published"  # by name: the library's own methods are plugins too, loaded when a score is asked for


@dataclass(frozen=True)
class PluginState:
    """One adapter plugin: where it comes from, and why it is not in use, if so."""

    name: str
    origin: str  # distribution and version
    module: str
    problem: str | None = None


@dataclass(frozen=True)
class _Loaded:
    manager: pluggy.PluginManager
    states: tuple[PluginState, ...]


@cache
def _load() -> _Loaded:
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    states = []
    for point in sorted(entry_points(group=PROJECT), key=lambda point: (point.name, _origin(point))):
        problem = _register(manager, point)
        if problem is not None:
            warnings.warn(f"memhook leaves out the adapter {point.name!r} of {_origin(point)}: {problem}", stacklevel=4)
        states.append(PluginState(point.name, _origin(point), point.value, problem))
    return _Loaded(manager, tuple(states))


def _origin(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else "an unknown distribution"


def _register(manager: pluggy.PluginManager, point: EntryPoint) -> str | None:
    if manager.has_plugin(point.name):
        return f"another distribution already registered an adapter named {point.name!r}; remove one of the two"
    try:
        plugin = point.load()
        manager.register(plugin, name=point.name)
        manager.check_pending()
    except (Exception, SystemExit) as error:  # noqa: BLE001 -- third-party code: whatever it raises must not stop the others
        if manager.has_plugin(point.name):
            manager.unregister(name=point.name)
        return _brief(error)
    if not manager.get_hookcallers(plugin):
        manager.unregister(name=point.name)
        return f"{point.value} implements no hook; mark its memhook_adapt with @memhook.hookimpl, or its memhook_scores"
    return None


def plugin_states() -> tuple[PluginState, ...]:
    """All installed adapter plugins, in use or left out."""
    with _lock:
        return _load().states


def register(plugin: object, name: str | None = None) -> None:
    """Register an adapter plugin of this process (a module or object with a ``memhook_adapt`` hook implementation)."""
    with _lock:
        _load().manager.register(plugin, name=name)


def unregister(plugin: object) -> None:
    """Undo `register`."""
    with _lock:
        _load().manager.unregister(plugin)


def find_adapter(target: object) -> Adapter:
    """The one adapter that claims ``target``.

    Raises:
        NoAdapterError: None does; says what to do for the kinds of target that people try.
        AmbiguousAdapterError: Several do; names them.
    """
    if isinstance(target, Adapter):
        return target
    with _lock:
        manager = _load().manager
    claims: list[tuple[str, Adapter]] = []
    failures: dict[str, BaseException] = {}
    for implementation in manager.hook.memhook_adapt.get_hookimpls():
        name = implementation.plugin_name
        try:
            adapter: Any = implementation.function(target)
        except MemhookError:  # it knows the target, and why it cannot be watched
            raise
        except (Exception, SystemExit) as error:  # noqa: BLE001 -- third-party code: it must not stop the others
            failures[name] = error
            warnings.warn(f"the memhook adapter {name!r} failed on a {_kind(target)}: {_brief(error)}", stacklevel=3)
            continue
        if adapter is not None:
            claims.append((name, adapter))
    if len(claims) > 1:
        names = ", ".join(name for name, _ in claims)
        raise AmbiguousAdapterError(
            f"the adapters {names} all claim a {_kind(target)}; pass the one you mean as adapter=..., or uninstall the others"
        )
    if not claims:
        raise NoAdapterError(_no_adapter(target, failures))
    return claims[0][1]


@dataclass(frozen=True)
class Offered:
    """What a plugin offers under ``memhook_scores``."""

    score: Any
    plugin: str
    name: str  # as far as it has one


def offered_scores() -> tuple[tuple[Offered, ...], dict[str, str]]:
    """All scores of all plugins, memhook's own first, and for each plugin that failed to offer any the reason."""
    with _lock:
        manager = _load().manager
        if not manager.has_plugin(_OWN):
            manager.register(import_module(_OWN_SCORES), name=_OWN)
    found: list[Offered] = []
    failures = {}
    for implementation in sorted(manager.hook.memhook_scores.get_hookimpls(), key=lambda known: (known.plugin_name != _OWN, known.plugin_name)):
        plugin = implementation.plugin_name
        try:
            given: Any = implementation.function()
            scores = list(given)
        except Exception as error:  # noqa: BLE001 -- third-party code: it must not stop the others
            failures[plugin] = _brief(error)
            warnings.warn(f"the scores of the memhook plugin {plugin!r} are left out: memhook_scores failed with {_brief(error)}", stacklevel=3)
            continue
        found += [Offered(score, plugin, str(getattr(score, "name", None) or getattr(score, "__name__", None) or repr(score))) for score in scores]
    return tuple(found), failures


def find_score(name: str) -> tuple[Any, str]:
    """The one score of this name, and the plugin that offers it.

    Raises:
        MemhookError: No plugin has one, or several do; names them.
    """
    offered, failures = offered_scores()
    mine = [offer for offer in offered if offer.name == name]
    if len(mine) > 1:
        names = " and ".join(repr(offer.plugin) for offer in mine)
        raise MemhookError(
            f"the plugins {names} each have a score named {name!r}; uninstall one of them, or give the score itself instead of its name"
        )
    if not mine:
        known = ", ".join(dict.fromkeys(offer.name for offer in offered))
        failed = "".join(f"; {plugin!r} failed ({reason})" for plugin, reason in failures.items())
        raise MemhookError(
            f"there is no score named {name!r}; installed are {known}{failed}. `memhook methods` lists them, docs/scores.md says how to add one"
        )
    return mine[0].score, mine[0].plugin


def _kind(target: object) -> str:
    return f"{type(target).__module__}.{type(target).__qualname__}"


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"  # on one line


def _no_adapter(target: object, failures: Mapping[str, BaseException]) -> str:
    import torch

    failed = "".join(f" (the adapter {name!r} failed on it: {_brief(error)})" for name, error in failures.items())
    seen = f"no adapter knows how to watch a {_kind(target)}{failed}"
    if isinstance(target, torch.nn.Module):
        return (
            f"{seen}. For a bare denoiser, say how its guided calls are laid out: "
            'memhook.watch(module, adapter=memhook.ModuleAdapter(module, layout="uncond_first"))'
        )
    in_use = [state.name for state in plugin_states() if state.problem is None]
    left_out = [f"{state.name} ({state.problem})" for state in plugin_states() if state.problem is not None]
    problems = f"; left out: {'; '.join(left_out)}" if left_out else ""
    return f"{seen}. Installed adapters: {', '.join(in_use) or 'none'}{problems}. See adapters/README.md for how to write one"
