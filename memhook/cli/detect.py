"""``memhook detect``: score prompts on any diffusers pipeline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.text import Text

from memhook.calibration import Calibration, per_prompt
from memhook.cli.tables import console, number, print_table, shown, verdict
from memhook.detection import detect
from memhook.errors import MemhookError

_WITHOUT_CALIBRATION = 10  # evaluations to score where no calibration says how many


def run_detect(
    prompts: list[str],
    *,
    model: str | None,
    calibration: Path | None,
    fpr: float,
    images: int | None,
    steps: int,
    guidance_scale: float,
    device: str,
    dtype: str,
    seed: int,
) -> None:
    """Score each prompt, print a table, and say what was found."""
    from memhook import testbed
    from memhook_diffusers.loading import load_pipeline
    from memhook_diffusers.prompts import run_prompts

    if guidance_scale <= 1:
        raise MemhookError(
            f"guidance_scale is {guidance_scale:g}; without guidance there is no "
            "unconditional prediction to compare with. Use a scale above 1, such as 7.5"
        )
    known = None
    if calibration is not None:
        known = Calibration.load(calibration)
    elif model is None:
        known = Calibration.load(testbed.calibration_path())
    pipeline = testbed.load_pipeline() if model is None else load_pipeline(model, dtype=dtype, device=device)
    per_image = images or (int(known.setting.get("images_per_prompt", 4)) if known is not None else 4)
    first = known.first if known is not None else min(steps, _WITHOUT_CALIBRATION)

    rows, flagged = [], 0
    runs = run_prompts(
        pipeline, prompts, images_per_prompt=per_image, steps=steps, guidance_scale=guidance_scale, seed=seed, evaluations=first, batch_size=1
    )
    for run in runs:
        [prompt] = run.prompts
        magnitudes = per_prompt(run.trace.magnitudes, run.trace.groups)[0]
        start = number(float(magnitudes[run.trace.has_guidance][0]))
        if known is None:
            mean = float(np.nanmean(magnitudes))
            rows.append((shown(prompt), start, number(mean), "-", Text("not calibrated", style="yellow")))
            continue
        found = detect(run.trace, known, fpr=fpr)
        flagged += int(found.memorized.sum())
        rows.append(
            (
                shown(prompt),
                start,
                number(float(found.scores[0])),
                number(float(found.p_values[0]), 2),
                verdict(bool(found.memorized[0]), bool(found.undecided[0])),
            )
        )
    over = "all evaluations" if first is None else f"first {first}"
    print_table(
        f"Magnitude of the text-conditional prediction, {per_image} images a prompt",
        [("prompt", ""), ("first evaluation", "right"), (over, "right"), ("p-value", "right"), ("verdict", "")],
        rows,
    )
    if known is None:
        console.print(
            "Without a calibration a magnitude has no p-value: larger is more memorized, but how large is normal "
            "depends on the model and the sampler."
        )
    else:
        console.print(
            f"{flagged} of {len(prompts)} prompts flagged at a false-positive rate of {fpr:g}, calibrated on {len(known)} clean prompts. "
            "The p-value is the chance of a score this high if the prompt is not memorized."
        )
