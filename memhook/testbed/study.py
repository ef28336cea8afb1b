"""One sampling run over the bundled model's test prompts, shared by the model card and the benchmarks, and kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from memhook.errors import MemhookError
from memhook.files import replace_file
from memhook.fingerprint import fingerprint
from memhook.testbed.bundle import GUIDANCE_SCALE, STEPS, CleanPrompt, MemorizedPrompt, clean, load_pipeline, memorized
from memhook_diffusers.prompts import run_prompts

IMAGES = 4
SEED = 20_000_000
_BATCH = 16  # prompts per run and per file


@dataclass(frozen=True, eq=False)
class Study:
    """Every prompt with the magnitudes and the pictures of its four samples.

    Attributes:
        prompts: ``N`` prompts, planted ones first.
        magnitudes: ``(N, s, n)`` float32.
        images: ``(N, n, 32, 32, 3)`` uint8.
    """

    prompts: tuple[MemorizedPrompt | CleanPrompt, ...]
    magnitudes: np.ndarray
    images: np.ndarray

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


def run_study(work: Path, *, per_source: int, track: Callable[[Sequence[int]], Iterator[int]] | None = None) -> Study:
    """Sample four pictures for each test prompt, or read what an earlier run left in ``work``.

    Args:
        work: Folder for one file per 16 prompts; files of another model or setting are made again.
        per_source: Clean test prompts of each source.
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
        identity = hashlib.sha256(json.dumps([texts, start, model, IMAGES, STEPS, GUIDANCE_SCALE, SEED]).encode()).hexdigest()[:20]
        path = work / f"{identity}.safetensors"
        part = _read(path)
        if part is None:
            [run] = run_prompts(
                pipeline, texts, images_per_prompt=IMAGES, steps=STEPS, guidance_scale=GUIDANCE_SCALE, seed=SEED + 1000 * start, batch_size=_BATCH
            )  # fmt: skip
            shape = (len(batch), IMAGES)
            magnitudes = run.trace.magnitudes.T.reshape(*shape, -1).transpose(0, 2, 1)  # (prompts, s, n)
            images = np.stack([np.asarray(image.convert("RGB")) for image in run.images])
            part = {"magnitudes": np.ascontiguousarray(magnitudes), "images": images.reshape(*shape, *images.shape[1:])}
            replace_file(path, lambda temporary, part=part: save_file(part, temporary))  # type: ignore[misc]
        parts.append(part)
    return Study(tuple(prompts), np.concatenate([part["magnitudes"] for part in parts]), np.concatenate([part["images"] for part in parts]))


def _read(path: Path) -> dict[str, np.ndarray] | None:
    try:
        return dict(load_file(path)) if path.is_file() else None
    except (SafetensorError, OSError):
        return None  # damaged: made again
