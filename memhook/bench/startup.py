"""``memhook bench startup``: how long `import memhook` and the command take to answer, beside a bare Python and torch alone."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from memhook.errors import MemhookError

BARE = "python -c pass"


@dataclass(frozen=True)
class StartupRow:
    """One thing to start, in a process of its own each time.

    Attributes:
        what: What a user would type.
        seconds: Median wall time over rounds, of the whole process.
        ratio: Median over rounds of the time against a bare Python's in the same round.
        spread: Lowest and highest of these ratios.
        modules: How many modules were loaded at the end.
        torch: Whether torch was among them.
    """

    what: str
    seconds: float
    ratio: float
    spread: tuple[float, float]
    modules: int
    torch: bool


# The command as its entry point runs it, in a process that can say afterwards what was loaded.
_COMMAND = "import sys; sys.argv = {argv!r}\nfrom memhook.cli import main\ntry: main()\nexcept SystemExit: pass"
_COUNT = "\nimport sys; print('\\n', len(sys.modules), 'torch' in sys.modules)"


def _starts() -> dict[str, str]:
    words = [["--version"], ["--help"], ["detect", "--help"], ["bench", "--help"], ["bench", "mitigation", "--help"]]
    commands = {f"memhook {' '.join(word)}": _COMMAND.format(argv=["memhook", *word]) for word in words}
    return {
        BARE: "pass",
        "import memhook": "import memhook",
        **commands,
        "memhook.watch": "import memhook; memhook.watch",
        "import torch": "import torch",
    }


def startup_rows(*, rounds: int = 7, only: Sequence[str] | None = None) -> list[StartupRow]:
    """Start each thing once a round, by turns, after one start that fills the caches of the disk.

    Args:
        rounds: Starts of each, 1 or more.
        only: Some of the things to start, as they are named in the rows.

    Raises:
        MemhookError: ``rounds`` is below 1, a name is unknown, or a process failed (with what it printed).
    """
    if rounds < 1:
        raise MemhookError(f"rounds is {rounds}; expected 1 or more")
    starts = _starts()
    if unknown := [name for name in only or () if name not in starts]:
        raise MemhookError(f"nothing to start is called {', '.join(map(repr, unknown))}; expected some of {', '.join(map(repr, starts))}")
    starts = {name: code for name, code in starts.items() if only is None or name in only or name == BARE}
    loaded = {name: _start(name, code + _COUNT)[1].split()[-2:] for name, code in starts.items()}
    taken = [{name: _start(name, code)[0] for name, code in starts.items()} for _ in range(rounds)]
    rows = []
    for name in starts:
        ratios = [times[name] / times[BARE] for times in taken]
        count, torch = loaded[name]
        seconds = statistics.median(times[name] for times in taken)
        rows.append(StartupRow(name, seconds, statistics.median(ratios), (min(ratios), max(ratios)), int(count), torch == "True"))
    return rows


def _start(name: str, code: str) -> tuple[float, str]:
    begun = time.perf_counter()
    # S603: the code is that of _starts, and no input of anybody
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", errors="replace", check=False
    )
    taken = time.perf_counter() - begun
    if done.returncode != 0:
        raise MemhookError(f"`{name}` ended with status {done.returncode}: {done.stderr.strip() or done.stdout.strip()}")
    return taken, done.stdout
