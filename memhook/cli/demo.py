"""``memhook demo``: the main job on the bundled model, as a table and one HTML page."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np

from memhook.capture.prompts import per_prompt
from memhook.cli.demo_prompts import IMAGES, measure
from memhook.report.tables import console, number, print_table, shown, verdict


def run_demo(out: Path, *, seed: int) -> None:
    """Measure, print the table, write the page."""
    from memhook.cli.page import write_page

    started = time.monotonic()
    with console.status("watching ten prompts on the bundled model, four images each"):
        prompts, calibration = measure(seed=seed)
    seconds = time.monotonic() - started
    rows = []
    for row in prompts:
        means = per_prompt(row.magnitudes, np.zeros(IMAGES, int))[0]
        rows.append(
            (
                shown(row.prompt),
                row.about,
                number(float(means[0])),
                number(float(means.mean())),
                number(row.p_value, 2),
                verdict(row.memorized, row.undecided),
            )
        )
    print_table(
        f"Magnitude of the text-conditional prediction, {IMAGES} images a prompt, {len(prompts[0].magnitudes)} evaluations",
        [("prompt", ""), ("where it comes from", ""), ("first", "right"), ("all", "right"), ("p-value", "right"), ("verdict", "")],
        rows,
    )
    caught = sum(row.memorized for row in prompts if row.group == "memorized")
    wrong = sum(row.memorized for row in prompts if row.group == "fresh")
    planted = sum(row.group == "memorized" for row in prompts)
    page = write_page(out, prompts, calibration)
    console.print(
        f"{caught} of {planted} memorized prompts flagged, {wrong} of {len(prompts) - planted} fresh ones, at a false-positive rate of 0.01 "
        f"(score over the first {calibration.first} evaluations, calibrated on {len(calibration)} clean prompts). Took {seconds:.0f} s."
    )
    console.print(f"Page with pictures: {os.fspath(page)}", soft_wrap=True, highlight=False)
