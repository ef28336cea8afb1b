"""What is shipped: adapters, names, and an import that stays light."""

import ast
import importlib
import importlib.metadata
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

import memhook

tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")  # the files are the same for every Python

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

pytestmark = pytest.mark.skipif(not (ROOT / "adapters").is_dir(), reason="not in a source tree")


def test_adapter_folders_are_shipped_and_registered():
    """A folder that is not listed twice would silently be missing from the wheel, or be shipped and never found."""
    folders = {folder.name for folder in (ROOT / "adapters").iterdir() if folder.is_dir() and list(folder.glob("*.py"))}
    packages = {Path(package) for package in PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]}
    shipped = {package.name for package in packages if package.parts[0] == "adapters"}
    registered = set(PYPROJECT["project"]["entry-points"]["memhook"].values())
    assert folders == shipped == registered
    assert packages - {Path("adapters") / name for name in shipped} == {Path("memhook")}


def test_installed_entry_points_are_those_declared():
    found = {point.name: point.value for point in importlib.metadata.entry_points(group="memhook") if point.dist.name == "memhook-diffusion"}
    assert found == PYPROJECT["project"]["entry-points"]["memhook"]


def test_every_adapter_is_a_package_of_its_own():
    """`adapters` itself is somebody else's name on the package index."""
    assert not (ROOT / "adapters" / "__init__.py").exists()
    for name in PYPROJECT["project"]["entry-points"]["memhook"].values():
        assert (ROOT / "adapters" / name / "__init__.py").is_file()
        assert name.startswith("memhook_")


def test_adapters_are_type_checked_too():
    assert set(PYPROJECT["tool"]["mypy"]["files"]) == set(PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])


def test_versions_agree():
    assert memhook.__version__ == PYPROJECT["project"]["version"] == importlib.metadata.version("memhook-diffusion")


def test_types_are_shipped():
    assert (Path(memhook.__file__).parent / "py.typed").is_file()


def test_public_names_exist_once_and_in_order():
    assert memhook.__all__ == sorted(set(memhook.__all__), key=lambda name: (not name.isupper(), name[0].islower(), name))
    assert all(hasattr(memhook, name) for name in memhook.__all__)


def test_public_names_are_documented():
    undocumented = [name for name in memhook.__all__ if not (getattr(memhook, name).__doc__ or "").strip()]
    assert not undocumented


HEAVY = (
    "transformers",
    "diffusers",
    "accelerate",
    "matplotlib",
    "comfy",
    "k_diffusion",
    "sklearn",
    "scipy",
    "pandas",
    "PIL",
    "typer",
    "rich",
    "torch._dynamo",
)


def imported(statement):
    """The modules that are loaded in a fresh interpreter after a statement."""
    code = f"{statement}\nimport json, sys; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_importing_memhook_is_light():
    loaded = imported("import memhook")
    assert loaded.isdisjoint({*HEAVY, "torch", "numpy"})
    assert not {name for name in loaded if name.startswith("memhook_")}  # adapters are found when they are needed


def test_looking_for_an_adapter_imports_no_host():
    """Nor does loading every installed adapter: a target of a host means that the host is imported already."""
    loaded = imported("import memhook.plugins as p; assert all(state.problem is None for state in p.plugin_states())")
    assert loaded.isdisjoint({"transformers", "diffusers", "comfy", "k_diffusion", "matplotlib"})
    assert {name for name in loaded if re.fullmatch(r"memhook_\w+", name)} == set(PYPROJECT["project"]["entry-points"]["memhook"].values())


def test_watching_a_module_imports_no_extra():
    loaded = imported(
        "import memhook; from memhook.testing import sample, tiny_unet; unet = tiny_unet()\n"
        "with memhook.watch(unet, adapter=memhook.ModuleAdapter(unet, layout='uncond_first')) as trace: sample(unet)\n"
        "memhook.detect(trace, memhook.calibrate(range(99)))"
    )
    assert loaded.isdisjoint(HEAVY)


def test_names_are_found_where_type_checkers_are_told_to_look():
    """The table of the lazy names and the imports beside it are one list, written twice."""
    tree = ast.parse(Path(memhook.__file__).read_text())
    (told,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in told.body for alias in node.names}
    assert sorted(seen) == sorted(memhook.__all__)
    assert {name: getattr(memhook, name) for name in seen} == {name: getattr(importlib.import_module(seen[name]), name) for name in seen}


def test_no_submodule_takes_the_place_of_a_public_name():
    """An import of `memhook.x` sets the attribute x of `memhook`, which must not be the function of that name."""
    code = (
        "import importlib, inspect, json, pkgutil, memhook\n"
        "rooms = ['memhook'] + ['memhook.' + m.name for m in pkgutil.iter_modules(memhook.__path__) if m.ispkg]\n"
        "for module in list(pkgutil.walk_packages(memhook.__path__, 'memhook.')):\n"
        "    module.name.endswith('__main__') or importlib.import_module(module.name)\n"
        "rooms = [importlib.import_module(name) for name in rooms]\n"
        "public = [(room.__name__, name, getattr(room, name)) for room in rooms for name in getattr(room, '__all__', [])]\n"
        "print(json.dumps([len(public), [[room, name] for room, name, value in public if inspect.ismodule(value)]]))"
    )
    count, hidden = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert count > 60
    assert hidden == []


@pytest.mark.parametrize("name", ["baselines", "evaluation", "similarity", "testbed", "testing", "training"])
def test_a_part_that_documents_name_is_an_attribute(name):
    code = f"import memhook; assert memhook.{name}.__name__ == 'memhook.{name}'; assert {name!r} in dir(memhook)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_star_imports_every_public_name():
    names = {}
    exec("from memhook import *", names)  # noqa: S102
    assert set(memhook.__all__) <= set(names)


def test_a_misspelt_name_is_an_error_that_names_it():
    with pytest.raises(AttributeError, match="module 'memhook' has no attribute 'wacth'"):
        memhook.wacth  # noqa: B018


def test_values_survive_pickling():
    for value in (memhook.Trace, memhook.watch, memhook.NoGuidanceError):
        assert pickle.loads(pickle.dumps(value)) is value  # noqa: S301


def command_lines(command, words=()):
    """Every command and group below one."""
    yield words
    for name, inner in getattr(command, "commands", {}).items():
        yield from command_lines(inner, (*words, name))


def test_help_and_version_import_no_work():
    """Of every command: only what a command does needs torch, not what it is called and which options it has."""
    from typer.main import get_command

    from memhook.cli.app import app

    lines = [[*words, "--help"] for words in command_lines(get_command(app))]
    assert len(lines) > 15
    code = (
        "import contextlib, io, json, sys\nfrom memhook.cli import main\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    sys.argv = ['memhook', *words]\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):\n"
        "        main()\n"
        "    assert 'Usage' in shown.getvalue() or memhook_version in shown.getvalue(), words\n"
        "    found = {'torch', 'numpy', 'transformers', 'diffusers', 'matplotlib', 'PIL'} & set(sys.modules)\n"
        "    assert not found, (words, found)\n"
    )
    code = f"memhook_version = {memhook.__version__!r}\n" + code
    done = subprocess.run([sys.executable, "-c", code, json.dumps([["--version"], *lines])], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
