"""``memhook generate``: the same seeds without and with a guard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from memhook.capture.watching import watch
from memhook.detection.calibration import Calibration
from memhook.errors import MemhookError, MemorizationDetectedError
from memhook.files import replace_file, write_text
from memhook.mitigation.guard import guard
from memhook.report.tables import console

if TYPE_CHECKING:
    from memhook.bench.sampling import Sampling
    from memhook.capture.trace import Trace
    from memhook.mitigation.guard_report import Guard


def run_generate(
    prompt: str,
    sampling: Sampling,
    *,
    calibration: Path | None,
    action: Literal["mitigate", "stop", "warn"],
    fpr: float,
    decide_after: int,
    target: float | None,
    out: Path,
) -> int:
    """Generate, write pictures, plot and report into ``out``, and give the exit status: 1 where the guard stopped the run."""
    from memhook import testbed

    if not prompt.strip():
        raise MemhookError("the prompt is empty; an empty prompt is the unconditional one, so there is nothing to guard. Give it some text")
    sampling.check()
    if calibration is None and sampling.model is not None:
        raise MemhookError("a guard needs a calibration of this model; make one with `memhook calibrate` and name it with --guard")
    known = Calibration.load(calibration if calibration is not None else testbed.calibration_path()).using(decide_after)
    pipeline = sampling.load()
    images = sampling.images or int(known.setting.get("images_per_prompt", 4))

    with watch(pipeline) as plain:
        without = sampling.generate(pipeline, prompt, images=images)
    stopped, guarded, made = None, None, None
    try:
        with guard(pipeline, known, fpr=fpr, action=action, target_magnitude=target) as guarded:
            made = sampling.generate(pipeline, prompt, images=images)
    except MemorizationDetectedError as error:
        stopped = str(error)
    console.print(stopped if stopped is not None else str(guarded), markup=False)
    _write(out, prompt, without, made, plain, guarded, stopped)
    return 1 if stopped is not None else 0


def _write(out: Path, prompt: str, without: list[Any], made: list[Any] | None, plain: Trace, guarded: Guard | None, stopped: str | None) -> None:
    pictures = {"without": without, **({"with": made} if made is not None else {})}
    for name, images in pictures.items():
        for number, image in enumerate(images):
            replace_file(out / f"{name}-{number}.png", lambda temporary, image=image: image.save(temporary, "PNG"))  # type: ignore[misc]
    traces = {"without": plain, **({"with": guarded.trace} if made is not None and guarded is not None else {})}
    figure = _figure(pictures, traces)
    replace_file(out / "comparison.png", lambda temporary: figure.savefig(temporary, format="png", dpi=130))
    report = {
        "prompt": prompt,
        "report": stopped or str(guarded),
        "stopped": stopped is not None,
        **{name: trace.to_dict() for name, trace in traces.items()},
    }
    write_text(out / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    console.print(f"wrote {len(without) + len(made or [])} pictures, comparison.png and report.json into {out}", soft_wrap=True)


def _figure(pictures: dict[str, list[Any]], traces: dict[str, Trace]) -> Any:
    from matplotlib.figure import Figure

    columns = max(len(images) for images in pictures.values())
    figure = Figure(figsize=(2.2 * columns, 2.3 * len(pictures) + 3), layout="constrained")
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=[2.3 * len(pictures), 3])[:, 0]
    grid = upper.subplots(len(pictures), columns, squeeze=False)
    for row, (name, images) in zip(grid, pictures.items(), strict=True):
        for axes in row:
            axes.set_axis_off()
        for axes, image in zip(row, images, strict=False):
            axes.imshow(np.asarray(image), interpolation="nearest")
        row[0].set_title(f"{name} guard", loc="left")
    axes = lower.subplots()
    for (name, trace), style in zip(traces.items(), ("-", "--"), strict=False):
        lines = trace.magnitudes
        steps = np.arange(1, len(lines) + 1)
        axes.plot(steps, lines.mean(axis=1), style, label=f"{name} guard (mean of {lines.shape[1]})")
        axes.fill_between(steps, lines.min(axis=1), lines.max(axis=1), alpha=0.15)
    axes.set(xlabel="evaluation of the denoiser", ylabel=f"magnitude ({traces['without'].space})", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure
