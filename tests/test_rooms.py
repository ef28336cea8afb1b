"""Arrows point one way: every import of every file of memhook and its adapters, read and compared with the plan of the house.

    errors, files, hookspecs <- capture <- adapting <- scores <- detection <- attribution, mitigation <- training, screening
        <- evaluation <- report <- testbed, testing <- bench <- cli

A room may use the rooms to its left, never those to its right, not even for annotations or inside a function. Adapters use what
adapters are made of and no method; what is a front end, like the command, may use every method.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Rooms of one line stand side by side: neither may use the other.
ORDER = (
    ("errors",),
    ("files", "hookspecs"),
    ("plugins",),
    ("capture",),
    ("adapting",),
    ("scores",),
    ("detection",),
    ("attribution", "mitigation"),
    ("training", "screening"),
    ("evaluation",),
    ("report",),
    ("testbed", "testing"),
    ("bench",),
    ("cli",),
)
RANK = {room: rank for rank, line in enumerate(ORDER) for room in line}

# The contract names the values that adapters and core hand to each other. None of these files knows the contract (no cycles, below).
CONTRACT = {"memhook.hookspecs": {"memhook.capture.intervention", "memhook.capture.prediction", "memhook.capture.rows"}}

# Public names at the doors that they had before the rooms were there: each only hands on what the named rooms have.
SHIMS = {
    "memhook.baselines": {"mitigation"},
    "memhook.baselines.density": {"scores"},
    "memhook.discovery": {"detection"},
    "memhook.fingerprint": {"adapting"},
    "memhook.hooks": {"adapting"},
    "memhook.pairs": {"adapting"},
    "memhook.similarity": {"evaluation"},
    "memhook.trace": {"capture"},
}
DOOR = {"memhook", "memhook.exports", "memhook.__main__"}  # the public names and `python -m memhook` may name every room

# An adapter knows one host and no method.
ADAPTERS = ("memhook_diffusers", "memhook_kdiffusion", "memhook_comfyui")
FOR_ADAPTERS = {"errors", "files", "hookspecs", "plugins", "capture", "adapting"}
# The nodes of ComfyUI are buttons for people, as the command is, and no part of its adapter: they may use every method, and the bundled
# model in the one node that shows it.
NODES = "memhook_comfyui.node_pack"
DEMO_NODE = "memhook_comfyui.node_pack.demo"
# Rooms that show memhook on a real pipeline load and run one with an adapter's help.
WITH_ADAPTERS = {"testbed", "bench", "cli"}


@dataclass(frozen=True)
class Arrow:
    """One import: the file that needs another, and the line that says so."""

    source: str
    line: int
    target: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line} imports {self.target}"


@cache
def files() -> Mapping[str, Path]:
    """Every file by the name of its module."""
    found = {}
    for folder in (ROOT, ROOT / "adapters"):
        for package in ("memhook", *ADAPTERS):
            for path in (folder / package).rglob("*.py"):
                parts = path.relative_to(folder).with_suffix("").parts
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(source: str, text: str, *, package: bool, modules: Iterable[str]) -> Iterator[Arrow]:
    """Every import of our own in a file's text, wherever it stands: at the top, under TYPE_CHECKING, in a function. Docstrings do not count."""
    ours = set(modules)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            here = source.split(".")[: len(source.split(".")) - node.level + package] if node.level else []
            base = ".".join([*here, *([node.module] if node.module else [])])
            named = [full if (full := f"{base}.{alias.name}") in ours else base for alias in node.names]
        else:
            continue
        for target in dict.fromkeys(named):
            if target.split(".")[0] in ("memhook", *ADAPTERS):
                yield Arrow(source, node.lineno, target)


@cache
def arrows() -> tuple[Arrow, ...]:
    return tuple(
        arrow
        for name, path in sorted(files().items())
        for arrow in imports(name, path.read_text(encoding="utf-8"), package=path.name == "__init__.py", modules=files())
    )


