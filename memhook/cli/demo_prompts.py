"""The prompts of ``memhook demo``, and what is measured on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from memhook.detection.calibration import Calibration
from memhook.detection.verdict import detect

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

IMAGES = 4


@dataclass(frozen=True)
class DemoPrompt:
    """One prompt of the demo with what was measured on it."""

    group: str  # "memorized" or "fresh"
    about: str  # where the prompt comes from
    prompt: str
    training_image: Image | None
    images: list[Image]
    magnitudes: np.ndarray  # (s, n)
    score: float
    p_value: float
    memorized: bool
    undecided: bool


def choose_prompts() -> list[tuple[str, str, str, Image | None]]:
    """Five memorized prompts and five fresh ones, the held-out ones about the same subjects: (group, about, prompt, training image)."""
    from memhook import testbed

    verbatim = testbed.memorized(kind="verbatim")
    triggered = [row for row in verbatim if row.trigger is not None]
    plain = [row for row in verbatim if row.trigger is None]
    planted = [triggered[3], plain[3], triggered[8], plain[9], testbed.memorized(kind="template")[2]]
    chosen: list[tuple[str, str, str, Image | None]] = [
        ("memorized", f"{row.kind}, shown {row.duplicates} times in training", row.prompt, row.image()) for row in planted
    ]
    held_out = testbed.clean(split="test", source="held-out")
    fresh = [next(row for row in held_out if row.subject == subject) for subject in (planted[0].subject, planted[1].subject)]
    fresh += [testbed.clean(split="test", source=source)[5] for source in ("once", "foreign", "random")]
    words = {"held-out": "never seen in training", "once": "seen once in training", "foreign": "caption of another style", "random": "random tokens"}
    return chosen + [("fresh", words[row.source], row.prompt, None) for row in fresh]


def measure(*, seed: int, fpr: float = 0.01) -> tuple[list[DemoPrompt], Calibration]:
    """Generate four images for each demo prompt while watching, and judge each prompt."""
    from memhook import testbed
    from memhook_diffusers.prompts import run_prompts

    calibration = Calibration.load(testbed.calibration_path())
    chosen = choose_prompts()
    found: list[DemoPrompt] = []
    runs = run_prompts(testbed.load_pipeline(), [prompt for _, _, prompt, _ in chosen], images_per_prompt=IMAGES, seed=seed, batch_size=5)
    for run in runs:
        decided = detect(run.trace, calibration, fpr=fpr)
        for index in range(len(run.prompts)):
            group, about, prompt, training_image = chosen[len(found)]
            rows = run.trace.groups == index
            images = [image for image, mine in zip(run.images, rows, strict=True) if mine]
            found.append(
                DemoPrompt(
                    group,
                    about,
                    prompt,
                    training_image,
                    images,
                    run.trace.magnitudes[:, rows],
                    float(decided.scores[index]),
                    float(decided.p_values[index]),
                    bool(decided.memorized[index]),
                    bool(decided.undecided[index]),
                )
            )
    return found, calibration
