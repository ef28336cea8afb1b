"""Adapters of somebody else: built by pip into an environment of its own, found through their entry points, with a broken one beside.

The environment sees this one's packages, so nothing is downloaded and no index is asked.
"""

import importlib.util
import json
import os
import shutil
import site
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

HERE = Path(__file__).parent
missing = [name for name in ("pip", "setuptools") if importlib.util.find_spec(name) is None]  # torch needs setuptools, so it is there
pytestmark = pytest.mark.skipif(bool(missing), reason=f"needs {' and '.join(missing)}")


def install(folder, name, scratch):
    """Build a distribution from a copy of its source (building leaves files there) and install it."""
    source = scratch / name
    shutil.copytree(HERE / name, source)
    options = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check")
    command = [sys.executable, "-m", "pip", "--python", str(folder), "install", *options, str(source)]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A virtual environment with both distributions, on top of the running one; gives its interpreter."""
    scratch = tmp_path_factory.mktemp("third_party")
    venv.create(scratch / "env", with_pip=False, symlinks=sys.platform != "win32")
    python = scratch / "env" / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    query = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip())
    ours = dict.fromkeys([*site.getsitepackages(), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    # addsitedir, not a plain path: the packages here may be installed in development mode, by .pth files of their own.
    lines = [f"import site; site.addsitedir({folder!r})\n" for folder in ours]
    (packages / "running_environment.pth").write_text("".join(lines))
    for name in ("good", "broken"):
        install(scratch / "env", name, scratch)
    return python


def ask(python, code):
    """Run code in the environment; gives what it prints as JSON, and the warnings."""
    result = subprocess.run([python, "-c", f"import json\n{code}"], check=False, capture_output=True, text=True, cwd=HERE)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.strip().splitlines()[-1]), " ".join(result.stderr.split())


WATCH = """
import memhook, tidepool, torch
from importlib.metadata import version
from memhook.testing import check_adapter
sampler = tidepool.Sampler()
calls = []
sampler.net.register_forward_hook(lambda module, args, output: calls.append(output["pred"]))
with memhook.watch(sampler) as trace:
    sampler.generate(["a lighthouse at dusk", "two red apples"])
truth = [(output[:2] - output[2:]).double().norm(dim=1).tolist() for output in calls]
run = lambda prompts, guided=True: sampler.generate(prompts, scale=5.0 if guided else 1.0)
passed = list(check_adapter(sampler, run, evaluations=4, imports=("tidepool_memhook", "tidepool")))
print(json.dumps([trace.host, trace.magnitudes.tolist(), truth, version("tidepool"), tidepool.__file__, passed]))
"""


@pytest.fixture(scope="module")
def watched(environment):
    """What the run printed, and its warnings."""
    return ask(environment, WATCH)


def test_it_is_found_and_watches_its_host(watched):
    (host, magnitudes, truth, version, file, _), _ = watched
    assert (host, version) == ("tidepool", "1.2.3")
    assert HERE not in Path(file).parents  # the installed one
    assert len(magnitudes) == 4
    for row, expected in zip(magnitudes, truth, strict=True):
        assert row == pytest.approx(expected, rel=1e-5)


def test_broken_ones_beside_it_are_named_in_a_warning(watched):
    _, warned = watched
    assert "leaves out the adapter 'aground' of driftwood 0.3: ModuleNotFoundError: No module named 'a_library_that_nobody_has'" in warned
    assert "leaves out the adapter 'misspelt' of driftwood 0.3:" in warned
    assert "memhook_adopt" in warned
    assert warned.count("leaves out") == 2


def test_it_passes_the_conformance_suite(watched):
    (*_, passed), _ = watched
    assert {"outputs_identical", "uncond_replay_is_zero", "import_is_light", "no_guidance_is_missing"} <= set(passed)


def test_the_command_lists_all_of_them(environment):
    pytest.importorskip("typer")
    command = [environment, "-W", "ignore", "-m", "memhook", "adapters"]
    result = subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}, cwd=HERE)
    assert result.returncode == 0, result.stderr
    lines = {line.split()[1]: line for line in result.stdout.splitlines() if line.startswith("│")}
    assert all(part in lines["tidepool"] for part in ("tidepool 1.2.3", "tidepool_memhook", "in use"))
    assert all(part in lines["aground"] for part in ("driftwood 0.3", "driftwood_aground", "left out: ModuleNotFoundError"))
    assert all(part in lines["misspelt"] for part in ("driftwood 0.3", "left out:", "memhook_adopt"))
    assert "in use" in lines["diffusers"]
