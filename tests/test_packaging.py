"""What is shipped: adapters, names, and an import that stays light."""

import importlib.metadata
import json
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
    assert "torch" in loaded
    assert loaded.isdisjoint(HEAVY)
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
