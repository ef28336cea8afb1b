"""Adapter plugins: found through entry points, one by one, so that a broken one is named and hurts no other."""

import contextlib
import sys
import types
import warnings

import pytest

import memhook
from memhook import AmbiguousAdapterError, NoAdapterError, hookimpl, plugins
from memhook.testing import tiny_unet


class Host:
    """What the fake adapters know how to watch."""


class FakeAdapter:
    host = "fake"

    def __init__(self, target):
        self.target = target

    def attach(self, watcher):
        return contextlib.nullcontext()

    def describe(self):
        return {}


class Distribution:
    def __init__(self, name, version="1.0"):
        self.name, self.version = name, version


class Point:
    """An entry point, as `importlib.metadata` gives it."""

    def __init__(self, name, load, dist="some-wheel"):
        self.name, self.value, self.load = name, f"{name}_module", load
        self.dist = Distribution(dist) if dist else None


def module(adapt):
    """A plugin module whose hook implementation is ``adapt``."""
    found = types.ModuleType("plugin")
    found.memhook_adapt = hookimpl(adapt)
    return found


def claims(kind):
    def memhook_adapt(target):
        return FakeAdapter(target) if isinstance(target, kind) else None

    return module(memhook_adapt)


@pytest.fixture
def installed(monkeypatch):
    """``installed(*points)`` makes these the installed entry points."""

    def install(*points):
        monkeypatch.setattr(plugins, "entry_points", lambda group: list(points) if group == "memhook" else [])
        plugins._load.cache_clear()

    yield install
    plugins._load.cache_clear()


def broken(error):
    def load():
        raise error

    return load


def test_an_installed_adapter_is_found(installed):
    installed(Point("fake", lambda: claims(Host)))
    target = Host()
    adapter = plugins.find_adapter(target)
    assert adapter.target is target
    with memhook.watch(target) as trace:
        pass
    assert trace.host == "fake"


def test_nothing_is_loaded_before_it_is_needed_and_then_once(installed):
    loaded = []
    installed(Point("fake", lambda: loaded.append(1) or claims(Host)))
    assert not loaded
    for _ in range(3):
        plugins.find_adapter(Host())
    assert loaded == [1]


def misspelt():
    found = types.ModuleType("misspelt")
    found.memhook_adpat = hookimpl(lambda target: None)
    return found


