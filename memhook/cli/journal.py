"""Results of a long run as they come in, so that an interruption loses none of them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from memhook.cli.verdicts import Verdict
from memhook.errors import MemhookError


class Journal:
    """The file beside an output that holds the verdicts so far; it goes away once the output is written.

    Its first line is what they depend on, and a run goes on only from a journal of its own settings.

    Args:
        out: The output that will be written in the end.
        settings: What the verdicts depend on, as JSON values.
    """

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        self.path = out.with_name(f"{out.name}.partial")
        self._settings = settings

    def read(self) -> list[Verdict]:
        """The verdicts of an interrupted run, in order; a last line that was cut off is left out.

        Raises:
            MemhookError: The journal is of another run.
        """
        if not self.path.is_file():
            return []
        lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        whole = lines[:-1]  # what comes after the last line break is empty, or a line that was cut off
        try:
            settings, *rows = [json.loads(line) for line in whole]
            found = [Verdict(**row) for row in rows]
        except (ValueError, TypeError) as error:
            raise MemhookError(f"{self.path} cannot be read as the results of an interrupted run; move it away to start again") from error
        if settings != self._settings:
            changed = sorted(key for key in settings.keys() | self._settings.keys() if settings.get(key) != self._settings.get(key))
            raise MemhookError(
                f"{self.path} holds the results of an interrupted run with another {', '.join(changed)}; run it as it was started, "
                "or move it away to start again"
            )
        return found

    def recorded(self, verdicts: Iterable[Verdict], known: list[Verdict]) -> Iterator[Verdict]:
        """Pass verdicts on, each written down first; ``known`` ones are those that `read` gave."""
        if known:
            self._append([self._settings, *(verdict.to_dict() for verdict in known)], anew=True)
        fresh = not known
        for verdict in verdicts:
            self._append([*([self._settings] if fresh else []), verdict.to_dict()], anew=fresh)
            fresh = False
            yield verdict

    def _append(self, rows: Sequence[dict[str, Any]], *, anew: bool) -> None:
        """Write whole lines at once; a run that fails before its first verdict leaves no journal."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("w" if anew else "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        except OSError as error:
            raise MemhookError(f"cannot write {self.path}: {error.strerror or error}. Choose a folder that can be written to") from error

    def close(self) -> None:
        """The output was written."""
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