def room(module: str) -> str:
    """``capture`` for ``memhook.capture.trace``, ``memhook_diffusers`` for anything of that adapter."""
    first, *rest = module.split(".")
    return rest[0] if first == "memhook" and rest else first


def complaint(arrow: Arrow) -> str | None:
    """What is wrong with an arrow, if anything is."""
    here, there = room(arrow.source), room(arrow.target)
    if arrow.source in DOOR or arrow.target in CONTRACT.get(arrow.source, ()):
        return None
    if arrow.source in SHIMS:
        return None if there in SHIMS[arrow.source] else f"{arrow}; this old name stands for {', '.join(SHIMS[arrow.source])} alone"
    if arrow.target in DOOR:
        allowed = here == "cli" or arrow.source.startswith(NODES)  # front ends show the version, and read like a user's code
        return None if allowed else f"{arrow}, the names for users; import the file that has it"
    if arrow.target in SHIMS:
        return f"{arrow}, an old name kept for users; import the file that has it"
    if here in ADAPTERS:
        return _complaint_about_adapter(arrow, here, there)
    if there in ADAPTERS:
        return None if here in WITH_ADAPTERS else f"{arrow}; the library knows no host"
    if here not in RANK or there not in RANK:
        return f"{arrow}; {here if here not in RANK else there} has no place in ORDER: give it one"
    if here == there or RANK[there] < RANK[here]:
        return None
    return f"{arrow}; {there} stands {'beside' if RANK[there] == RANK[here] else 'right of'} {here}"


def _complaint_about_adapter(arrow: Arrow, here: str, there: str) -> str | None:
    if there in ADAPTERS:
        if there != here:
            return f"{arrow}; an adapter knows one host"
        if arrow.target.startswith(NODES) and not arrow.source.startswith(NODES) and arrow.source != here:
            return f"{arrow}; the adapter does not know the nodes"
        return None
    if arrow.source.startswith(NODES):
        if there in ("bench", "cli", "testing") or (there == "testbed" and arrow.source != DEMO_NODE):
            return f"{arrow}; only {DEMO_NODE} shows the bundled model, and nodes use no other front end"
        return None
    return None if there in FOR_ADAPTERS else f"{arrow}; an adapter knows no method"


def cycle(needs: Mapping[str, Iterable[str]]) -> list[str]:
    """The files of one ring, if there is a ring."""
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_every_arrow_points_left() -> None:
    complaints = [found for arrow in arrows() if (found := complaint(arrow)) is not None]
    assert not complaints, "\n".join(complaints)


def test_no_files_stand_in_a_ring() -> None:
    """Neither inside a room nor across rooms. A room's ``__init__`` is its table of contents: what it hands on is no need of its own."""
    contents = {name for name, path in files().items() if path.name == "__init__.py"}
    needs: dict[str, set[str]] = {name: set() for name in files() if name not in contents}
    for arrow in arrows():
        if arrow.source in needs and arrow.target in needs:
            needs[arrow.source].add(arrow.target)
    assert cycle(needs) == []


def test_files_do_not_import_the_contents_of_their_own_room() -> None:
    """That would hide a ring: a room's ``__init__`` imports most of its files."""
    contents = {name for name, path in files().items() if path.name == "__init__.py"}
    inside = [
        arrow
        for arrow in arrows()
        if arrow.target in contents and arrow.source not in contents and arrow.source.startswith(f"{arrow.target}.") and arrow.target not in DOOR
    ]
    assert not inside, "\n".join(map(str, inside))


def test_every_room_has_a_place_and_every_exception_is_needed() -> None:
    rooms = {room(name) for name in files()} - set(ADAPTERS) - {"memhook", "exports", "__main__"} - {room(name) for name in SHIMS}
    assert rooms <= set(RANK)
    assert SHIMS.keys() <= files().keys()
    used = {(arrow.source, arrow.target) for arrow in arrows()}
    assert {(source, target) for source, targets in CONTRACT.items() for target in targets} <= used
    assert any(source == DEMO_NODE and room(target) == "testbed" for source, target in used)


