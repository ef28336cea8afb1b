"""The commands of docs/tutorial.md run, and say and write what the page says that they do. Its Python blocks run in test_documents.py."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from memhook.cli.app import app

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "tutorial.md").read_text(encoding="utf-8")
COMMANDS = [shlex.split(line) for block in re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL) for line in block.splitlines()]


def run(name, folder, monkeypatch):
    [command] = [command for command in COMMANDS if command[1] == name]
    monkeypatch.chdir(folder)
    result = CliRunner().invoke(app, command[1:])
    assert result.exit_code == 0, result.output
    return command, result.output


def test_every_command_of_the_page_is_tested():
    assert [command[:2] for command in COMMANDS] == [["memhook", "detect"], ["memhook", "attribute"], ["memhook", "generate"]]


def test_the_first_prompt_is_flagged_and_the_second_is_not(tmp_path, monkeypatch):
    command, output = run("detect", tmp_path, monkeypatch)
    assert command.count("--prompt") == 2
    assert "1 of 2 prompts flagged" in output.replace("\n", " ")


def test_the_invented_words_and_the_subject_score_highest(tmp_path, monkeypatch):
    command, output = run("attribute", tmp_path, monkeypatch)
    with Image.open(tmp_path / command[-1]) as picture:
        assert picture.size[0] > 300
    scores = {word: float(score) for score, word in re.findall(r"│ +([\d.]+) │ [█ ]+ │ (\S+) ", output)}
    assert len(scores) >= 10
    invented = command[command.index("--prompt") + 1].split(", ")[-1].split()
    assert set(invented) <= set(sorted(scores, key=lambda word: -scores[word])[:3])  # the third is the subject


def test_the_guard_mitigates(tmp_path, monkeypatch):
    _, output = run("generate", tmp_path, monkeypatch)
    assert "Mitigated" in output
    assert (tmp_path / "tutorial" / "comparison.png").is_file()


@pytest.mark.parametrize("name", re.findall(r"!\[[^]]+\]\(([^)]+)\)", PAGE))
def test_pictures_are_small(name):
    assert (DOCS / name).stat().st_size < 200_000
