"""What a command says of each prompt, and writing it as JSON lines, CSV, Parquet or text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memhook.errors import MemhookError
from memhook.files import csv_text, replace_file, write_text

if TYPE_CHECKING:
    from memhook.detection.prompt_files import PromptRow

FORMATS = (".jsonl", ".csv", ".parquet", ".txt")


@dataclass(frozen=True)
class Verdict:
    """One prompt with what was measured; p-value and decision are None without a calibration, and where a prediction was not finite."""

    line: int
    prompt: str
    first_evaluation: float | None
    score: float | None
    p_value: float | None
    memorized: bool | None
    accepted_mismatches: str | None = None  # settings that differ from the calibration's, which the user accepted

    def to_dict(self) -> dict[str, Any]:
        """As JSON values: what is not finite is None."""
        return {key: None if isinstance(value, float) and not np.isfinite(value) else value for key, value in vars(self).items()}


def check_format(out: str) -> None:
    """Refuse a file ending that cannot be written, before anything runs."""
    if out != "-" and Path(out).suffix.lower() not in FORMATS:
        raise MemhookError(f"{out} ends in {Path(out).suffix or 'nothing'}; expected {', '.join(FORMATS)}, or - for JSON lines on standard output")


def json_lines(found: Sequence[Verdict], bad: Sequence[PromptRow]) -> str:
    """A line a prompt in the order of the verdicts, then a line for each row that was left out, with its problem."""
    rows = [row.to_dict() for row in found] + [{"line": row.line, "prompt": None, "problem": row.problem} for row in bad]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_verdicts(path: Path, found: Sequence[Verdict], bad: Sequence[PromptRow]) -> None:
    """Write a file of the kind that its ending names, whole or not at all. Text holds the flagged prompts alone, one a line."""
    kind = path.suffix.lower()
    if kind == ".jsonl":
        write_text(path, json_lines(found, bad))
    elif kind == ".txt":
        write_text(path, "".join(" ".join(row.prompt.split()) + "\n" for row in found if row.memorized))
    elif kind == ".csv":
        write_text(path, csv_text(_table(found, bad)))
    else:
        _write_parquet(path, _table(found, bad))


def _table(found: Sequence[Verdict], bad: Sequence[PromptRow]) -> list[dict[str, Any]]:
    names = [*(field.name for field in fields(Verdict)), "problem"]
    rows = [*(row.to_dict() for row in found), *({"line": row.line, "problem": row.problem} for row in bad)]
    return [{name: row.get(name) for name in names} for row in rows]


def _write_parquet(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MemhookError('writing Parquet needs pyarrow; install the extra "parquet"') from error
    kinds = {"line": pa.int64(), "first_evaluation": pa.float64(), "score": pa.float64(), "p_value": pa.float64(), "memorized": pa.bool_()}
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in rows[0]])
    replace_file(path, lambda temporary: pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), temporary))
