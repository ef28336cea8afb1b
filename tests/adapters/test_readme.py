"""The adapter that ``adapters/README.md`` shows is executed: host, adapter and conformance suite, as printed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "adapters" / "README.md"


@pytest.fixture
def files(tmp_path):
    """The page's Python blocks, each under the name in its first line."""
    blocks = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    for name, code in blocks:
        (tmp_path / name).write_text(code, encoding="utf-8")
    return tmp_path, dict(blocks)


def test_example_passes_the_conformance_suite(files):
    folder, _ = files
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(folder), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    result = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "12 passed" in result.stdout


def test_adapter_is_as_short_as_promised(files):
    _, blocks = files
    code = [line for line in blocks["toy_adapter.py"].splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(code) <= 40


def test_table_of_hosts_is_of_these_families():
    from tests.adapters.table import layout
    from tests.adapters.zoo import FAMILIES

    page = (README.parents[1] / "docs" / "hosts.md").read_text(encoding="utf-8")
    printed = re.findall(r"^\| (.+?) \| (.+?) \|", page.split("<!-- table -->")[1].split("<!-- end of table -->")[0], flags=re.MULTILINE)
    assert printed[2:] == [(name, layout(FAMILIES[name])) for name in sorted(FAMILIES)], "run python -m tests.adapters.table and paste what it prints"
