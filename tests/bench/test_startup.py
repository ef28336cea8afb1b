"""``memhook bench startup``: what is started, and what is said of it."""

import pytest
from typer.testing import CliRunner

import memhook
from memhook.bench import startup
from memhook.bench.startup import BARE, startup_rows
from memhook.cli.app import app


def test_help_loads_no_torch_and_torch_does():
    rows = {row.what: row for row in startup_rows(rounds=1, only=["import memhook", "memhook --help", "import torch"])}
    assert {what: row.torch for what, row in rows.items()} == {BARE: False, "import memhook": False, "memhook --help": False, "import torch": True}
    assert rows[BARE].ratio == 1
    assert rows[BARE].modules < rows["import memhook"].modules < rows["memhook --help"].modules < rows["import torch"].modules
    assert all(row.seconds > 0 for row in rows.values())


@pytest.mark.parametrize(
    ("arguments", "message"), [({"rounds": 0}, "rounds is 0"), ({"only": ["memhook --halp"]}, "'memhook --halp'; expected some of")]
)
def test_unusable_arguments(arguments, message):
    with pytest.raises(memhook.MemhookError, match=message):
        startup_rows(**arguments)


def test_a_command_that_fails_says_what_it_printed(monkeypatch):
    monkeypatch.setattr(startup, "_starts", lambda: {BARE: "pass", "broken": "raise SystemExit('no such thing')"})
    with pytest.raises(memhook.MemhookError, match=r"`broken` ended with status 1: no such thing"):
        startup_rows(rounds=1)


def test_the_command_writes_its_table_into_a_page(tmp_path, monkeypatch):
    monkeypatch.setattr(startup, "_starts", lambda: {BARE: "pass", "import json": "import json"})
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench startup: begin -->\nold\n<!-- bench startup: end -->\nafter\n")
    done = CliRunner().invoke(app, ["bench", "startup", "--rounds", "1", "--page", str(page)])
    assert done.exit_code == 0, done.output
    text = page.read_text()
    assert "| import json |" in text
    assert "not loaded" in text
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
