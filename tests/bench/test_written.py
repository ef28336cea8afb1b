"""What benchmarks leave behind: CSV, JSON, and the part of a page between two markers."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from memhook.bench.resampling import Estimate
from memhook.bench.written import Shown, read_page, section_of, write_page, write_rows
from memhook.errors import MemhookError


@dataclass(frozen=True)
class Row:
    name: str
    share: Estimate
    gain: Estimate | None = None


ROWS = [Row("a", Estimate(0.5, 0.4, 0.6)), Row("b", Estimate(0.2, 0.1, 0.3), Estimate(1.0, 0.0, 2.0))]


def test_estimates_become_three_columns(tmp_path):
    write_rows(tmp_path, "table", ROWS, {"prompts": 3})
    with (tmp_path / "table.csv").open() as lines:
        found = list(csv.DictReader(lines))
    assert (found[0]["share"], found[0]["share_high"]) == ("0.5", "0.6")
    assert (found[0]["gain"], found[1]["gain"], found[1]["gain_low"]) == ("", "1.0", "0.0")
    written = json.loads((tmp_path / "table.json").read_text())
    assert written["prompts"] == 3
    assert written["rows"][1]["gain"]["high"] == 2.0


def test_another_model_has_a_place_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert section_of("mitigation", None) == "mitigation"
    assert section_of("mitigation", Path("models/first-course")) == "mitigation first-course"
    assert section_of("mitigation", Path()) == f"mitigation {tmp_path.name}"


def test_a_page_gets_what_was_printed_and_keeps_the_rest(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench x: begin -->\nold\n<!-- bench x: end -->\nafter\n")
    shown = Shown()
    shown.table("Shares", [("name", ""), ("share", "right")], [(row.name, str(row.share)) for row in ROWS])
    shown.text("Of 3 [prompts].")
    write_page(page, "x", shown)
    text = page.read_text()
    assert text.startswith("before\n<!-- bench x: begin -->\n\nShares:\n\n| name | share |\n| --- | --: |\n| a | 0.50 [0.40, 0.60] |\n")
    assert text.endswith("\n\nOf 3 [prompts].\n\n<!-- bench x: end -->\nafter\n")
    assert "old" not in text
    once = page.read_text()
    write_page(page, "x", shown)
    assert page.read_text() == once


@pytest.mark.parametrize("text", ["", "<!-- bench x: begin -->", "<!-- bench x: end --><!-- bench x: begin --><!-- bench x: end -->"])
def test_a_page_without_its_markers_is_refused(tmp_path, text):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(MemhookError, match="does not hold the two lines <!-- bench x: begin --> and <!-- bench x: end -->"):
        read_page(page, "x")
