"""Running the comparison, and writing it as tables, files and figures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from memhook.bench.detection.rows import DETECTORS, DetectionRow, detection_rows
from memhook.bench.detection.sampled import Describe, Labeled, Sampled, bundled, of_study, sample
from memhook.bench.detection.timing import time_detectors
from memhook.bench.sampling import IMAGES
from memhook.bench.written import put_in_page, read_page
from memhook.detection.prompt_files import read_prompts
from memhook.errors import MemhookError
from memhook.files import csv_text, write_text
from memhook.report.progress import tracked
from memhook.report.tables import console, print_table

if TYPE_CHECKING:
    from memhook.bench.sampling import Sampling


@dataclass(frozen=True)
class Options:
    """What to compare on: the bundled model's prompts (``per_source`` clean ones of each source), or two files of prompts."""

    work: Path
    memorized: str | None = None
    clean: str | None = None
    per_source: int = 100
    descriptor: Path | None = None
    timed: int = 3
    out: Path | None = None
    page: Path | None = None


def run_detection_bench(sampling: Sampling, options: Options) -> None:
    """Sample (or go on sampling), time, print the tables, and write them where asked."""
    if options.page is not None:
        read_page(options.page, "detection")  # before the long run: a wrong file is told at once
    if (options.memorized is None) != (options.clean is None):
        raise MemhookError("a comparison on your own prompts needs both --memorized and --clean")
    if options.memorized is None and sampling.model is not None:
        raise MemhookError("the bundled prompts are memorized by the bundled model alone; give --memorized and --clean for another model")
    sampling.check()
    describe, about_descriptor = _descriptor(options, sampling)
    pipeline, sampled = _sampled(sampling, options, describe, about_descriptor)
    prompts = [row.prompt for row in sampled.prompts]
    chosen = prompts[:: max(1, len(prompts) // options.timed)][: options.timed] if options.timed else []
    with console.status("timing each detector on a few prompts"):
        seconds = time_detectors(pipeline, sampling, chosen, describe=describe) if chosen else []
    rows = detection_rows(sampled, seconds=seconds)
    unique = detection_rows(sampled, deduplicated=True)
    about = _about(sampled, sampling, about_descriptor)
    _print(rows, unique, about)
    if options.out is not None:
        _write(options.out, [*rows, *unique], about, sampled)
    if options.page is not None:
        put_in_page(options.page, "detection", markdown(rows, about))


def _descriptor(options: Options, sampling: Sampling) -> tuple[Describe | None, str | None]:
    """The descriptor, and what identifies it."""
    if options.descriptor is not None:
        from PIL import Image

        from memhook.evaluation.similarity import load_descriptor

        network = load_descriptor(options.descriptor, device=sampling.device)
        digest = hashlib.sha256(options.descriptor.read_bytes()).hexdigest()[:12]
        return (lambda pictures: network([Image.fromarray(picture) for picture in pictures])), f"{options.descriptor.name} (SHA-256 {digest})"
    if sampling.model is not None:
        return None, None
    from memhook.testbed.bundle import load_reader
    from memhook.testbed.evidence import to_tensor

    reader = load_reader()

    @torch.no_grad()
    def describe(pictures: np.ndarray) -> torch.Tensor:
        return torch.cat([reader.describe(to_tensor(part)) for part in np.array_split(pictures, max(1, len(pictures) // 256))])

    return describe, "features of the bundled model's reader"


def _sampled(sampling: Sampling, options: Options, describe: Describe | None, descriptor: str | None) -> tuple[Any, Sampled]:
    def track(batches: Sequence[int]) -> Iterator[int]:
        return tracked(batches, total=len(batches), doing="sampling batches of prompts")

    pipeline = sampling.load()
    if options.memorized is not None and options.clean is not None:
        prompts = [*_labeled(options.memorized, memorized=True), *_labeled(options.clean, memorized=False)]
    else:
        from memhook.testbed.bundle import GUIDANCE_SCALE, STEPS
        from memhook.testbed.study import run_study, study_prompts

        if (sampling.steps, sampling.guidance_scale) == (STEPS, GUIDANCE_SCALE):  # what the model's card has sampled too
            study = run_study(options.work, per_source=options.per_source, images=sampling.images or IMAGES, track=track)
            return pipeline, of_study(study, describe)
        prompts = bundled(study_prompts(options.per_source))
    return pipeline, sample(prompts, sampling, pipeline, work=options.work, describe=describe, descriptor=descriptor, track=track)


def _labeled(source: str, *, memorized: bool) -> list[Labeled]:
    found = []
    for row in read_prompts(source):
        if row.prompt is None:
            console.print(f"{source}, line {row.line} left out: {row.problem}", style="yellow", markup=False)
        else:
            found.append(Labeled(row.prompt, row.family if row.family is not None else row.prompt, memorized))
    return found


def _about(sampled: Sampled, sampling: Sampling, descriptor: str | None) -> dict[str, Any]:
    memorized = [row for row in sampled.prompts if row.memorized]
    return {
        "model": sampling.model or "bundled",
        "memorized": len(memorized),
        "memorized_families": len({row.family for row in memorized}),
        "clean": len(sampled.prompts) - len(memorized),
        "images": sampled.magnitudes.shape[2],
        "steps": sampled.magnitudes.shape[1],
        "guidance_scale": sampling.guidance_scale,
        "descriptor": descriptor,
        "device": torch.cuda.get_device_name() if sampling.device.startswith("cuda") else f"{sampling.device}, {torch.get_num_threads()} threads",
    }


def stage_name(step: int, steps: int) -> str:
    """A column of the table."""
    return f"all {steps}" if step == steps else "first step" if step == 1 else f"first {step}"


def _print(rows: Sequence[DetectionRow], unique: Sequence[DetectionRow], about: dict[str, Any]) -> None:
    title = (
        f"{about['memorized']} memorized and {about['clean']} clean prompts, {about['steps']} steps, guidance scale {about['guidance_scale']:g}: "
        "AUC / TPR at 1% FPR / seconds a prompt, with 95% intervals of the first two"
    )
    _print_table(title, rows, steps=about["steps"])
    if about["memorized_families"] < about["memorized"]:
        _print_table(f"The same with one prompt of each of the {about['memorized_families']} memorized families", unique, steps=about["steps"])
    console.print(
        "Density: mean over all pairs of a prompt's images; before the last step, of the clean pictures that the predictions imply. "
        f"Descriptor: {about['descriptor'] or 'none given'}. Seconds on {about['device']}. For fewer images than were made, figures are means over "
        "groups of them. Intervals by stratified bootstrap over families.",
        soft_wrap=True,
    )


def _print_table(title: str, rows: Sequence[DetectionRow], *, steps: int) -> None:
    stages = sorted({row.step for row in rows})
    lines = []
    for detector, images in dict.fromkeys((row.detector, row.images) for row in rows):
        cells = {row.step: row for row in rows if (row.detector, row.images) == (detector, images)}
        lines.append((DETECTORS[detector], str(images), *(_cell(cells.get(step)) for step in stages)))
    print_table(title, [("detector", ""), ("n", "right"), *((stage_name(step, steps), "right") for step in stages)], lines)


def _cell(row: DetectionRow | None) -> str:
    if row is None:
        return "-"
    figures = f"{row.auc.value:.3f} / {row.tpr_at_1_percent_fpr.value:.3f}"
    seconds = "" if row.seconds is None else f" / {row.seconds:.2g}"
    return f"{figures}{seconds}\n{row.auc.low:.3f}-{row.auc.high:.3f}, {row.tpr_at_1_percent_fpr.low:.2f}-{row.tpr_at_1_percent_fpr.high:.2f}"


def _write(out: Path, rows: Sequence[DetectionRow], about: dict[str, Any], sampled: Sampled) -> None:
    from memhook.bench.detection.figures import histogram, magnitude_bands

    lines = [_flat(row) for row in rows]
    write_text(out / "detection.csv", csv_text(lines))
    write_text(out / "detection.json", json.dumps({**about, "rows": lines}, indent=2) + "\n")
    magnitude_bands(sampled, out / "magnitudes.png")
    histogram(sampled, out / "histogram.png")
    console.print(f"wrote detection.csv, detection.json, magnitudes.png and histogram.png to {out}", soft_wrap=True)


def _flat(row: DetectionRow) -> dict[str, Any]:
    found: dict[str, Any] = {"detector": row.detector, "images": row.images, "step": row.step, "deduplicated": row.deduplicated}
    for name in ("auc", "tpr_at_1_percent_fpr"):
        interval = getattr(row, name)
        found |= {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return {**found, "seconds_per_prompt": row.seconds}


def markdown(rows: Sequence[DetectionRow], about: dict[str, Any]) -> str:
    """The table as it stands in the README and in docs/benchmarks.md."""
    stages = sorted({row.step for row in rows})
    head = " | ".join(stage_name(step, about["steps"]) for step in stages)
    what = f"{about['memorized']} memorized, {about['clean']} clean prompts, guidance scale {about['guidance_scale']:g}"
    lines = [f"| {what} | {head} |", f"|---|{'---|' * len(stages)}"]
    for detector, images in dict.fromkeys((row.detector, row.images) for row in rows):
        cells = {row.step: row for row in rows if (row.detector, row.images) == (detector, images)}
        texts = []
        for step in stages:
            row = cells.get(step)
            seconds = "" if row is None or row.seconds is None else f" / {row.seconds:.2g} s"
            texts.append("-" if row is None else f"{row.auc.value:.3f} / {row.tpr_at_1_percent_fpr.value:.3f}{seconds}")
        lines.append(f"| {DETECTORS[detector]}, {images} image{'s' if images > 1 else ''} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"
