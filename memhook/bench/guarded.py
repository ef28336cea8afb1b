"""Clean prompts under the guard, beside memorized ones in the same batch: does anything change that should not?"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from memhook.detection.calibration import Calibration
from memhook.errors import MemhookError
from memhook.mitigation.guard import guard
from memhook.testbed.bundle import GUIDANCE_SCALE, MemorizedPrompt, clean, memorized
from memhook.testbed.study import IMAGES

if TYPE_CHECKING:
    from memhook.bench.samples import Studio
    from memhook.testbed.plan import Source

SEED = 33_000_000
SOURCES: tuple[Source, ...] = ("once", "held-out", "foreign", "random")


@dataclass(frozen=True)
class GuardedRow:
    """A group of prompts, four pictures each, with the guard and without it.

    Attributes:
        group: ``"clean"`` or ``"memorized"``.
        prompts: How many.
        flagged: How many of them the guard flagged.
        changed_though_not_flagged: Pictures of the other prompts that are not the same to the bit.
        changed_where_flagged: Pictures of flagged prompts that changed.
        pictures_flagged: Pictures of flagged prompts.
    """

    group: str
    prompts: int
    flagged: int
    changed_though_not_flagged: int
    changed_where_flagged: int
    pictures_flagged: int


def guarded_rows(
    studio: Studio, *, per_source: int, sources: Sequence[Source] = SOURCES, fpr: float = 0.01, track: Callable[[Sequence[int]], Iterable[int]] = iter
) -> list[GuardedRow]:
    """Run batches of one clean test prompt of each source and one memorized prompt, without and with a mitigating guard.

    Args:
        studio: The model, with the calibration in its folder; its own number of steps is not used, since the calibration belongs to 50.
        per_source: Batches.
        sources: Of the clean prompts.
        fpr: False-positive rate of the guard, which decides at the first evaluation.
        track: Wraps the batches, to show progress.
    """
    found = {name: clean(split="test", source=name, folder=studio.folder)[:per_source] for name in sources}
    planted = memorized(kind="verbatim", folder=studio.folder)[:per_source]
    if not 1 <= per_source <= len(planted):
        raise MemhookError(f"per-source is {per_source}; expected 1 to {len(planted)}")
    calibration = Calibration.load(studio.folder / "calibration.safetensors").using(first=1)
    groups: dict[str, list[np.ndarray]] = {"clean": [], "memorized": []}  # rows (flagged, pictures changed)
    for number in track(range(per_source)):
        batch = [*(found[name][number] for name in sources), planted[number]]

        def run(batch: Sequence[Any] = batch, number: int = number) -> np.ndarray:
            generators = [torch.Generator().manual_seed(SEED + 100 * number + image) for image in range(len(batch) * IMAGES)]
            images = studio.pipeline(
                [prompt.prompt for prompt in batch],
                num_images_per_prompt=IMAGES,
                guidance_scale=GUIDANCE_SCALE,
                generator=generators,
                output_type="np",
            ).images
            return np.asarray(images)

        plain = run()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="the samples .* did not come down")  # counted as flagged all the same
            with guard(studio.pipeline, calibration, fpr=fpr, action="mitigate") as report:
                guarded = run()
        if report.detection is None:
            raise MemhookError("the guard made no decision; expected one at the first evaluation")
        changed = (plain != guarded).reshape(len(batch), IMAGES, -1).any(axis=2).sum(axis=1)
        for prompt, flag, count in zip(batch, report.detection.memorized, changed, strict=True):
            groups["memorized" if isinstance(prompt, MemorizedPrompt) else "clean"].append(np.array([int(flag), int(count)]))
    return [_row(name, np.stack(rows)) for name, rows in groups.items()]


def _row(name: str, rows: np.ndarray) -> GuardedRow:
    flagged = rows[:, 0] == 1
    return GuardedRow(name, len(rows), int(flagged.sum()), int(rows[~flagged, 1].sum()), int(rows[flagged, 1].sum()), int(flagged.sum()) * IMAGES)
