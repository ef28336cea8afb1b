"""Rows of a benchmark as CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from memhook.files import write_text


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
    lines = [flat(row) for row in rows]
    columns = list(dict.fromkeys(key for line in lines for key in line))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=columns, restval="")
    writer.writeheader()
    writer.writerows(lines)
    write_text(out / f"{name}.csv", buffer.getvalue())
    write_text(out / f"{name}.json", json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")
