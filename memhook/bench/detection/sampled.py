"""What detectors are compared on: magnitudes, and densities of the pictures, of labeled prompts that were sampled once for all of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from memhook.errors import MemhookError
from memhook.files import read_arrays, write_arrays
from memhook.plugins import find_adapter
from memhook.scores.density import descriptor_density, pixel_density
from memhook.testbed.bundle import MemorizedPrompt

if TYPE_CHECKING:
    from memhook.bench.sampling import Sampling
    from memhook.testbed.bundle import CleanPrompt
    from memhook.testbed.study import Study

EARLY = (1, 10)
"""Steps before the last at which detectors are compared, as in the paper's Table 1."""

Describe = Callable[[np.ndarray], Tensor]
"""``describe(pictures (m, h, w, 3) uint8) -> (m, d)``: a vector for each picture, such as SSCD's."""


@dataclass(frozen=True)
class Labeled:
    """A prompt of which it is known whether the model memorized it; near-duplicates share a ``family``."""

    prompt: str
    family: str
    memorized: bool


@dataclass(frozen=True, eq=False)
class Sampled:
    """``N`` prompts with what each detector sees of their ``n`` images.

    Attributes:
        prompts: The prompts.
        magnitudes: ``(N, s, n)`` float32.
        densities: By ``"space/step/images"`` (such as ``"pixels/10/4"``): ``(N, n // images)``, the density of each group of so many images.
    """

    prompts: tuple[Labeled, ...]
    magnitudes: np.ndarray
    densities: Mapping[str, np.ndarray]


def group_sizes(images: int) -> list[int]:
    """Numbers of images a prompt to compare at: 4, 16 and 32 as in the paper, as far as there are so many, and all of them."""
    return sorted({size for size in (4, 16, 32, images) if 2 <= size <= images})


def stages(steps: int) -> list[int]:
    """The steps at which detectors are compared in a run of so many: the early ones, and the last."""
    return [*(step for step in EARLY if step < steps), steps]


def densities(pictures: Mapping[int, np.ndarray], describe: Describe | None) -> dict[str, np.ndarray]:
    """Densities of pictures ``(p, n, h, w, 3)`` uint8 by step, over disjoint groups of the prompt's images."""
    found = {}
    for step, images in pictures.items():
        count, total = images.shape[:2]
        vectors = None if describe is None else rearrange(describe(rearrange(images, "p n ... -> (p n) ...")), "(p n) d -> p n d", p=count)
        for size in group_sizes(total):
            used = total - total % size
            grouped = rearrange(torch.from_numpy(images[:, :used]), "p (g n) h w c -> p g n c h w", n=size)
            found[f"pixels/{step}/{size}"] = torch.stack([pixel_density(rows) for rows in grouped]).numpy()
            if vectors is not None:
                found[f"descriptors/{step}/{size}"] = descriptor_density(rearrange(vectors[:, :used], "p (g n) d -> p g n d", n=size)).numpy()
    return found


def bundled(prompts: Sequence[MemorizedPrompt | CleanPrompt]) -> list[Labeled]:
    """Prompts of the bundled model, without the ladder of few duplicates, which is neither memorized nor clean."""
    return [Labeled(row.prompt, row.family, isinstance(row, MemorizedPrompt)) for row in prompts if not _on_ladder(row)]


def of_study(study: Study, describe: Describe | None) -> Sampled:
    """The bundled model's study as `bundled` prompts."""
    chosen = study.where(lambda prompt: not _on_ladder(prompt))
    pictures = {step: images[chosen] for step, images in {**study.previews, study.magnitudes.shape[1]: study.images}.items()}
    return Sampled(tuple(bundled(study.prompts)), study.magnitudes[chosen], densities(pictures, describe))


def _on_ladder(prompt: MemorizedPrompt | CleanPrompt) -> bool:
    return isinstance(prompt, MemorizedPrompt) and prompt.kind == "ladder"


def sample(
    prompts: Sequence[Labeled],
    sampling: Sampling,
    pipeline: Any,
    *,
    work: Path,
    describe: Describe | None,
    descriptor: str | None,
    track: Callable[[Sequence[int]], Iterator[int]],
) -> Sampled:
    """Run each prompt once, or read what an earlier run left in ``work``; one file per batch of prompts.

    Args:
        prompts: What to run.
        sampling: How.
        pipeline: The loaded model.
        work: Folder of the files; those of another model or setting are left alone, damaged ones are made again.
        describe: The descriptor, if any.
        descriptor: What identifies it, such as a digest of its file.
        track: Wraps the sequence of batches, to show progress.
    """
    adapter = find_adapter(pipeline)
    setting = {**adapter.describe(), "sampling": [sampling.images, sampling.steps, sampling.guidance_scale, sampling.seed], "descriptor": descriptor}
    parts = []
    for start in track(range(0, len(prompts), sampling.batch_size)):
        texts = [row.prompt for row in prompts[start : start + sampling.batch_size]]
        identity = hashlib.sha256(json.dumps([setting, start, texts], sort_keys=True).encode()).hexdigest()[:20]
        path = work / f"{identity}.safetensors"
        part = read_arrays(path)
        if part is None:
            part = _batch(texts, sampling, pipeline, describe=describe, start=start)
            write_arrays(path, part)
        parts.append(part)
    names = parts[0].keys()
    if any(part.keys() != names for part in parts):
        raise MemhookError(f"the batches in {work} hold different measures; start again in an empty folder")
    whole = {name: np.concatenate([part[name] for part in parts]) for name in names}
    return Sampled(tuple(prompts), whole.pop("magnitudes"), whole)


def _batch(texts: list[str], sampling: Sampling, pipeline: Any, *, describe: Describe | None, start: int) -> dict[str, np.ndarray]:
    [run] = sampling.run(pipeline, texts, start=start, previews=early_steps(pipeline, sampling.steps))
    count = len(texts)
    pictures = {step: _stacked(made, count) for step, made in {**run.previews, sampling.steps: run.images}.items()}
    magnitudes = rearrange(run.trace.magnitudes, "s (p n) -> p s n", p=count)
    return {"magnitudes": np.ascontiguousarray(magnitudes), **densities(pictures, describe)}


def _stacked(images: list[Any], prompts: int) -> np.ndarray:
    return rearrange(np.stack([np.asarray(image.convert("RGB")) for image in images]), "(p n) ... -> p n ...", p=prompts)


def early_steps(pipeline: Any, steps: int) -> tuple[int, ...]:
    """The steps whose implied pictures can be looked at: none with schedulers that do not say which those are."""
    from memhook_diffusers.previews import clean_estimates

    try:
        with clean_estimates(pipeline, ()):
            return tuple(stages(steps)[:-1])
    except MemhookError:
        return ()
