"""``memhook bench detection``: how well the magnitude separates memorized from clean prompts of the bundled model."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from memhook.cli.tables import console, print_table
from memhook.errors import MemhookError
from memhook.evaluation import roc_auc, tpr_at_fpr
from memhook.files import write_text
from memhook.testbed.bundle import GUIDANCE_SCALE, MemorizedPrompt
from memhook.testbed.study import IMAGES, Study, run_study

MARKERS = ("<!-- bench detection: begin -->", "<!-- bench detection: end -->")


@dataclass(frozen=True)
class DetectionRow:
    """One line of the table: ``images`` a prompt, the mean over the first ``evaluations``."""

    images: int
    evaluations: int
    auc: float
    tpr_at_1_percent_fpr: float


def detection_rows(study: Study) -> list[DetectionRow]:
    """AUC and TPR for one and four images, at the first evaluation, the first ten, and all.

    For one image the figures are means over the four seeds, each taken alone. The ladder of few duplicates is left out.
    """
    memorized = study.where(lambda prompt: isinstance(prompt, MemorizedPrompt) and prompt.kind != "ladder")
    clean = study.where(lambda prompt: not isinstance(prompt, MemorizedPrompt))
    total = study.magnitudes.shape[1]
    found = []
    for images in (1, IMAGES):
        for evaluations in (1, 10, total):
            scores = study.magnitudes[:, :evaluations].mean(axis=1)  # (N, n)
            tries = [scores[:, number] for number in range(IMAGES)] if images == 1 else [scores.mean(axis=1)]
            auc = np.mean([roc_auc(values[memorized], values[clean]) for values in tries])
            tpr = np.mean([tpr_at_fpr(values[memorized], values[clean]) for values in tries])
            found.append(DetectionRow(images, evaluations, float(auc), float(tpr)))
    return found


def run_detection_bench(work: Path, *, out: Path | None, per_source: int, readme: Path | None) -> None:
    """Sample (or go on sampling), print the table, and write it where asked."""
    from rich.progress import track

    if readme is not None:
        _readme_text(readme)  # before the long run: a wrong file is told at once
    study = run_study(work, per_source=per_source, track=lambda batches: iter(track(batches, "sampling prompts", console=console)))
    rows = detection_rows(study)
    planted = len(study.where(lambda prompt: isinstance(prompt, MemorizedPrompt) and prompt.kind != "ladder"))
    print_table(
        f"Detection on the bundled model: {planted} memorized and {4 * per_source} clean test prompts, "
        f"DDIM {study.magnitudes.shape[1]} steps, guidance scale {GUIDANCE_SCALE}",
        [("images", "right"), ("evaluations", "right"), ("AUC", "right"), ("TPR at 1% FPR", "right")],
        [(str(row.images), str(row.evaluations), f"{row.auc:.3f}", f"{row.tpr_at_1_percent_fpr:.3f}") for row in rows],
    )
    if out is not None:
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, fieldnames=list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
        write_text(out / "detection.csv", buffer.getvalue())
        write_text(
            out / "detection.json",
            json.dumps({"memorized": planted, "clean": 4 * per_source, "rows": [asdict(row) for row in rows]}, indent=2) + "\n",
        )
    if readme is not None:
        before, rest = _readme_text(readme).split(MARKERS[0])  # read again: it may have been edited in the meantime
        after = rest.split(MARKERS[1])[1]
        write_text(readme, f"{before}{MARKERS[0]}\n{markdown(rows, planted=planted, clean=4 * per_source)}{MARKERS[1]}{after}")


def markdown(rows: list[DetectionRow], *, planted: int, clean: int) -> str:
    """The table as it stands in the README."""
    by_images = {images: [row for row in rows if row.images == images] for images in (1, IMAGES)}
    head = [
        ("first evaluation" if row.evaluations == 1 else f"first {row.evaluations}" if row.evaluations == 10 else f"all {row.evaluations}")
        for row in by_images[1]
    ]
    lines = [f"| {planted} memorized, {clean} clean prompts | {' | '.join(head)} |", "|---|---|---|---|"]
    for images, chosen in by_images.items():
        cells = " | ".join(f"{row.auc:.3f} / {row.tpr_at_1_percent_fpr:.3f}" for row in chosen)
        lines.append(f"| {images} image{'s' if images > 1 else ''} a prompt | {cells} |")
    return "\n".join(lines) + "\n"


def _readme_text(readme: Path) -> str:
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    if any(text.count(marker) != 1 for marker in MARKERS):
        raise MemhookError(f"{readme} does not hold the two lines {MARKERS[0]} and {MARKERS[1]}, once each; the table is written between them")
    return text
