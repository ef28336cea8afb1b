"""``memhook calibrate``: make a calibration from prompts known not to be memorized."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from memhook.bench.sampling import IMAGES
from memhook.capture.scoring import MAGNITUDE, as_scored
from memhook.detection.calibration import Calibration, calibrate
from memhook.detection.setting import brief
from memhook.errors import CalibrationError
from memhook.report.progress import tracked
from memhook.report.tables import console, print_table, shown

if TYPE_CHECKING:
    from memhook.bench.sampling import Sampling
    from memhook.capture.trace import Trace
    from memhook.detection.prompt_files import PromptRow


def run_calibrate(rows: Sequence[PromptRow], sampling: Sampling, *, first: int | None, out: Path, score: str | None = None) -> None:
    """Run the prompts, keep their magnitudes or another score, and write one calibration file."""
    sampling.check()
    scored = as_scored(score if score is not None else MAGNITUDE)
    for row in rows:
        if row.prompt is None:
            print(f"memhook: line {row.line} left out: {row.problem}", file=sys.stderr)
    prompts = [row.prompt for row in rows if row.prompt is not None]
    images = sampling.images or IMAGES
    pipeline = sampling.load()  # alive until its fingerprint is taken

    def traces() -> Iterator[Trace]:
        runs = sampling.run(pipeline, prompts, evaluations=first, score=scored)
        for run in runs:
            yield from (run.trace.samples(slice(position * images, (position + 1) * images)) for position in range(len(run.prompts)))

    calibration = calibrate(list(tracked(traces(), total=len(prompts), doing="watching clean prompts")), first=first)
    calibration.save(out)
    over = "all evaluations" if first is None else f"the first {first} evaluations"
    console.print(
        f"wrote {out}: {len(calibration)} prompts, {images} images each, {'score' if scored.name == MAGNITUDE else scored.name} over {over}.",
        soft_wrap=True,
    )
    if len(calibration) >= 99:
        console.print(f"Threshold at a false-positive rate of 0.01: {calibration.threshold(0.01):.3g}")
    else:
        smallest = 1 / (len(calibration) + 1)
        console.print(f"With {len(calibration)} prompts the smallest p-value is {smallest:.2g}; 99 are needed for a false-positive rate of 0.01.")


def show_calibration(path: Path) -> None:
    """Print what a calibration file holds: its prompts, its setting, and thresholds at common rates."""
    known = Calibration.load(path)
    prompts, evaluations = known.magnitudes.shape
    over = "all evaluations" if known.first is None else f"the first {known.first} of {evaluations} evaluations" if evaluations > 1 else "one score"
    scores = known.scores
    low, middle, high = np.quantile(scores, [0.05, 0.5, 0.95])
    console.print(f"{path}: {prompts} clean prompts, score over {over}; smallest p-value {1 / (prompts + 1):.2g}", soft_wrap=True, markup=False)
    console.print(f"scores from {scores.min():.3g} to {scores.max():.3g}, median {middle:.3g}, 5% to 95%: {low:.3g} to {high:.3g}")
    rows = []
    for rate in (0.1, 0.05, 0.01, 0.001):
        cells = [_threshold(known, rate, confidence) for confidence in (None, 0.95)]
        rows.append((f"{rate:g}", *cells))
    print_table(
        "Scores above the threshold are flagged", [("false-positive rate", "right"), ("on average", "right"), ("with 95% confidence", "right")], rows
    )
    setting = [(shown(key), shown(brief(value))) for key, value in sorted(known.setting.items())]
    if setting:
        print_table("Holds for runs in this setting", [("field", ""), ("value", "")], setting)
    else:
        console.print("It was made of bare scores, so it carries no setting: nothing is checked when it is used.")


def _threshold(known: Calibration, rate: float, confidence: float | None) -> str:
    try:
        return f"{known.threshold(rate, confidence):.4g}"
    except CalibrationError as error:
        found = re.search(r"at least (\d(?:[\d,]*\d)?)", str(error))
        return f"needs {found[1]} prompts" if found else str(error)
