"""One sampling run over the bundled model's test prompts, shared by the model card and the benchmarks, and kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange

from memhook.adapting.fingerprint import fingerprint
from memhook.errors import MemhookError
from memhook.files import read_arrays, write_arrays
from memhook.testbed.bundle import GUIDANCE_SCALE, STEPS, CleanPrompt, MemorizedPrompt, clean, load_pipeline, memorized
from memhook_diffusers.prompts import run_prompts

IMAGES = 4
PREVIEWS = (1, 10)
SEED = 20_000_000
_BATCH = 16  # prompts per run and per file


@dataclass(frozen=True, eq=False)
class Study:
    """Every prompt with the magnitudes and the pictures of its samples.

    Attributes:
        prompts: ``N`` prompts, planted ones first.
        magnitudes: ``(N, s, n)`` float32.
        images: ``(N, n, 32, 32, 3)`` uint8.
        previews: The same for the clean pictures implied at the steps in `PREVIEWS`.
    """

    prompts: tuple[MemorizedPrompt | CleanPrompt, ...]
    magnitudes: np.ndarray
    images: np.ndarray
    previews: dict[int, np.ndarray] = field(default_factory=dict)

    def where(self, choose: Callable[[MemorizedPrompt | CleanPrompt], bool]) -> np.ndarray:
        """The positions of the prompts that are chosen."""
        return np.array([index for index, prompt in enumerate(self.prompts) if choose(prompt)], int)


def study_prompts(per_source: int) -> list[MemorizedPrompt | CleanPrompt]:
    """All planted prompts, and the first so many clean test prompts of each source."""
    found: list[MemorizedPrompt | CleanPrompt] = list(memorized())
    for source in ("once", "held-out", "foreign", "random"):
        rows = clean(split="test", source=source)
        if not 1 <= per_source <= len(rows):
            raise MemhookError(f"per-source is {per_source}; expected 1 to {len(rows)}, the test prompts of each source")
        found += rows[:per_source]
    return found


def run_study(work: Path, *, per_source: int, images: int = IMAGES, track: Callable[[Sequence[int]], Iterator[int]] | None = None) -> Study:
    """Sample pictures for each test prompt, or read what an earlier run left in ``work``.

    Args:
        work: Folder for one file per 16 prompts; files of another model or setting are made again.
        per_source: Clean test prompts of each source.
        images: Pictures of each prompt; 4 for the card.
        track: Wraps the sequence of batches, to show progress.
    """
    prompts = study_prompts(per_source)
    pipeline = load_pipeline()
    model = fingerprint(pipeline.unet)
    starts = range(0, len(prompts), _BATCH)
    parts = []
    for start in track(starts) if track is not None else iter(starts):
        batch = prompts[start : start + _BATCH]
        texts = [prompt.prompt for prompt in batch]
        settings = [texts, start, model, images, STEPS, GUIDANCE_SCALE, SEED, PREVIEWS]
        path = work / f"{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:20]}.safetensors"
        part = read_arrays(path)
        if part is None:
            part = _sample(pipeline, texts, images=images, seed=SEED + 1000 * start)
            write_arrays(path, part)
        parts.append(part)
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Study(tuple(prompts), whole["magnitudes"], whole["images"], {step: whole[f"preview_{step}"] for step in PREVIEWS if step < STEPS})


def _sample(pipeline: Any, texts: list[str], *, images: int, seed: int) -> dict[str, np.ndarray]:
    """One batch of prompts, as arrays whose first two dimensions are prompts and their images."""
    [run] = run_prompts(
        pipeline, texts, images_per_prompt=images, steps=STEPS, guidance_scale=GUIDANCE_SCALE, seed=seed, batch_size=_BATCH,
        previews=[step for step in PREVIEWS if step < STEPS],
    )  # fmt: skip

    def pictures(made: list[Any]) -> np.ndarray:
        return rearrange(np.stack([np.asarray(image.convert("RGB")) for image in made]), "(p n) ... -> p n ...", n=images)

    magnitudes = rearrange(run.trace.magnitudes, "s (p n) -> p s n", n=images)
    return {
        "magnitudes": magnitudes,
        "images": pictures(run.images),
        **{f"preview_{step}": pictures(made) for step, made in run.previews.items()},
    }
