"""Progress of long runs: a bar on a terminal, a plain line each half minute elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")
_EVERY = 30.0  # seconds


def tracked(items: Iterable[Item], *, total: int, doing: str) -> Iterator[Item]:
    """Pass items on and say on standard error how many have come."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            yield from progress.track(items, total=total, description=doing)
        return
    said = time.monotonic()
    for count, item in enumerate(items, 1):
        if time.monotonic() - said >= _EVERY:
            said = time.monotonic()
            print(f"{doing}: {count} of {total}", file=sys.stderr, flush=True)
        yield item