BROKEN = {
    "import": (broken(ImportError("No module named 'host'")), "ImportError: No module named 'host'"),
    "syntax": (broken(SyntaxError("invalid syntax")), "SyntaxError: invalid syntax"),
    "attribute": (broken(AttributeError("no such attribute")), "AttributeError: no such attribute"),
    "another argument": (lambda: module(lambda pipeline: None), "pipeline"),
    "misspelt hook": (misspelt, "memhook_adpat"),
    "exit": (broken(SystemExit(2)), "SystemExit: 2"),
    "no hook": (lambda: types.ModuleType("empty"), "implements no hook; mark its memhook_adapt with @memhook.hookimpl, or"),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("name", ["a", "z"])  # before and after the good one
def test_a_broken_adapter_is_named_and_hurts_no_other(installed, kind, name):
    load, problem = BROKEN[kind]
    installed(Point("good", lambda: claims(Host)), Point(name, load, dist="broken-wheel"))
    with pytest.warns(UserWarning, match=rf"leaves out the adapter '{name}' of broken-wheel 1\.0: .*{problem}") as caught:
        assert plugins.find_adapter(Host()).host == "fake"
    assert len(caught) == 1
    states = {state.name: state for state in plugins.plugin_states()}
    assert states["good"].problem is None
    assert problem in states[name].problem
    assert (states[name].origin, states[name].module) == ("broken-wheel 1.0", f"{name}_module")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert plugins.find_adapter(Host()).host == "fake"


def test_the_error_for_an_unknown_target_lists_what_was_left_out(installed):
    installed(Point("good", lambda: claims(Host)), Point("bad", BROKEN["import"][0]))
    with pytest.warns(UserWarning, match="leaves out"), pytest.raises(NoAdapterError) as caught:
        plugins.find_adapter("a string")
    message = str(caught.value)
    assert "no adapter knows how to watch a builtins.str" in message
    assert "Installed adapters: good; left out: bad (ImportError: No module named 'host')" in message


def test_two_distributions_with_one_name(installed):
    """Neither vanishes silently: the first by name of distribution is used, the other is named."""
    installed(Point("fake", lambda: claims(int), dist="b-wheel"), Point("fake", lambda: claims(Host), dist="a-wheel"))
    with pytest.warns(UserWarning, match=r"'fake' of b-wheel 1\.0: another distribution already registered an adapter named 'fake'; remove one"):
        assert plugins.find_adapter(Host()).host == "fake"
    assert [state.problem is None for state in plugins.plugin_states()] == [True, False]


def test_an_entry_point_without_a_distribution(installed):
    installed(Point("fake", lambda: claims(Host), dist=None))
    assert plugins.find_adapter(Host()).host == "fake"
    assert plugins.plugin_states()[0].origin == "an unknown distribution"


# ---- claims


def test_two_claims_are_an_error_that_names_both(installed):
    installed(Point("first", lambda: claims(Host)), Point("second", lambda: claims(object)), Point("third", lambda: claims(int)))
    with pytest.raises(
        AmbiguousAdapterError, match=r"the adapters (first, second|second, first) all claim a .*Host; pass the one you mean as adapter="
    ):
        plugins.find_adapter(Host())
    assert plugins.find_adapter(Host.__new__(type("Other", (), {}))).host == "fake"  # only one claims this


def test_an_adapter_given_by_hand_settles_it(installed):
    installed(Point("first", lambda: claims(Host)), Point("second", lambda: claims(Host)))
    target = Host()
    with memhook.watch(target, adapter=FakeAdapter(target)) as trace:
        pass
    assert trace.host == "fake"


def failing(error):
    def memhook_adapt(target):
        raise error

    return module(memhook_adapt)


def test_an_adapter_that_fails_on_a_target_is_named_and_hurts_no_other(installed):
    installed(Point("good", lambda: claims(Host)), Point("bad", lambda: failing(AttributeError("no 'unet'"))))
    with pytest.warns(UserWarning, match=r"adapter 'bad' failed on a .*Host: AttributeError: no 'unet'"):
        assert plugins.find_adapter(Host()).host == "fake"


def test_an_adapter_that_asks_to_exit_on_a_target_hurts_no_other(installed):
    installed(Point("bad", lambda: module(exits)), Point("good", lambda: claims(Host)))
    with pytest.warns(UserWarning, match=r"the memhook adapter 'bad' failed on a .*Host: SystemExit: 3"):
        assert isinstance(plugins.find_adapter(Host()), FakeAdapter)


def exits(target):
    raise SystemExit(3)


def test_an_interruption_while_plugins_load_is_not_swallowed(installed):
    installed(Point("bad", broken(KeyboardInterrupt())))
    with pytest.raises(KeyboardInterrupt):
        plugins.plugin_states()


def test_where_no_other_claims_the_failure_is_in_the_error(installed):
    installed(Point("bad", lambda: failing(AttributeError("no 'unet'"))))
    with (
        pytest.warns(UserWarning, match="failed on"),
        pytest.raises(NoAdapterError, match="the adapter 'bad' failed on it: AttributeError: no 'unet'"),
    ):
        plugins.find_adapter(Host())


def test_an_adapter_may_say_itself_why_its_target_cannot_be_watched(installed):
    installed(Point("fake", lambda: failing(NoAdapterError("this pipeline has no denoiser"))))
    with pytest.raises(NoAdapterError, match="this pipeline has no denoiser"):
        plugins.find_adapter(Host())


def test_an_adapter_is_its_own(installed):
    installed()
    adapter = FakeAdapter(Host())
    assert plugins.find_adapter(adapter) is adapter


# ---- none


def test_the_remedy_for_a_bare_module(installed):
    installed()
    with pytest.raises(NoAdapterError, match=r'TinyUNet.*memhook\.watch\(module, adapter=memhook\.ModuleAdapter\(module, layout="uncond_first"\)\)'):
        plugins.find_adapter(tiny_unet())


def test_the_remedy_for_anything_else(installed):
    installed()
    with pytest.raises(NoAdapterError, match=r"Host\. Installed adapters: none\. See adapters/README\.md for how to write one"):
        plugins.find_adapter(Host())


# ---- adapters of the process


def test_register_and_unregister(installed):
    installed()
    plugin = claims(Host)
    plugins.register(plugin, name="mine")
    assert plugins.find_adapter(Host()).host == "fake"
    plugins.unregister(plugin)
    with pytest.raises(NoAdapterError):
        plugins.find_adapter(Host())


def test_several_threads_load_once(installed):
    from concurrent.futures import ThreadPoolExecutor

    loaded = []
    installed(Point("fake", lambda: loaded.append(1) or claims(Host)))
    with ThreadPoolExecutor(8) as pool:
        assert {adapter.host for adapter in pool.map(plugins.find_adapter, [Host() for _ in range(32)])} == {"fake"}
    assert loaded == [1]


def test_the_adapters_of_this_repository_load():
    plugins._load.cache_clear()
    assert {state.name: state.problem for state in plugins.plugin_states()} == dict.fromkeys(_declared())


def _declared():
    import pathlib

    tomllib = pytest.importorskip("tomllib") if sys.version_info < (3, 11) else __import__("tomllib")
    pyproject = tomllib.loads((pathlib.Path(__file__).parents[1] / "pyproject.toml").read_text())
    return pyproject["project"]["entry-points"]["memhook"]
