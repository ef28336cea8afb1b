"""Reading prompts from files: text, JSON lines, CSV or Parquet; a row that cannot be used is set aside with its number and reason."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memhook.errors import MemhookError

LONGEST = 100_000  # characters of one prompt; text encoders read a few hundred
_FORMATS = (".txt", ".jsonl", ".csv", ".parquet")


@dataclass(frozen=True)
class PromptRow:
    """One row of a prompt file: its prompt, or why there is none. ``line`` counts from 1 (for CSV and Parquet: data rows).

    ``family`` is the row's field of that name, where it has one: near-duplicates share it.
    """

    line: int
    prompt: str | None
    problem: str | None = None
    family: str | None = None


def read_prompts(source: str) -> list[PromptRow]:
    """Read prompts by the file's ending, or text from standard input for ``-``.

    Text holds one prompt a line; blank lines are skipped. JSON lines hold a string or an object with the field ``prompt`` each; CSV and Parquet
    have a column ``prompt``. A field or column ``family`` may name what a row is a near-duplicate of. Nothing is executed or unpickled.

    Raises:
        MemhookError: The file does not exist, its ending is unknown, it has no column ``prompt``, or no row can be used.
    """
    suffix = ".txt" if source == "-" else Path(source).suffix.lower()
    if suffix not in _FORMATS:
        raise MemhookError(f"{source} ends in {suffix or 'nothing'}; expected {', '.join(_FORMATS)}, or - for text on standard input")
    if suffix == ".parquet":
        rows = list(_parquet_rows(Path(source)))
    else:
        data = _bytes(source)
        rows = list(_csv_rows(source, data) if suffix == ".csv" else _line_rows(data, json_lines=suffix == ".jsonl"))
    if not any(row.prompt is not None for row in rows):
        reasons = "; ".join(f"line {row.line}: {row.problem}" for row in rows[:3])
        raise MemhookError(f"{source} holds no usable prompt{f' ({reasons})' if reasons else ''}; expected one prompt a line")
    return rows


def _bytes(source: str) -> bytes:
    try:
        return sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    except OSError as error:
        raise MemhookError(f"cannot read the prompts in {source}: {error.strerror or error}") from error


def _line_rows(data: bytes, *, json_lines: bool) -> Iterator[PromptRow]:
    for number, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            text = raw.decode("utf-8").strip("\r\n \t")
        except UnicodeDecodeError as error:
            yield PromptRow(number, None, f"not UTF-8 at byte {error.start}")
            continue
        if not text:
            continue
        value: Any = text
        family: Any = None
        if json_lines:
            try:
                value = json.loads(text)
            except (ValueError, RecursionError) as error:
                yield PromptRow(number, None, f"not JSON: {error}")
                continue
            if isinstance(value, dict):
                if "prompt" not in value:
                    yield PromptRow(number, None, 'no field "prompt"')
                    continue
                value, family = value["prompt"], value.get("family")
        yield _checked(number, value, family)


def _csv_rows(source: str, data: bytes) -> Iterator[PromptRow]:
    text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", errors="surrogateescape")
    csv.field_size_limit(max(csv.field_size_limit(), 10 * LONGEST))
    reader = csv.DictReader(io.StringIO(text, newline=""))
    if "prompt" not in (reader.fieldnames or []):
        raise MemhookError(f"{source} has the columns {', '.join(reader.fieldnames or []) or 'none'}; expected one named prompt")
    number = 0
    while True:
        number += 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield PromptRow(number, None, f"not CSV: {error}")
            continue
        yield _checked(number, row.get("prompt"), row.get("family"))


def _parquet_rows(path: Path) -> Iterator[PromptRow]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MemhookError('reading Parquet needs pyarrow; install the extra "parquet"') from error
    try:
        with pq.ParquetFile(path) as file:
            if "prompt" not in file.schema_arrow.names:
                raise MemhookError(f"{path} has the columns {', '.join(file.schema_arrow.names)}; expected one named prompt")
            number = 0
            columns = [name for name in ("prompt", "family") if name in file.schema_arrow.names]
            for batch in file.iter_batches(columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield _checked(number, row["prompt"], row.get("family"))
    except (OSError, pa.ArrowException) as error:
        raise MemhookError(f"cannot read the prompts in {path}: {error}") from error


def _checked(number: int, value: Any, family: Any = None) -> PromptRow:
    if not isinstance(value, str):
        return PromptRow(number, None, f"the prompt is a {type(value).__name__}, not text")
    if not value.strip():
        return PromptRow(number, None, "the prompt is empty")
    if "\x00" in value:
        return PromptRow(number, None, "the prompt holds a NUL character")
    if any("\ud800" <= character <= "\udfff" for character in value):
        return PromptRow(number, None, "the prompt is not UTF-8")
    if len(value) > LONGEST:
        return PromptRow(number, None, f"the prompt has {len(value):,} characters; at most {LONGEST:,} are read")
    return PromptRow(number, value.strip(), family=str(family) if family is not None else None)
