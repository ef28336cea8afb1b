"""``memhook detect``: score prompts on any diffusers pipeline."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.text import Text

from memhook.calibration import Calibration
from memhook.cli.progress import tracked
from memhook.cli.tables import console, number, print_table, shown, verdict
from memhook.detection import detect
from memhook.errors import MemhookError
from memhook.files import replace_file
from memhook.trace import per_prompt

if TYPE_CHECKING:
    from memhook.prompt_files import PromptRow
    from memhook_diffusers.prompts import PromptRun

IMAGES = 4  # a prompt, where neither the user nor a calibration says how many
_WITHOUT_CALIBRATION = 10  # evaluations to score where no calibration says how many
_TABLE = 100  # prompts; longer lists go to a file


@dataclass(frozen=True)
class Sampling:
    """How prompts are run: the model and everything that a calibration depends on."""

    model: str | None
    images: int | None
    steps: int
    guidance_scale: float
    device: str
    dtype: str
    seed: int
    batch_size: int

    def check(self) -> None:
        """Refuse settings under which there is nothing to measure."""
        if self.guidance_scale <= 1:
            raise MemhookError(
                f"guidance_scale is {self.guidance_scale:g}; without guidance there is no unconditional prediction "
                "to compare with. Use a scale above 1, such as 7.5"
            )
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise MemhookError(f"{name} is {getattr(self, name)}; expected 1 or more")
        if self.images is not None and self.images < 1:
            raise MemhookError(f"images is {self.images}; expected 1 or more")

    def load(self) -> Any:
        """The pipeline: the bundled one where no model is named."""
        from memhook import testbed
        from memhook_diffusers.loading import load_pipeline

        return testbed.load_pipeline() if self.model is None else load_pipeline(self.model, dtype=self.dtype, device=self.device)

    def run(
        self, pipeline: Any, prompts: Sequence[str], *, start: int = 0, evaluations: int | None = None, previews: Sequence[int] = ()
    ) -> Iterator[PromptRun]:
        """Watch the prompts, batch by batch; ``start`` is the number of the first prompt, on which its seeds depend."""
        from memhook_diffusers.prompts import run_prompts

        return run_prompts(
            pipeline, prompts, images_per_prompt=self.images or IMAGES, steps=self.steps, guidance_scale=self.guidance_scale,
            seed=self.seed + 1000 * start, evaluations=evaluations, batch_size=self.batch_size, previews=previews,
        )  # fmt: skip

    def generate(self, pipeline: Any, prompt: str, *, images: int) -> list[Any]:
        """Pictures of one prompt, each with a seed of its own: the same ones whenever it is called."""
        import torch

        generators = [torch.Generator().manual_seed(self.seed + image) for image in range(images)]
        options = {"num_images_per_prompt": images, "num_inference_steps": self.steps, "guidance_scale": self.guidance_scale}
        return list(pipeline(prompt=prompt, generator=generators, **options).images)


@dataclass(frozen=True)
class Verdict:
    """One prompt with what was measured; p-value and decision are None without a calibration, the decision also for NaN."""

    line: int
    prompt: str
    first_evaluation: float
    score: float
    p_value: float | None
    memorized: bool | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values: what is not finite is None."""
        return {key: None if isinstance(value, float) and not np.isfinite(value) else value for key, value in vars(self).items()}


def verdicts(rows: Sequence[PromptRow], sampling: Sampling, known: Calibration | None, *, fpr: float) -> Iterator[Verdict]:
    """Run the prompts in batches and judge each."""
    images = sampling.images or (int(known.setting.get("images_per_prompt", IMAGES)) if known is not None else IMAGES)
    first = known.first if known is not None else min(sampling.steps, _WITHOUT_CALIBRATION)
    if known is not None:
        known.threshold(fpr)  # too few prompts for this rate: told before anything runs
    usable = [row for row in rows if row.prompt is not None]
    prompts = [row.prompt for row in usable if row.prompt is not None]
    runs = replace(sampling, images=images).run(sampling.load(), prompts, evaluations=first)
    waiting = iter(usable)
    for run in runs:
        for position, prompt in enumerate(run.prompts):
            part = run.trace.samples(slice(position * images, (position + 1) * images))
            line = next(waiting).line
            magnitudes = per_prompt(part.magnitudes, np.zeros(images, int))[0]
            start = float(magnitudes[part.has_guidance][0])
            if known is None:
                yield Verdict(line, prompt, start, float(np.mean(magnitudes[part.has_guidance])), None, None)
                continue
            found = detect(part, known, fpr=fpr)
            yield Verdict(
                line, prompt, start, float(found.scores[0]), float(found.p_values[0]), None if found.undecided[0] else bool(found.memorized[0])
            )


def run_detect(rows: Sequence[PromptRow], sampling: Sampling, *, calibration: Path | None, fpr: float, out: str | None, fail_on_flag: bool) -> int:
    """Judge the prompts, print or write the result, and give the exit status."""
    from memhook import testbed

    sampling.check()
    file = calibration if calibration is not None else testbed.calibration_path() if sampling.model is None else None
    known = Calibration.load(file) if file is not None else None
    bad = [row for row in rows if row.prompt is None]
    for row in bad:
        print(f"memhook: line {row.line} left out: {row.problem}", file=sys.stderr)
    count = len(rows) - len(bad)
    found = list(tracked(verdicts(rows, sampling, known, fpr=fpr), total=count, doing="watching prompts"))
    lines = [json.dumps(row.to_dict(), ensure_ascii=False) for row in found]
    lines += [json.dumps({"line": row.line, "prompt": None, "problem": row.problem}) for row in bad]
    text = "".join(f"{line}\n" for line in lines)
    if out == "-":
        sys.stdout.write(text)
    elif out is not None:
        replace_file(Path(out), lambda temporary: temporary.write_text(text, encoding="utf-8"))
    flagged = sum(row.memorized is True for row in found)
    if out != "-":
        _print(found, known, fpr=fpr, flagged=flagged, images=sampling.images)
    return 1 if fail_on_flag and flagged else 0


def _print(found: Sequence[Verdict], known: Calibration | None, *, fpr: float, flagged: int, images: int | None) -> None:
    first = _WITHOUT_CALIBRATION if known is None else known.first
    over = "all evaluations" if first is None else f"first {first}"
    number_of_images = images or (known.setting.get("images_per_prompt", 4) if known is not None else 4)
    rows = [
        (
            shown(row.prompt),
            number(row.first_evaluation),
            number(row.score),
            "-" if row.p_value is None else number(row.p_value, 2),
            Text("not calibrated", style="yellow") if row.p_value is None else verdict(bool(row.memorized), row.memorized is None),
        )
        for row in found[:_TABLE]
    ]
    print_table(
        f"Magnitude of the text-conditional prediction, {number_of_images} images a prompt",
        [("prompt", ""), ("first evaluation", "right"), (over, "right"), ("p-value", "right"), ("verdict", "")],
        rows,
    )
    if len(found) > _TABLE:
        console.print(f"{len(found) - _TABLE} more prompts are not shown; use --out to write all of them.")
    if known is None:
        console.print(
            "Without a calibration a magnitude has no p-value: larger is more memorized, but how large is normal "
            "depends on the model and the sampler. Make one with `memhook calibrate`."
        )
    else:
        console.print(
            f"{flagged} of {len(found)} prompts flagged at a false-positive rate of {fpr:g}, calibrated on {len(known)} clean prompts. "
            "The p-value is the chance of a score this high if the prompt is not memorized."
        )
