"""Suggested edits to look at: terminal, plain text, HTML. Numbers beside every mark; no prompt is trusted."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any, Protocol

from memhook.detection.prompt_words import words_of
from memhook.errors import MemhookError

if TYPE_CHECKING:
    from collections.abc import Sequence


class Edit(Protocol):
    """What is shown of a `memhook.mitigation.edits.Edit`."""

    @property
    def prompt(self) -> str:
        """The new one."""

    @property
    def numbers(self) -> tuple[int, ...]:
        """The words that are changed."""

    @property
    def changes(self) -> Sequence[tuple[str, str]]:
        """The words, each with what takes its place."""

    @property
    def said(self) -> str:
        """What was changed, in words."""

    @property
    def score(self) -> float:
        """Of the new prompt."""

    @property
    def p_value(self) -> float:
        """Of the score."""

    @property
    def flagged(self) -> bool:
        """Whether it still looks memorized."""

    @property
    def reached(self) -> bool:
        """Whether it came as far as was asked."""


class Suggested(Protocol):
    """What is shown of a `memhook.Edits`."""

    @property
    def prompt(self) -> str:
        """The prompt."""

    @property
    def score(self) -> float:
        """Its own."""

    @property
    def p_value(self) -> float:
        """Of that."""

    @property
    def flagged(self) -> bool:
        """Whether it looks memorized."""

    @property
    def goal(self) -> float:
        """The p-value asked for."""

    @property
    def reached(self) -> bool:
        """Whether an edit came that far."""

    @property
    def suggestions(self) -> Sequence[Edit]:
        """Fewest changes first."""

    @property
    def nearest(self) -> Edit | None:
        """The lowest score."""

    @property
    def kept(self) -> tuple[str, ...]:
        """Words that were not touched."""

    @property
    def asked(self) -> int:
        """Texts that were run."""

    @property
    def bound(self) -> int:
        """That could have been run."""


_CELL = "padding:2px 8px;text-align:right;font-variant-numeric:tabular-nums"


def _printable(text: str) -> str:
    """Control characters and invisible ones as escapes."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def _title(found: Suggested) -> str:
    return f"{_printable(found.prompt)} (score {found.score:.3g}, p = {found.p_value:.2g})"


def _kept(found: Suggested) -> str:
    return f" with {', '.join(map(repr, found.kept))} kept" if found.kept else ""


def outcome(found: Suggested) -> str:
    """What came of it, in a sentence."""
    if not found.flagged:
        return "This prompt is not flagged, so there is nothing to change."
    effort = f"{found.asked} texts asked, at most {found.bound}"
    if found.reached:
        return f"Fewest changes{_kept(found)} until p is {found.goal:.2g} or more ({effort}):"
    if found.suggestions:
        return f"No edit{_kept(found)} comes to p = {found.goal:.2g}; these are not flagged ({effort}):"
    if found.nearest is None:
        return f"No edit{_kept(found)} leaves anything of the prompt."
    nearest = f"{_printable(found.nearest.said)}, score {found.nearest.score:.3g}, p = {found.nearest.p_value:.2g}"
    return f"Every edit{_kept(found)} is still flagged ({effort}). The nearest: {nearest}"


def to_text(found: Suggested) -> str:
    """Plain text: score, p-value, what is changed and the new prompt."""
    lines = [_title(found), outcome(found)]
    if found.suggestions:
        lines.append(f"  {'score':>7}  {'p':>7}  instead")
    for edit in found.suggestions:
        lines += [f"  {edit.score:>7.3g}  {edit.p_value:>7.2g}  {_printable(edit.prompt)}", f"  {'':>7}  {'':>7}  ({_printable(edit.said)})"]
    return "\n".join(lines)


def marked(prompt: str, edit: Edit) -> str:
    """The old prompt as HTML, words that are left out struck through and new ones underlined."""
    words, parts, done = words_of(prompt), [], 0
    for number, (_, new) in zip(edit.numbers, edit.changes, strict=True):
        word = words[number]
        added = f" <ins>{html.escape(_printable(new))}</ins>" if new else ""
        parts += [html.escape(_printable(prompt[done : word.start])), f"<del>{html.escape(_printable(word.text))}</del>{added}"]
        done = word.end
    return "".join([*parts, html.escape(_printable(prompt[done:]))])


def to_html(found: Suggested) -> str:
    """A table of the suggestions. No script, no outside style."""
    rows = "".join(
        f'<tr><td style="{_CELL}">{edit.score:.3g}</td><td style="{_CELL}">{edit.p_value:.2g}</td>'
        f'<td style="text-align:left;padding:2px 8px">{html.escape(_printable(edit.prompt))}<br>'
        f'<small style="opacity:0.75">{marked(found.prompt, edit)}</small></td></tr>'
        for edit in found.suggestions
    )
    head = f'<tr><th style="{_CELL}">score</th><th style="{_CELL}">p</th><th style="text-align:left">write instead</th></tr>'
    table = f'<table style="border-collapse:collapse">{head}{rows}</table>' if rows else ""
    return f'<div class="memhook-edits"><div><b>{html.escape(_title(found))}</b></div><div>{html.escape(outcome(found))}</div>{table}</div>'


def to_rich(found: Suggested) -> Any:
    """A colored table for ``rich.print`` (the extra ``cli``)."""
    try:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text
    except ImportError as error:
        raise MemhookError("the colored table needs rich; install the extra `cli`, or print() the result") from error
    parts: list[Any] = [Text(_title(found), style="bold"), Text(outcome(found))]
    if found.suggestions:
        table = Table()
        table.add_column("score", justify="right")
        table.add_column("p", justify="right")
        table.add_column("write instead", overflow="fold")
        for edit in found.suggestions:
            # Text, not str: a prompt may hold rich's own markup.
            new = Text.assemble((_printable(edit.prompt), "bold green" if edit.reached else ""), "\n", (_printable(edit.said), "dim"))
            table.add_row(f"{edit.score:.3g}", f"{edit.p_value:.2g}", new)
        parts.append(table)
    return Group(*parts)
