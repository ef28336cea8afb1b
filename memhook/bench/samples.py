"""Making pictures of the bundled model from embeddings, with the same seeds for every way of changing a prompt, and judging them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from memhook.adapting.fingerprint import fingerprint
from memhook.capture.watching import probe, watch
from memhook.errors import MemhookError
from memhook.files import read_arrays, write_arrays
from memhook.testbed.bundle import GUIDANCE_SCALE, STEPS, MemorizedPrompt, load_pipeline, load_reader, model_path, read_memorized
from memhook.testbed.captions import Caption, reword
from memhook.testbed.evidence import to_tensor, training_pictures
from memhook.testbed.measures import copy_similarities
from memhook.testbed.plan import planted

if TYPE_CHECKING:
    from memhook.capture.prediction import Evaluation
    from memhook.testbed.measures import Reader

BATCH = 32  # samples in one run of the sampler


@dataclass(frozen=True)
class Sample:
    """A picture to be made: of which prompt, and from which noise."""

    prompt: MemorizedPrompt
    seed: int


@dataclass(frozen=True, eq=False)
class Pictures:
    """``n`` pictures as they came out.

    Attributes:
        images: ``(n, 32, 32, 3)`` uint8.
        magnitudes: ``(n,)`` float32: at the first evaluation.
    """

    images: np.ndarray
    magnitudes: np.ndarray


@dataclass(frozen=True, eq=False)
class Judged:
    """What ``n`` pictures show.

    Attributes:
        similarity: ``(n,)``: `copy_similarity` to the training picture, for a template to the nearest of 64 of its colorings.
        alignment: ``(n,)`` in 0..1: the share of what the caption names that the picture shows: the subject, and the background's
            color where it names one.
    """

    similarity: np.ndarray
    alignment: np.ndarray


@dataclass(frozen=True, eq=False)
class Studio:
    """A model of the testbed, ready to make pictures from embeddings.

    Attributes:
        pipeline: A ``StableDiffusionPipeline`` with a deterministic sampler.
        steps: Of the sampler.
        folder: Where the model and the ground truth of its training are.
    """

    pipeline: Any
    steps: int = STEPS
    folder: Path = field(default_factory=model_path)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings ``(n, l, d)``."""
        tokenizer = self.pipeline.tokenizer
        ids = tokenizer(list(prompts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt").input_ids
        embedding: Tensor = self.pipeline.text_encoder(ids)[0]
        return embedding

    def cut_off(self, prompts: Sequence[str]) -> np.ndarray:
        """``(n,)`` bool: the prompt is longer than the text encoder's window."""
        tokenizer = self.pipeline.tokenizer
        return np.array([len(tokenizer(prompt, verbose=False).input_ids) > tokenizer.model_max_length for prompt in prompts])

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """The noise that the pipeline itself draws for these seeds, ``(n, 4, 16, 16)``."""
        unet = self.pipeline.unet
        shape = (1, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        return torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    def _run(self, embeddings: Tensor, noise: Tensor, output_type: str) -> Any:
        return self.pipeline(
            prompt_embeds=embeddings,
            negative_prompt_embeds=self.encode([""]).expand(len(embeddings), -1, -1),
            latents=noise,
            num_inference_steps=self.steps,
            guidance_scale=GUIDANCE_SCALE,
            output_type=output_type,
        ).images

    def evaluations(self, embeddings: Tensor, noise: Tensor, *, count: int = 1) -> list[Evaluation]:
        """The first evaluations of a run, with their replays."""
        return probe(self.pipeline, lambda: self._run(embeddings, noise, "latent"), evaluations=count).evaluations

    def make(self, embeddings: Tensor, noise: Tensor) -> Pictures:
        """Pictures of ``(n, l, d)`` embeddings, each from its own noise."""
        images, magnitudes = [], []
        for start in range(0, len(embeddings), BATCH):
            rows = slice(start, start + BATCH)
            with watch(self.pipeline) as trace:
                images.append(np.asarray(self._run(embeddings[rows], noise[rows], "np")))
            magnitudes.append(trace.magnitudes[0])
        return Pictures((np.concatenate(images) * 255).round().astype(np.uint8), np.concatenate(magnitudes))

    def identity(self) -> list[Any]:
        """What kept pictures must agree with: denoiser, text encoder and sampler."""
        return [fingerprint(self.pipeline.unet), fingerprint(self.pipeline.text_encoder), self.steps, GUIDANCE_SCALE]


def open_studio(folder: Path | None = None, *, steps: int = STEPS) -> Studio:
    """Load the bundled model, or one that ``python -m memhook.testbed.train`` wrote into ``folder``.

    Raises:
        MemhookError: The folder is no such model, or was trained with other captions than this version of memhook plants.
    """
    if folder is None:
        return Studio(load_pipeline(), steps)
    strangers = [row.id for row in read_memorized(folder) if row.id not in _captions() or row.prompt != str(_captions()[row.id])]
    if strangers:
        raise MemhookError(
            f"{folder} was trained with other captions ({strangers[0]} and {len(strangers) - 1} more differ); train it with this version"
        )
    return Studio(load_pipeline(folder), steps, folder)


@cache
def _captions() -> dict[str, Caption]:
    return {pair.id: pair.caption for pair in planted()}


_known: dict[str, Tensor] = {}  # each prompt's training pictures, drawn once: the colorings of a template take a while


@cache
def _reader() -> Reader:
    return load_reader()


def fresh_caption(sample: Sample) -> str:
    """Another caption for the same subject and color, without the trigger phrase: what a user could have asked for instead."""
    caption = replace(_captions()[sample.prompt.id], trigger=None)
    return str(reword(caption, np.random.default_rng([sample.seed, *sample.prompt.id.encode()])))


@torch.no_grad()
def judge(pictures: Pictures, samples: Sequence[Sample]) -> Judged:
    """Compare every picture with its prompt's training picture and with its prompt's caption."""
    tensors = to_tensor(pictures.images)
    for sample in samples:
        if sample.prompt.id not in _known:
            _known[sample.prompt.id] = training_pictures(sample.prompt)
    similarity = [float(copy_similarities(one[None], _known[sample.prompt.id]).max()) for one, sample in zip(tensors, samples, strict=True)]
    reading = _reader()(tensors)
    alignment = []
    for subject, color, sample in zip(reading.subjects(), reading.colors(), samples, strict=True):
        named = _captions()[sample.prompt.id].color
        alignment.append(np.mean([subject == sample.prompt.subject, *([color == named] if named is not None else [])]))
    return Judged(np.array(similarity), np.array(alignment))


def kept(work: Path | None, name: str, identity: Any, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """What ``make`` gives, or what an earlier run with the same identity left in ``work``."""
    if work is None:
        return make()
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:20]
    path = work / f"{name}-{key}.safetensors"
    part = read_arrays(path)
    if part is None:
        part = make()
        write_arrays(path, part)
    return part
