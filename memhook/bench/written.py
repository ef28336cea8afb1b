"""Rows of a benchmark as CSV and JSON, and as a table in a page of the documentation."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from memhook.errors import MemhookError
from memhook.files import csv_text, write_text
from memhook.report.tables import console, print_table


def flat(row: Any) -> dict[str, Any]:
    """A dataclass as one flat row: an estimate becomes three columns."""
    found: dict[str, Any] = {}
    for name, value in asdict(row).items():
        if isinstance(value, Mapping):
            found |= {name: value["value"], f"{name}_low": value["low"], f"{name}_high": value["high"]}
        else:
            found[name] = value
    return found


def write_rows(out: Path, name: str, rows: Sequence[Any], about: Mapping[str, Any]) -> None:
    """``name.csv`` with a line a row, and ``name.json`` with what the rows are about as well."""
    write_text(out / f"{name}.csv", csv_text([flat(row) for row in rows]))
    write_text(out / f"{name}.json", json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")


class Shown:
    """What a benchmark prints, collected, so that the same can stand in a page."""

    def __init__(self) -> None:
        self._parts: list[str] = []

    def table(self, title: str, columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]]) -> None:
        """Print a table; ``columns`` are names and justifications."""
        print_table(title, columns, rows)
        lines = [f"{title}:", "", _line([name for name, _ in columns]), _line(["--:" if side else "---" for _, side in columns])]
        self._parts.append("\n".join([*lines, *(_line(row) for row in rows)]))

    def text(self, text: str) -> None:
        """Print a paragraph."""
        console.print(text, highlight=False, markup=False)
        lines = (textwrap.fill(line, 140, break_long_words=False, break_on_hyphens=False) for line in text.split("\n"))
        self._parts.append("\n".join(lines))

    def markdown(self) -> str:
        """All of it."""
        return "\n\n".join(self._parts) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def section_of(bench: str, model: Path | None) -> str:
    """The name of a benchmark's place in a page: its own on the bundled model, with the folder's on another one."""
    return bench if model is None else f"{bench} {model.resolve().name}"


def read_page(page: Path, name: str) -> tuple[str, str]:
    """What stands before and after the place of a benchmark in a page.

    Raises:
        MemhookError: The page does not hold the two markers, once each.
    """
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    begin, end = _markers(name)
    if text.count(begin) != 1 or text.count(end) != 1:
        raise MemhookError(f"{page} does not hold the two lines {begin} and {end}, once each; the table is written between them")
    before, rest = text.split(begin)
    return before, rest.split(end)[1]


def write_page(page: Path, name: str, shown: Shown) -> None:
    """Put what a benchmark printed in its place in a page."""
    put_in_page(page, name, f"\n{shown.markdown()}\n")


def put_in_page(page: Path, name: str, markdown: str) -> None:
    """Put lines of Markdown between a benchmark's markers in a page."""
    before, after = read_page(page, name)  # read again: it may have been edited during the run
    begin, end = _markers(name)
    write_text(page, f"{before}{begin}\n{markdown}{end}{after}")


def _markers(name: str) -> tuple[str, str]:
    return f"<!-- bench {name}: begin -->", f"<!-- bench {name}: end -->"
