"""A `TokenAttribution` to look at: HTML, terminal, plain text, bars. Numbers beside every color; no prompt is trusted."""

from __future__ import annotations

import html
from textwrap import fill
from typing import TYPE_CHECKING, Any, Protocol

from memhook.attribution.tokens import printable, shown
from memhook.errors import MemhookError

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes

    from memhook.attribution.tokens import Tokens, WordScore


class Attributed(Protocol):
    """What is shown of a `memhook.TokenAttribution`, or of any other way of scoring words."""

    @property
    def gradients(self) -> np.ndarray:
        """``(s, b, l)``; its length is the number of evaluations."""

    @property
    def groups(self) -> np.ndarray:
        """``(b,)``: to which prompt each sample belongs."""

    @property
    def prompts(self) -> tuple[Tokens, ...]:
        """Each prompt's tokens."""

    @property
    def prompt_scores(self) -> np.ndarray:
        """``(p, l)``."""

    @property
    def words(self) -> tuple[tuple[WordScore, ...], ...]:
        """Each prompt's words with their scores."""


_BAR = 24  # characters
_COLOR = (214, 69, 65)
_CELL = "display:inline-block;margin:2px;padding:2px 5px;border-radius:4px;text-align:center"


def _title(attribution: Attributed, prompt: int) -> str:
    samples = int((attribution.groups == prompt).sum())
    evaluations = len(attribution.gradients)
    text = attribution.prompts[prompt].prompt or f"prompt {prompt}"
    where = ", at the encoder's input" if getattr(attribution, "at", "output") == "input" else ""
    return f"{printable(text)} ({samples} sample{'s' * (samples != 1)}, {evaluations} evaluation{'s' * (evaluations != 1)}{where})"


def _rows(attribution: Attributed, prompt: int) -> list[tuple[str, float, float]]:
    """Text, score, and score relative to the highest, of each word."""
    words = attribution.words[prompt]
    highest = max((word.score for word in words), default=0.0) or 1.0
    return [(printable(word.text), word.score, word.score / highest) for word in words]


def _special_rows(attribution: Attributed, prompt: int) -> list[tuple[int, str, float]]:
    tokens = attribution.prompts[prompt]
    scores = attribution.prompt_scores[prompt]
    positions = [position for position, special in enumerate(tokens.special) if special]
    return [(position, printable(shown(tokens.pieces[position])), float(scores[position])) for position in positions]


def to_html(attribution: Attributed) -> str:
    """One block a prompt: words with their score below and a shade behind, special positions folded away. No script, no outside style."""
    red, green, blue = _COLOR
    blocks = []
    for prompt in range(len(attribution.prompts)):
        cells = "".join(
            f'<span style="{_CELL};background:rgba({red},{green},{blue},{0.75 * share:.2f})">'
            f'{html.escape(text)}<br><small style="opacity:0.75">{score:.3g}</small></span>'
            for text, score, share in _rows(attribution, prompt)
        )
        rows = _special_rows(attribution, prompt)
        special = "".join(f"<li>{position}: <code>{html.escape(text)}</code> {score:.3g}</li>" for position, text, score in rows)
        folded = f"<details><summary>start, end and padding</summary><ul>{special}</ul></details>" if special else ""
        title = f"<div><b>{html.escape(_title(attribution, prompt))}</b></div>"
        blocks.append(f"<div>{title}<div>{cells}</div>{folded}{_cut_off_html(attribution, prompt)}</div>")
    return f'<div class="memhook-attribution">{"".join(blocks)}</div>'


def _cut_off_html(attribution: Attributed, prompt: int) -> str:
    cut_off = attribution.prompts[prompt].cut_off
    return f"<div>cut off by the encoder: <s>{html.escape(printable(cut_off))}</s></div>" if cut_off else ""


def to_text(attribution: Attributed) -> str:
    """One table a prompt in plain text: score, bar, word; special positions in one line."""
    lines = []
    for prompt in range(len(attribution.prompts)):
        lines.append(_title(attribution, prompt))
        lines += [f"  {score:>9.3g}  {'#' * round(_BAR * share):<{_BAR}}  {text}" for text, score, share in _rows(attribution, prompt)]
        lines += [f"  {line}" for line in _footnotes(attribution, prompt)]
    return "\n".join(lines)


def _footnotes(attribution: Attributed, prompt: int) -> list[str]:
    special = _special_rows(attribution, prompt)
    cut_off = attribution.prompts[prompt].cut_off
    notes = [f"start, end and padding: {len(special)} positions, highest score {max(score for *_, score in special):.3g}"] if special else []
    return [*notes, f"cut off by the encoder: {printable(cut_off)}"] if cut_off else notes


def to_rich(attribution: Attributed) -> Any:
    """One colored table a prompt, for ``rich.print`` (the extra ``cli``)."""
    try:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text
    except ImportError as error:
        raise MemhookError("the colored table needs rich; install the extra `cli`, or print() the attribution") from error
    tables = []
    for prompt in range(len(attribution.prompts)):
        title, notes = Text(_title(attribution, prompt)), Text("\n".join(_footnotes(attribution, prompt)))
        table = Table(title=title, title_justify="left", caption=notes, caption_justify="left")
        table.add_column("score", justify="right")
        table.add_column("")
        table.add_column("word", overflow="fold")
        for text, score, share in _rows(attribution, prompt):
            style = "bold red" if share > 2 / 3 else "yellow" if share > 1 / 3 else ""
            # Text, not str: a prompt may hold rich's own markup.
            table.add_row(f"{score:.3g}", Text("█" * round(_BAR * share), style=style), Text(text, style=style))
        tables.append(table)
    return Group(*tables)


def plot(attribution: Attributed, prompt: int, ax: Axes | None) -> Axes:
    """A bar for each word of a prompt."""
    try:
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise MemhookError("plots need matplotlib; install the extra `plot`") from error
    rows = _rows(attribution, prompt)
    if ax is None:
        _, ax = plt.subplots(figsize=(max(4.0, 0.6 * len(rows)), 3.0), layout="constrained")
    red, green, blue = (channel / 255 for channel in _COLOR)
    ax.bar(range(len(rows)), [score for _, score, _ in rows], color=[(red, green, blue, 0.3 + 0.7 * share) for *_, share in rows])
    # parse_math: a prompt with two dollar signs is no formula.
    ax.set_xticks(range(len(rows)), [text for text, *_ in rows], rotation=45, ha="right", parse_math=False)
    ax.set_ylabel("significance")
    ax.set_title(
        fill(_title(attribution, prompt), 90), parse_math=False, fontsize="small"
    )  # matplotlib's own wrapping reads dollar signs as formulas
    return ax
