"""Which samples to leave out at every timestep: those that were flagged more often than chance explains."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from memhook.errors import MemhookError

News = dict[Hashable, list[bool]]
"""By key, the latest verdicts (True: flagged), oldest first."""


def least_flagged(verdicts: int, rate: float | None) -> int:
    """How many of so many verdicts have to be *flagged* for a sample to be held.

    Args:
        verdicts: At least 1.
        rate: How often a clean presentation is flagged: so many that chance gives them, or more, with a probability of ``rate`` at most
            (the tail of the binomial distribution). None where that is not known: more than half.

    >>> [least_flagged(n, 0.05) for n in (1, 2, 3, 7, 8, 20)], [least_flagged(n, None) for n in (1, 2, 3, 4)]
    ([1, 2, 2, 2, 3, 4], [1, 2, 2, 3])
    """
    if rate is None:
        return verdicts // 2 + 1
    tail = 0.0
    for flagged in range(verdicts, 0, -1):
        tail += math.comb(verdicts, flagged) * rate**flagged * (1 - rate) ** (verdicts - flagged)
        if tail > rate + 1e-12:
            return flagged + 1
    return 1


class Memory:
    """Remembers the latest verdicts by key, and holds a key while `least_flagged` of them or more were *flagged*.

    Args:
        window: How many verdicts of a key count. 1 goes by the latest alone: a sample is out until it is judged below the threshold.
        rate: How often a clean presentation is flagged; None where that is not known.
    """

    def __init__(self, window: int, *, rate: float | None) -> None:
        self.window = window
        self._least = [1, *(least_flagged(verdicts, rate) for verdicts in range(1, window + 1))]
        self._verdicts: dict[Hashable, tuple[bool, ...]] = {}
        self._before: dict[Hashable, tuple[bool, ...]] = {}  # as all ranks knew it, for the keys in the news
        self._news: News = {}

    def learn(self, key: Hashable, *, flagged: bool) -> None:
        """Note a verdict."""
        known = self._verdicts.get(key, ())
        self._before.setdefault(key, known)
        self._verdicts[key] = (*known, flagged)[-self.window :]
        self._news[key] = [*self._news.get(key, []), flagged][-self.window :]

    def holds(self, key: Hashable) -> bool:
        """Whether the sample is to be left out, whatever its timestep."""
        known = self._verdicts.get(key, ())
        return sum(known) >= self._least[len(known)]

    def keys(self) -> list[Hashable]:
        """The keys that are held now."""
        return [key for key in self._verdicts if self.holds(key)]

    def exchange(self, gather: Callable[[News], Sequence[News]]) -> None:
        """Tell the other ranks what was learned since the last time, and learn from them; afterwards all remember the same.

        Verdicts of one key on several ranks are put in turn, the newest of each rank last; their true order is not known.
        """
        parts = list(gather(self._news))
        if self._news not in parts or not all(isinstance(part, Mapping) for part in parts):
            raise MemhookError(
                f"what was gathered holds {len(parts)} objects, and not what this rank gave; expected a list with one object of each rank, in the "
                "order of ranks. Use torch.distributed.all_gather_object, or leave out gather="
            )
        for key in dict.fromkeys(itertools.chain.from_iterable(parts)):
            known = self._before.get(key, self._verdicts.get(key, ()))
            self._verdicts[key] = (*known, *_in_turn([part[key] for part in parts if key in part]))[-self.window :]
        self._before, self._news = {}, {}

    def state(self) -> dict[str, list[list[Any]]]:
        """As plain lists."""
        parts: dict[str, Mapping[Hashable, Iterable[bool]]] = {"verdicts": self._verdicts, "before": self._before, "news": self._news}
        return {name: [[key, [bool(verdict) for verdict in verdicts]] for key, verdicts in part.items()] for name, part in parts.items()}

    def restore(self, state: Mapping[str, Sequence[Sequence[Any]]]) -> None:
        """Go on from what `state` gave."""
        self._verdicts = {key: tuple(verdicts)[-self.window :] for key, verdicts in state["verdicts"]}
        self._before = {key: tuple(verdicts)[-self.window :] for key, verdicts in state["before"]}
        self._news = {key: list(verdicts)[-self.window :] for key, verdicts in state["news"]}


def _in_turn(parts: Sequence[Sequence[bool]]) -> list[bool]:
    """Several ranks' verdicts as one sequence, in which the newest ones stand last."""
    newest_first = itertools.zip_longest(*(reversed(part) for part in parts))
    return [verdict for verdicts in newest_first for verdict in verdicts if verdict is not None][::-1]


def all_ranks(news: News) -> list[News]:
    """What every rank of the default process group gives; this one's alone where there is no such group."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return [news]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, news)
    return gathered
