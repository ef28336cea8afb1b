"""Prompt files: every row is used or set aside with its number and reason; nothing crashes and nothing is lost."""

import csv
import io
import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memhook.detection.prompt_files import LONGEST, read_prompts
from memhook.errors import MemhookError


def read(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return read_prompts(str(path))


def test_text_holds_a_prompt_a_line_and_keeps_line_numbers(tmp_path):
    rows = read(tmp_path, "a.txt", "\ufeffa cat\n\n  a dog \r\n")
    assert [(row.line, row.prompt) for row in rows] == [(1, "a cat"), (3, "a dog")]


def test_json_lines_hold_strings_or_objects(tmp_path):
    rows = read(tmp_path, "a.jsonl", '"a cat"\n{"prompt": "a dog", "id": 3}\n{"id": 4}\nnonsense\n{"prompt": 5}\n')
    assert [row.prompt for row in rows] == ["a cat", "a dog", None, None, None]
    assert [row.problem for row in rows][2:] == ['no field "prompt"', rows[3].problem, "the prompt is a int, not text"]
    assert rows[3].problem.startswith("not JSON")


def test_csv_has_a_column_prompt_and_may_quote_line_breaks(tmp_path):
    rows = read(tmp_path, "a.csv", 'id,prompt\n1,"a cat, sitting"\n2,"two\nlines"\n3,\n')
    assert [row.prompt for row in rows] == ["a cat, sitting", "two\nlines", None]
    assert rows[2].problem == "the prompt is empty"


def test_parquet_has_a_column_prompt(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"prompt": ["a cat", None, "a dog"]}), tmp_path / "a.parquet")
    assert [row.prompt for row in read_prompts(str(tmp_path / "a.parquet"))] == ["a cat", None, "a dog"]
    (tmp_path / "b.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(MemhookError, match="cannot read the prompts"):
        read_prompts(str(tmp_path / "b.parquet"))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", "\n\n", "no usable prompt"),
        ("a.csv", "text\nx\n", "has the columns text; expected one named prompt"),
        ("a.xlsx", "x", "expected .txt, .jsonl, .csv, .parquet"),
        ("a.jsonl", "{}\n", 'line 1: no field "prompt"'),
    ],
)
def test_a_file_without_prompts_says_what_was_expected(tmp_path, name, data, message):
    with pytest.raises(MemhookError, match=message):
        read(tmp_path, name, data)


def test_a_missing_file_is_named():
    with pytest.raises(MemhookError, match=r"no-such-file\.txt"):
        read_prompts("no-such-file.txt")


@pytest.mark.parametrize(
    ("data", "problem"),
    [(b"caf\xe9", "not UTF-8"), (b"a\x00b", "NUL"), (b"x" * (LONGEST + 1), "characters")],
    ids=["latin-1", "nul", "huge"],
)
@pytest.mark.parametrize("ending", ["txt", "csv"])
def test_unusable_text_is_set_aside_and_the_rest_goes_on(tmp_path, data, problem, ending):
    head = b"prompt\n" if ending == "csv" else b""
    rows = read(tmp_path, f"a.{ending}", head + b"first\n" + data + b"\nlast\n")
    assert [row.prompt for row in rows] == ["first", None, "last"]
    assert problem in rows[1].problem


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(st.binary(max_size=40).filter(lambda line: b"\n" not in line), max_size=8))
def test_any_bytes_are_read_without_a_crash_and_no_line_is_lost(tmp_path, lines):
    data = b"\n".join([b"good", *lines])
    for ending in ("txt", "jsonl"):
        head = b'"good"' if ending == "jsonl" else b"good"
        rows = read(tmp_path, f"a.{ending}", head + data.removeprefix(b"good"))
        blank = sum(1 for line in lines if not _stripped(line))
        assert len(rows) == 1 + len(lines) - blank
        assert all((row.prompt is None) != (row.problem is None) for row in rows)


def _stripped(line):
    try:
        return line.decode().strip("\r\n \t")
    except UnicodeDecodeError:
        return "kept"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompts=st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(str.strip), min_size=1, max_size=6))
def test_what_json_and_csv_writers_write_is_read_back(tmp_path, prompts):
    expected = [prompt.strip() for prompt in prompts]
    assert [row.prompt for row in read(tmp_path, "a.jsonl", "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))] == expected
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer)
    writer.writerows([["prompt"], *([prompt] for prompt in prompts)])
    assert [row.prompt for row in read(tmp_path, "a.csv", buffer.getvalue())] == expected


ROWS = {  # what a generated file may hold: bytes of a line for each format, and the prompt that is read from them
    "txt": [(b"a red fox", "a red fox"), ("caf\u00e9".encode(), "caf\u00e9"), (b"\xff\xfe", None), (b"a\x00b", None), (b"y" * (LONGEST + 1), None)],
    "jsonl": [
        (b'{"prompt": "a red fox", "family": "f"}', "a red fox"),
        (b'"plain"', "plain"),
        (b'{"text": "a"}', None),
        (b'{"prompt": 3}', None),
        (b'{"prompt": "a', None),
        (b"[" * 2000, None),
        (b'{"prompt": "a\\u0000b"}', None),
        (b'{"prompt": "\\ud800"}', None),
        (b"\xff", None),
        (b'{"prompt": "' + b"y" * (LONGEST + 1) + b'"}', None),
    ],
    "csv": [
        (b"a red fox,f", "a red fox"),
        (b'"two\nlines",f', "two\nlines"),
        (b",f", None),
        (b"caf\xe9,f", None),
        (b"a\x00b,f", None),
        (b"y" * (LONGEST + 1), None),
        (b'"say ""no""",f,extra,fields', 'say "no"'),
    ],
}


def test_two_thousand_generated_files_lose_no_row(tmp_path):
    rng = random.Random(4)
    for number in range(2000):
        ending = rng.choice(["txt", "jsonl", "csv"])
        common = ROWS[ending][:-1]
        chosen = [ROWS[ending][0], *(ROWS[ending][-1] if rng.random() < 0.01 else rng.choice(common) for _ in range(rng.randrange(7)))]
        rng.shuffle(chosen)
        newline = rng.choice([b"\n", b"\r\n"])
        lines = [line for line, _ in chosen]
        data = newline.join([b"prompt,family", *lines] if ending == "csv" else lines) + rng.choice([b"", newline])
        rows = read(tmp_path, f"{number % 3}.{ending}", rng.choice([b"", b"\xef\xbb\xbf"]) + data)
        assert [row.prompt for row in rows] == [prompt for _, prompt in chosen], data[:300]
        assert all((row.prompt is None) != (row.problem is None) for row in rows)


def test_a_family_is_read_where_there_is_one(tmp_path):
    assert [row.family for row in read(tmp_path, "a.jsonl", b'{"prompt": "a", "family": "x"}\n{"prompt": "b"}\n"c"')] == ["x", None, None]
    assert [row.family for row in read(tmp_path, "a.csv", b"prompt,family\na,x\nb,\n")] == ["x", ""]
