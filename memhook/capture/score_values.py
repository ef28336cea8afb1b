"""Reading the scores of a trace: one row an evaluation, NaN where an evaluation has none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

from memhook.errors import MemhookError, NoGuidanceError

if TYPE_CHECKING:
    from memhook.capture.rows import Row
    from memhook.capture.scoring import Scored

_WHOLE_RUN = ("first", "history")


class Scores(Mapping[str, np.ndarray]):
    """The scores of a trace by name, each ``(s, b)`` float32; reading one waits for the device."""

    def __init__(self, names: Sequence[str], read: Callable[[str], np.ndarray]) -> None:
        self._names, self._read = tuple(names), read

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise MemhookError(
                f"this trace has no score {name!r}; it has {', '.join(self._names)}. Watch with score={name!r}"
                if isinstance(name, str)
                else f"a score is known by its name; this trace has {', '.join(self._names)}"
            )
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"<scores {', '.join(self._names)}>"


def has_score(rows: Sequence[Row], scored: Scored, starts: Sequence[int]) -> np.ndarray:
    """``(s,)`` bool: the evaluations that have a value of this score.

    Args:
        rows: Of the trace, settled.
        scored: The score.
        starts: Where runs of the sampler start.

    Raises:
        MemhookError: A run began without the score noticing, and it depends on that.
    """
    present = np.array([scored.name in row.scores for row in rows], bool)
    for start, stop in pairwise([*starts, len(rows)]):
        if rows[start].place == 0 or not present[start:stop].any():
            continue
        if scored.at is not None or any(need in scored.needs for need in _WHOLE_RUN):
            raise MemhookError(
                f"{scored} is about a run's first evaluations, and a second run began in the block at evaluation {rows[start].place}; "
                "watch each run by itself"
            )
        if "previous" in scored.needs:
            present[start] = False  # the evaluation before was another run's
    return present


def score_rows(rows: Sequence[Row], scored: Scored, present: np.ndarray) -> np.ndarray:
    """``(s, b)`` float32 in one transfer, NaN where ``present`` is False.

    Raises:
        MemhookError: No evaluation has a value, or they differ in their number of samples.
    """
    if not present.any():
        raise NoGuidanceError(no_value(scored, len(rows)))
    sizes = sorted({row.samples for row in rows})
    if len(sizes) > 1:
        raise MemhookError(
            f"the evaluations in this trace have {sizes} samples, so they are several runs; read trace.runs, or watch each run by itself"
        )
    found = np.full((len(rows), sizes[0]), np.nan, np.float32)
    found[present] = torch.stack([row.scores[scored.name] for row, there in zip(rows, present, strict=True) if there]).cpu().numpy()
    return found


def no_value(scored: Scored, evaluations: int) -> str:
    """Why a score may have no value in the first so many evaluations."""
    reasons = []
    if "pair" in scored.needs:
        reasons.append("it needs an unconditional prediction (guide with a scale above 1)")
    if "previous" in scored.needs:
        reasons.append("it needs the evaluation before, so the first has none (use two or more)")
    if scored.at is not None:
        reasons.append(f"it is about evaluation {scored.at} of a run alone")
    why = f": {', and '.join(reasons)}" if reasons else ""
    return f"none of the first {evaluations} evaluations has a value of {scored}{why}"
