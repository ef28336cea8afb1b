"""``memhook calibrate``: make a calibration from prompts known not to be memorized."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from memhook.calibration import calibrate
from memhook.cli.detect import IMAGES
from memhook.cli.progress import tracked
from memhook.cli.tables import console

if TYPE_CHECKING:
    from memhook.cli.detect import Sampling
    from memhook.prompt_files import PromptRow
    from memhook.trace import Trace


def run_calibrate(rows: Sequence[PromptRow], sampling: Sampling, *, first: int | None, out: Path) -> None:
    """Run the prompts, keep their magnitudes, and write one calibration file."""
    sampling.check()
    for row in rows:
        if row.prompt is None:
            print(f"memhook: line {row.line} left out: {row.problem}", file=sys.stderr)
    prompts = [row.prompt for row in rows if row.prompt is not None]
    images = sampling.images or IMAGES
    pipeline = sampling.load()  # alive until its fingerprint is taken

    def traces() -> Iterator[Trace]:
        runs = sampling.run(pipeline, prompts, evaluations=first)
        for run in runs:
            yield from (run.trace.samples(slice(position * images, (position + 1) * images)) for position in range(len(run.prompts)))

    calibration = calibrate(list(tracked(traces(), total=len(prompts), doing="watching clean prompts")), first=first)
    calibration.save(out)
    over = "all evaluations" if first is None else f"the first {first} evaluations"
    console.print(f"wrote {out}: {len(calibration)} prompts, {images} images each, score over {over}.", soft_wrap=True)
    if len(calibration) >= 99:
        console.print(f"Threshold at a false-positive rate of 0.01: {calibration.threshold(0.01):.3g}")
    else:
        smallest = 1 / (len(calibration) + 1)
        console.print(f"With {len(calibration)} prompts the smallest p-value is {smallest:.2g}; 99 are needed for a false-positive rate of 0.01.")
