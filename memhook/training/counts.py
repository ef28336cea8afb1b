"""What a training filter dropped: totals, and by the keys of samples."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from memhook.errors import MemhookError
from memhook.files import write_text

if TYPE_CHECKING:
    import os

_ERROR = 0.05


@dataclass(frozen=True)
class KeyCount:
    """The presentations of one sample in the training run that say something about it.

    Attributes:
        key: As given to the filter.
        judged: Presentations with a magnitude: conditional, at a judged timestep, at a step with an unconditional pass.
        dropped: Those among them whose magnitude surpassed the threshold.
        magnitude: Mean magnitude over the judged presentations.
        excess: Mean of magnitude / threshold, which can be compared across timesteps; 0 where the threshold is infinite.
        remembered: Further presentations that were left out because of earlier ones (``remember=``).
    """

    key: Hashable
    judged: int
    dropped: int
    magnitude: float
    excess: float
    remembered: int = 0

    @property
    def share(self) -> float:
        """The share of judged presentations that were dropped."""
        return self.dropped / self.judged if self.judged else 0.0

    def at_least(self, *, among: int = 1) -> float:
        """What that share is at least, with 95% confidence: the lower end of Wilson's interval (1927). Few presentations say little.

        Args:
            among: Of how many samples this is to hold at once (Bonferroni). Of a thousand clean samples that were judged once, fifty are
                flagged at a rate of 5%; each of them alone looks suspicious.

        >>> rows = [KeyCount("once", 1, 1, 5.0, 1.2), KeyCount("often", 50, 12, 5.0, 1.2)]
        >>> [round(row.at_least(), 2) for row in rows], [round(row.at_least(among=1000), 2) for row in rows]
        ([0.27, 0.16], [0.06, 0.09])
        """
        if not self.judged:
            return 0.0
        z = NormalDist().inv_cdf(1 - _ERROR / among)
        n, p = self.judged, self.share
        return max(0.0, (p + z**2 / (2 * n) - z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)) / (1 + z**2 / n))


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
        remembered: Presentations that were not over the threshold (mostly not judged) and left out because of earlier ones.
        passed: Presentations that went through an unconditional pass; over ``samples`` it is the cost in forward passes.
        rows: Counts of each key, most suspicious first; empty where no keys were given.
    """

    steps: int = 0
    passes: int = 0
    samples: int = 0
    judged: int = 0
    dropped: int = 0
    wholly_dropped: int = 0
    nonfinite: int = 0
    remembered: int = 0
    passed: int = 0
    rows: tuple[KeyCount, ...] = field(default=(), repr=False)

    def merged(self, other: FilterReport) -> FilterReport:
        """The counts of two ranks, or of two parts of a run, together."""
        totals = {name: getattr(self, name) + getattr(other, name) for name in TOTALS}
        return replace(self, **totals, rows=ranked([*self.rows, *other.rows]))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the rows as CSV, most suspicious first."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(["key", "judged", "dropped", "share", "at_least", "magnitude", "excess", "remembered"])
        for row in self.rows:
            numbers = (row.share, row.at_least(among=len(self.rows)), row.magnitude, row.excess)
            writer.writerow([row.key, row.judged, row.dropped, *(f"{number:.6g}" for number in numbers), row.remembered])
        write_text(Path(path), buffer.getvalue())


TOTALS = tuple(part.name for part in fields(FilterReport) if part.name != "rows")


def ranked(rows: Iterable[KeyCount]) -> tuple[KeyCount, ...]:
    """Rows of equal keys added up, most suspicious first: by `KeyCount.at_least` among all; where that is equal, by the larger excess.

    A sample that was judged once says less than one that was judged often, the less the more such samples there are; and to be judged
    often is not suspicious by itself.
    """
    total: dict[Hashable, KeyCount] = {}
    for row in rows:
        total[row.key] = row if row.key not in total else _added(total[row.key], row)
    return tuple(sorted(total.values(), key=lambda row: (-row.at_least(among=len(total)), -row.excess, str(row.key))))


def _added(first: KeyCount, second: KeyCount) -> KeyCount:
    judged = first.judged + second.judged

    def mean(a: float, b: float) -> float:
        return (a * first.judged + b * second.judged) / judged if judged else 0.0

    return KeyCount(
        first.key, judged, first.dropped + second.dropped, mean(first.magnitude, second.magnitude), mean(first.excess, second.excess),
        first.remembered + second.remembered,
    )  # fmt: skip


@dataclass(frozen=True)
class Presented:
    """One sample of a step: what the filter found and did."""

    judged: bool
    flagged: bool
    remembered: bool
    magnitude: float
    limit: float


class Counter:
    """Counts while a run goes on."""

    def __init__(self) -> None:
        self.totals = FilterReport()
        self._keys: dict[Hashable, list[float]] = {}  # key -> judged, dropped, sum of magnitudes, sum of excesses, remembered

    def add(self, step: Sequence[Presented], keys: Sequence[Hashable] | None, *, passed: int) -> None:
        """Count a step; ``passed`` samples went through the unconditional pass."""
        before, out = self.totals, sum(sample.flagged or sample.remembered for sample in step)
        self.totals = FilterReport(
            before.steps + 1,
            before.passes + (passed > 0),
            before.samples + len(step),
            before.judged + sum(sample.judged for sample in step),
            before.dropped + sum(sample.flagged for sample in step),
            before.wholly_dropped + (out == len(step)),
            before.nonfinite + sum(not math.isfinite(sample.magnitude) for sample in step),
            before.remembered + sum(sample.remembered for sample in step),
            before.passed + passed,
        )
        for key, sample in zip(keys or (), step, strict=bool(keys)):
            if sample.judged or sample.remembered:
                row = self._keys.setdefault(key, [0, 0, 0.0, 0.0, 0])
                m, limit = sample.magnitude, sample.limit
                judged = (1, sample.flagged, m, m / limit if limit else float(m > 0)) if sample.judged else (0, 0, 0.0, 0.0)
                for place, value in enumerate((*judged, sample.remembered)):
                    row[place] += value

    def report(self) -> FilterReport:
        """The counts so far."""
        rows = (
            KeyCount(key, int(n), int(dropped), m / max(n, 1), excess / max(n, 1), int(remembered))
            for key, (n, dropped, m, excess, remembered) in self._keys.items()
        )
        return replace(self.totals, rows=ranked(rows))

    def state(self) -> dict[str, object]:
        """As plain lists and dicts."""
        return {"totals": {name: int(getattr(self.totals, name)) for name in TOTALS}, "keys": [[key, *row] for key, row in self._keys.items()]}

    def restore(self, totals: dict[str, int], keys: Iterable[Sequence[Any]]) -> None:
        """Go on from what `state` gave."""
        counts: dict[str, Any] = {name: int(totals[name]) for name in TOTALS}
        self.totals = FilterReport(**counts)
        self._keys = {key: [float(value) for value in row] for key, *row in keys}


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
