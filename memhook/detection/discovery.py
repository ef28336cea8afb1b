"""Many prompts: which of them to report, so that at most a given share of the reported ones is innocent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from memhook.errors import MemhookError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


class PValueCounts:
    """How often each p-value occurred among many prompts: all that the Benjamini-Hochberg procedure needs.

    Conformal p-values take at most ``n + 1`` values for ``n`` calibration prompts, so the false discovery rate over any number of prompts is
    controlled exactly with as many counters, in one pass; counts of shards add up. The procedure controls the rate for independent prompts, and
    for p-values that share one calibration (Bates et al. 2023, *Testing for Outliers with Conformal p-values*).

    >>> counts = PValueCounts([0.01, 0.02, 0.5]) + PValueCounts([0.9])
    >>> counts.threshold(0.05)
    0.02
    >>> counts.discoveries(0.05)
    2
    """

    def __init__(self, p_values: ArrayLike = ()) -> None:
        self.counts: Counter[float] = Counter()
        self.undecided = 0
        self.add(p_values)

    def add(self, p_values: ArrayLike) -> None:
        """Count p-values; NaN means undecided, which is counted apart and never tested.

        Raises:
            MemhookError: A value is not in (0, 1].
        """
        values = np.atleast_1d(np.asarray(p_values, np.float64)).ravel()
        known = values[~np.isnan(values)]
        wrong = known[(known <= 0) | (known > 1)]
        if len(wrong):
            raise MemhookError(
                f"{len(wrong)} of {len(values)} values are no p-values (the first is {wrong[0]:g}); expected numbers above 0, at most 1"
            )
        self.counts.update(dict(zip(*(part.tolist() for part in np.unique(known, return_counts=True)), strict=True)))
        self.undecided += len(values) - len(known)

    def __add__(self, other: PValueCounts) -> PValueCounts:
        return PValueCounts.merged([self, other])

    @staticmethod
    def merged(parts: Iterable[PValueCounts]) -> PValueCounts:
        """The counts of several shards together."""
        whole = PValueCounts()
        for part in parts:
            whole.counts.update(part.counts)
            whole.undecided += part.undecided
        return whole

    def __len__(self) -> int:
        """The number of prompts tested."""
        return self.counts.total()

    def adjusted(self) -> Mapping[float, float]:
        """The Benjamini-Hochberg adjusted value of each p-value that occurred: the smallest rate at which it is a discovery.

        Equal to ``scipy.stats.false_discovery_control`` on the same p-values, to the last bit.
        """
        values = np.array(sorted(self.counts))
        if not len(values):
            return {}
        up_to = np.cumsum([self.counts[value] for value in values.tolist()])
        raw = values * (len(self) / up_to)
        adjusted = np.clip(np.minimum.accumulate(raw[::-1])[::-1], 0, 1)
        return dict(zip(values.tolist(), adjusted.tolist(), strict=True))

    def threshold(self, rate: float) -> float | None:
        """The largest p-value that is a discovery at this false discovery rate; None where none is.

        Args:
            rate: The expected share of innocent prompts among those reported, in (0, 1).
        """
        if not 0 < rate < 1:
            raise MemhookError(f"the false discovery rate is {rate}; expected a number between 0 and 1, such as 0.05")
        return max((value for value, adjusted in self.adjusted().items() if adjusted <= rate), default=None)

    def discoveries(self, rate: float) -> int:
        """How many prompts are discoveries at this rate."""
        largest = self.threshold(rate)
        return 0 if largest is None else sum(count for value, count in self.counts.items() if value <= largest)
