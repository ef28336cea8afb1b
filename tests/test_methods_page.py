"""docs/methods.md names functions and tests that exist."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(memhook(?:\.\w+)+)", PAGE))))
def test_every_function_exists(name):
    found = importlib.import_module("memhook")
    for part in name.split(".")[1:]:
        found = getattr(found, part) if hasattr(found, part) else importlib.import_module(f"{found.__name__}.{part}")


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(tests/[\w/]+\.py::\w+)`", PAGE))))
def test_every_test_exists(name):
    path, test = name.split("::")
    assert f"\ndef {test}(" in (ROOT / path).read_text(encoding="utf-8")


def test_the_page_names_both():
    assert len(re.findall(r"tests/[\w/]+\.py::", PAGE)) >= 10
