"""What a training filter dropped: totals, and by the keys of samples."""

from __future__ import annotations

import csv
import io
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from memhook.errors import MemhookError
from memhook.files import write_text

if TYPE_CHECKING:
    import os


_PRIOR = 2  # presentations


@dataclass(frozen=True)
class KeyCount:
    """The presentations of one sample in the training run, those without a magnitude left out.

    Attributes:
        key: As given to the filter.
        judged: Presentations with a magnitude: conditional, at a step with an unconditional pass.
        dropped: Those among them whose magnitude surpassed the threshold.
        magnitude: Mean magnitude over the judged presentations.
        excess: Mean of magnitude / threshold, which can be compared across timesteps; 0 where the threshold is infinite.
    """

    key: Hashable
    judged: int
    dropped: int
    magnitude: float
    excess: float

    @property
    def share(self) -> float:
        """The share of judged presentations that were dropped."""
        return self.dropped / self.judged if self.judged else 0.0


@dataclass(frozen=True)
class FilterReport:
    """Counts of a training run.

    Attributes:
        steps: Losses that were averaged.
        passes: Unconditional passes among them.
        samples: Presentations in these steps.
        judged: Presentations with a magnitude.
        dropped: Presentations over the threshold.
        wholly_dropped: Steps in which no sample was kept.
        nonfinite: Presentations kept for want of a finite magnitude (``on_nonfinite="keep"``).
        rows: Counts of each key, most suspicious first; empty where no keys were given.
    """

    steps: int = 0
    passes: int = 0
    samples: int = 0
    judged: int = 0
    dropped: int = 0
    wholly_dropped: int = 0
    nonfinite: int = 0
    rows: tuple[KeyCount, ...] = field(default=(), repr=False)

    def merged(self, other: FilterReport) -> FilterReport:
        """The counts of two ranks, or of two parts of a run, together."""
        totals = {
            name: getattr(self, name) + getattr(other, name)
            for name in ("steps", "passes", "samples", "judged", "dropped", "wholly_dropped", "nonfinite")
        }
        return replace(self, **totals, rows=ranked([*self.rows, *other.rows]))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the rows as CSV, most suspicious first."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(["key", "judged", "dropped", "share", "magnitude", "excess"])
        writer.writerows([row.key, row.judged, row.dropped, f"{row.share:.6g}", f"{row.magnitude:.6g}", f"{row.excess:.6g}"] for row in self.rows)
        write_text(Path(path), buffer.getvalue())


def ranked(rows: Iterable[KeyCount]) -> tuple[KeyCount, ...]:
    """Rows of equal keys added up, most suspicious first; where that is equal, the larger excess.

    The order is that of the dropped share, drawn towards the share of all presentations as two further presentations would: a sample that
    was seen once says less than one that was seen a hundred times, and to be seen often is not suspicious by itself.
    """
    total: dict[Hashable, KeyCount] = {}
    for row in rows:
        total[row.key] = row if row.key not in total else _added(total[row.key], row)
    judged = sum(row.judged for row in total.values())
    usual = sum(row.dropped for row in total.values()) / judged if judged else 0.0

    def suspicion(row: KeyCount) -> float:
        return (row.dropped + _PRIOR * usual) / (row.judged + _PRIOR)

    return tuple(sorted(total.values(), key=lambda row: (-suspicion(row), -row.excess, str(row.key))))


def _added(first: KeyCount, second: KeyCount) -> KeyCount:
    judged = first.judged + second.judged

    def mean(a: float, b: float) -> float:
        return (a * first.judged + b * second.judged) / judged if judged else 0.0

    return KeyCount(
        first.key, judged, first.dropped + second.dropped, mean(first.magnitude, second.magnitude), mean(first.excess, second.excess)
    )  # fmt: skip


class Counter:
    """Counts while a run goes on."""

    def __init__(self) -> None:
        self.totals = FilterReport()
        self._keys: dict[Hashable, list[float]] = {}  # key -> judged, dropped, sum of magnitudes, sum of excesses

    def skip(self, samples: int) -> None:
        """Count a step without an unconditional pass."""
        self.totals = replace(self.totals, steps=self.totals.steps + 1, samples=self.totals.samples + samples)

    def add(
        self, keep: Sequence[bool], judged: Sequence[bool], magnitudes: Sequence[float], thresholds: Sequence[float], keys: Sequence[Hashable] | None
    ) -> None:
        """Count a step with its unconditional pass; a sample that is not judged has no magnitude."""
        before, dropped = self.totals, len(keep) - sum(keep)
        nonfinite = sum(not abs(m) < float("inf") for m in magnitudes)
        self.totals = FilterReport(
            before.steps + 1, before.passes + 1, before.samples + len(keep), before.judged + sum(judged), before.dropped + dropped,
            before.wholly_dropped + (dropped == len(keep)), before.nonfinite + nonfinite,
        )  # fmt: skip
        for key, kept, valid, m, limit in zip(keys or (), keep, judged, magnitudes, thresholds, strict=bool(keys)):
            if valid:
                row = self._keys.setdefault(key, [0, 0, 0.0, 0.0])
                for place, value in enumerate((1, not kept, m, m / limit if limit else float(m > 0))):
                    row[place] += value

    def report(self) -> FilterReport:
        """The counts so far."""
        rows = (KeyCount(key, int(n), int(dropped), m / n, excess / n) for key, (n, dropped, m, excess) in self._keys.items())
        return replace(self.totals, rows=ranked(rows))


def check_keys(keys: Sequence[Hashable] | None, *, batch: int) -> list[Hashable] | None:
    """Keys as plain hashable values, one a sample."""
    if keys is None:
        return None
    plain = keys.tolist() if hasattr(keys, "tolist") else list(keys)
    if len(plain) != batch:
        raise MemhookError(f"there are {len(plain)} keys for a batch of {batch}; expected one key a sample, such as its number in the data set")
    unhashable = next((key for key in plain if not isinstance(key, Hashable)), None)
    if unhashable is not None:
        raise MemhookError(f"a key is a {type(unhashable).__name__}; expected something hashable, such as a string or a number")
    return plain
