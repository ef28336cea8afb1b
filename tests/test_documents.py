"""The README and the pages under docs/ keep their word: their Python blocks run, their links and commands exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "adapters" / "README.md", *(ROOT / "docs").glob("*.md")])
# adapters/README.md shows several files, which tests/adapters/test_readme.py writes and runs.
EXECUTED = [path for path in DOCUMENTS if "```python" in path.read_text() and path.parent.name != "adapters"]


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("path", EXECUTED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_python_blocks_run_in_order(path, tmp_path):
    """In a process of its own, as a reader would run them: one after the other, in one session."""
    code = "\n".join(blocks(path, "python"))
    alone = os.environ | {"OMP_NUM_THREADS": "1"}  # beside other tests, threads of one process only wait for those of the other
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=900, env=alone)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_to_files_lead_somewhere(path):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text())
    missing = [target for target in targets if not (path.parent / target).exists()]
    assert missing == []


def test_commands_in_documents_exist():
    from typer.main import get_command

    from memhook.cli.app import app

    root = get_command(app)
    for path in DOCUMENTS:
        for line in re.findall(r"`(memhook [a-z][^`]*)`", path.read_text()):
            command = root
            for word in line.split()[1:]:
                if word.startswith("-") or not hasattr(command, "commands"):
                    break
                assert word in command.commands, f"{path.name} names `{line}`"
                command = command.commands[word]


@pytest.mark.parametrize("path", [*DOCUMENTS, ROOT / "CHANGELOG.md"], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_prose_is_wrapped_where_eyes_can_follow(path):
    """At 160 columns. Tables and code may be wider."""
    prose = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert [line for line in prose.splitlines() if len(line) > 160 and not line.startswith("|")] == []
