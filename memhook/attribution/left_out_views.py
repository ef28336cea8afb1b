"""A `LeaveOneOut` to look at: terminal, plain text, HTML, bars. Numbers beside every bar; no prompt is trusted."""

from __future__ import annotations

import html
from textwrap import fill
from typing import TYPE_CHECKING, Any, Protocol

from memhook.attribution.tokens import printable
from memhook.errors import MemhookError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes


class Row(Protocol):
    """What is shown of a `memhook.attribution.WithoutWords`."""

    @property
    def text(self) -> str:
        """The words."""

    @property
    def score(self) -> float:
        """Without them."""

    @property
    def drop(self) -> float:
        """How much lower that is."""

    @property
    def p_value(self) -> float | None:
        """Of the score."""

    @property
    def excess(self) -> float | None:
        """Of a pair."""


class LeftOut(Protocol):
    """What is shown of a `memhook.LeaveOneOut`."""

    @property
    def prompt(self) -> str:
        """The prompt."""

    @property
    def score(self) -> float:
        """Its own."""

    @property
    def p_value(self) -> float | None:
        """Of that."""

    @property
    def samples(self) -> int:
        """That a score is the mean of."""

    @property
    def words(self) -> Sequence[Row]:
        """A row a word."""

    @property
    def phrases(self) -> Sequence[Row]:
        """A row a phrase."""

    @property
    def pairs(self) -> Sequence[Row]:
        """A row a pair."""


_BAR = 24  # characters
_COLOR = (214, 69, 65)
_CELL = "padding:2px 8px;text-align:right;font-variant-numeric:tabular-nums"


def _title(found: LeftOut) -> str:
    said = "" if found.p_value is None else f", p = {found.p_value:.2g}"
    return f"{printable(found.prompt)} (score {found.score:.3g}{said}; {found.samples} sample{'s' * (found.samples != 1)})"


def _share(found: LeftOut, row: Row) -> float:
    """How much of the score goes with the word, 0 to 1."""
    return min(1.0, max(0.0, row.drop / found.score)) if found.score > 0 else 0.0


def _p(row: Row) -> str:
    return "" if row.p_value is None else f"{row.p_value:.2g}"


def _blocks(found: LeftOut) -> list[tuple[str, Sequence[Row]]]:
    blocks: list[tuple[str, Sequence[Row]]] = [
        ("without the word", found.words),
        ("without the phrase", found.phrases),
        ("without both words", found.pairs),
    ]
    return [(name, rows) for name, rows in blocks if rows]


def to_text(found: LeftOut) -> str:
    """A table in plain text: score, p-value, bar of what goes with the word, and the word."""
    lines = [_title(found)]
    for name, rows in _blocks(found):
        lines.append(f"  {'score':>7}  {'p' if found.p_value is not None else '':>7}  {'goes with it':<{_BAR}}  {name}")
        lines += [
            f"  {row.score:>7.3g}  {_p(row):>7}  {'#' * round(_BAR * _share(found, row)):<{_BAR}}  {printable(row.text)}{_more(row)}" for row in rows
        ]
    return "\n".join(lines)


def _more(row: Row) -> str:
    return "" if row.excess is None else f" ({row.excess:+.2f} beyond each alone)"


def to_html(found: LeftOut) -> str:
    """A table with a shade behind what goes with a word. No script, no outside style."""
    red, green, blue = _COLOR
    parts = []
    for name, rows in _blocks(found):
        head = (
            "<tr>"
            + "".join(f'<th style="{_CELL}">{cell}</th>' for cell in ("score", "p", "lower by"))
            + f'<th style="text-align:left">{name}</th></tr>'
        )
        body = "".join(
            f'<tr><td style="{_CELL}">{row.score:.3g}</td><td style="{_CELL}">{_p(row)}</td><td style="{_CELL}">{row.drop:.3g}</td>'
            f'<td style="text-align:left;padding:2px 8px;background:rgba({red},{green},{blue},{0.75 * _share(found, row):.2f})">'
            f"{html.escape(printable(row.text))}<small>{_more(row)}</small></td></tr>"
            for row in rows
        )
        parts.append(f'<table style="border-collapse:collapse">{head}{body}</table>')
    return f'<div class="memhook-left-out"><div><b>{html.escape(_title(found))}</b></div>{"".join(parts)}</div>'


def to_rich(found: LeftOut) -> Any:
    """A colored table for ``rich.print`` (the extra ``cli``)."""
    try:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text
    except ImportError as error:
        raise MemhookError("the colored table needs rich; install the extra `cli`, or print() the result") from error
    tables: list[Any] = [Text(_title(found), style="bold")]
    for name, rows in _blocks(found):
        table = Table()
        table.add_column("score", justify="right")
        if found.p_value is not None:
            table.add_column("p", justify="right")
        table.add_column("goes with it")
        table.add_column(name, overflow="fold")
        for row in rows:
            share = _share(found, row)
            style = "bold red" if share > 1 / 3 else "yellow" if share > 1 / 10 else ""
            # Text, not str: a prompt may hold rich's own markup.
            cells: list[Any] = [f"{row.score:.3g}", *([_p(row)] if found.p_value is not None else []), Text("█" * round(_BAR * share), style=style)]
            table.add_row(*cells, Text(f"{printable(row.text)}{_more(row)}", style=style))
        tables.append(table)
    return Group(*tables)


def plot(found: LeftOut, ax: Axes | None) -> Axes:
    """A bar for each word: the score without it, and a line at the prompt's own."""
    try:
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise MemhookError("plots need matplotlib; install the extra `plot`") from error
    rows = found.words
    if ax is None:
        _, ax = plt.subplots(figsize=(max(4.0, 0.6 * len(rows)), 3.0), layout="constrained")
    red, green, blue = (channel / 255 for channel in _COLOR)
    ax.bar(range(len(rows)), [row.score for row in rows], color=[(red, green, blue, 0.2 + 0.8 * _share(found, row)) for row in rows])
    ax.axhline(found.score, color="#555555", linewidth=1, linestyle="--", label=f"unchanged: {found.score:.3g}")
    # parse_math: a prompt with two dollar signs is no formula.
    ax.set_xticks(range(len(rows)), [printable(row.text) for row in rows], rotation=45, ha="right", parse_math=False)
    ax.set_ylabel("score without the word")
    ax.set_title(fill(_title(found), 90), parse_math=False, fontsize="small")  # matplotlib's own wrapping reads dollar signs as formulas
    ax.legend(frameon=False, fontsize="small")
    return ax