@pytest.mark.parametrize(
    ("source", "text", "wrong"),
    [
        ("memhook.capture.trace", "from memhook.errors import MemhookError", False),
        ("memhook.capture.trace", "from memhook.adapting.replay import replaying", True),
        ("memhook.capture.trace", "import memhook.detection.verdict", True),
        ("memhook.capture.trace", "from memhook.detection import verdict", True),
        ("memhook.capture.trace", "from ..detection.verdict import Detection", True),
        ("memhook.capture.trace", "from .prediction import Evaluation", False),
        ("memhook.capture.trace", "if TYPE_CHECKING:\n    from memhook.detection.verdict import Detection", True),
        ("memhook.capture.trace", "def f():\n    from memhook.detection.verdict import Detection", True),
        ("memhook.capture.trace", "from memhook import Detection", True),
        ("memhook.capture.trace", "import memhook_diffusers", True),
        ("memhook.capture.trace", '"""\n>>> from memhook.testing import tiny_unet\n"""', False),
        ("memhook.capture.trace", "from memhook.trace import Row", True),
        ("memhook.mitigation.guard", "from memhook.attribution.gradient import attribute_tokens", True),
        ("memhook.mitigation.guard", "from memhook.nowhere import thing", True),
        ("memhook.bench.capture", "from memhook.testbed.bundle import clean", False),
        ("memhook.bench.capture", "from memhook.cli.app import app", True),
        ("memhook.cli.app", "from memhook.bench.capture import capture_rows", False),
        ("memhook_diffusers.run", "from memhook.adapting.pairs import PairRecorder", False),
        ("memhook_diffusers.run", "from memhook.detection.verdict import detect", True),
        ("memhook_diffusers.run", "import memhook_kdiffusion.adapter", True),
        ("memhook_comfyui.run", "from memhook_comfyui.node_pack.watch import Watch", True),
        ("memhook_comfyui.node_pack.guard", "from memhook.mitigation.guard import guard", False),
        ("memhook_comfyui.node_pack.guard", "from memhook.testbed.bundle import clean", True),
        ("memhook_comfyui.node_pack.demo", "from memhook.testbed.bundle import clean", False),
    ],
)
def test_the_reader_sees_arrows_of_every_form(source: str, text: str, wrong: bool) -> None:
    found = list(imports(source, text, package=False, modules=files()))
    assert any(complaint(arrow) is not None for arrow in found) is wrong


def test_a_ring_is_found() -> None:
    assert set(cycle({"a": ["b"], "b": ["c"], "c": ["a"], "d": ["a"]})) == {"a", "b", "c"}
    assert cycle({"a": ["b"], "b": ["c"], "d": ["a"]}) == []


def contents(sign: str) -> tuple[list[str], set[str]]:
    """The entries of a room's table of contents, and further files that the text of an entry names in backticks."""
    table = sign.partition("Lives here:")[2].partition("May use:")[0]
    return re.findall(r"^ {4}(\w+)  ", table, flags=re.MULTILINE), set(re.findall(r"`(\w+)`", table))


@pytest.mark.parametrize("name", [room for line in ORDER for room in line if (ROOT / "memhook" / room).is_dir()])
def test_every_room_has_a_sign_that_names_each_of_its_files(name: str) -> None:
    folder = ROOT / "memhook" / name
    sign = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")), clean=False) or ""
    entries, named = contents(sign)
    inside = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()} - {"__init__"}
    assert len(entries) == len(set(entries))
    assert set(entries) <= inside, f"memhook/{name}/__init__.py names files that are not there"
    assert inside <= {*entries, *named}, f"memhook/{name}/__init__.py does not say what these are for"
    assert "May use:" in sign
    assert "Used by:" in sign
