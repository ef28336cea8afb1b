"""What commands and benchmarks print, as tables; text from outside is shown without its control characters."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

console = Console()


def shown(text: str) -> Text:
    """Text from outside as it may be shown: control and formatting characters are replaced, markup is not read."""
    return Text("".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in ("Cc", "Cf", "Cs") else c for c in text))


def number(value: float, digits: int = 3) -> str:
    """A number with so many digits, or a dash where there is none."""
    return f"{value:.{digits}g}" if math.isfinite(value) else "-"


def verdict(memorized: bool, undecided: bool) -> Text:  # noqa: FBT001 -- two facts of one prompt
    """The decision in words, so that color is not needed to read it."""
    if undecided:
        return Text("undecided (NaN)", style="bold yellow")
    return Text("MEMORIZED", style="bold red") if memorized else Text("not flagged", style="green")


def print_table(title: str, columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[str | Text]]) -> None:
    """Print a table; ``columns`` are names and justifications."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for name, justify in columns:
        table.add_column(name, justify="right" if justify == "right" else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
