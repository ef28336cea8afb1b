"""What the pictures of a `Study` show: copies of training pictures, diversity over seeds, agreement with captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from memhook.evaluation.roc import roc_auc
from memhook.testbed.bundle import CleanPrompt, MemorizedPrompt, load_reader
from memhook.testbed.measures import COPY_THRESHOLD, copy_similarities, copy_similarity
from memhook.testbed.plan import SEED
from memhook.testbed.scenes import Scene, draw, random_scene, recolor

if TYPE_CHECKING:
    from memhook.testbed.study import Study

_COLORINGS = 64  # of a template, when looking for the nearest


def to_tensor(pictures: np.ndarray) -> Tensor:
    """uint8 ``(n, 32, 32, 3)`` to float ``(n, 3, 32, 32)`` in -1..1."""
    return torch.from_numpy(pictures.copy()).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def _scene(fields: dict[str, Any]) -> Scene:
    return Scene(**{**fields, "color": tuple(fields["color"]), "second_color": tuple(fields["second_color"])})


def training_pictures(prompt: MemorizedPrompt) -> Tensor:
    """The pictures that a planted caption was trained with: one, or for a template 64 of its colorings."""
    scene = _scene(prompt.scene)
    if prompt.kind != "template":
        return to_tensor(draw(scene)[None])
    rng = np.random.default_rng([SEED, *prompt.id.encode()])
    return to_tensor(np.stack([draw(recolor(scene, rng)) for _ in range(_COLORINGS)]))


@dataclass(frozen=True)
class Validation:
    """The measures on held-out pairs of composed scenes."""

    pairs: int
    copy_auc: float  # degraded copies against other pictures of the same subject
    copies_found: float  # share of degraded copies above the threshold
    others_matched: float  # share of other pictures of the same subject above it
    subject_accuracy: float
    color_accuracy: float


def validate_measures(pairs: int = 2000) -> Validation:
    """Degraded copies of held-out pictures against other pictures of the same subject; and the reader on the degraded copies."""
    from memhook.testbed.train.reader import degrade, labeled

    pictures, labels = labeled(0, pairs, stream="validation")
    copies = degrade(pictures, torch.Generator().manual_seed(1))
    rng = np.random.default_rng([SEED, 1])
    names = list(load_subjects())
    others = to_tensor(np.stack([draw(random_scene(rng, subject=names[subject])) for subject in labels[:, 0].tolist()]))
    own, other = copy_similarity(copies, pictures).numpy(), copy_similarity(others, pictures).numpy()
    reading = load_reader()(copies)
    return Validation(
        pairs,
        roc_auc(own, other),
        float((own >= COPY_THRESHOLD).mean()),
        float((other >= COPY_THRESHOLD).mean()),
        float((reading.subject.argmax(1) == labels[:, 0]).float().mean()),
        float((reading.color.argmax(1) == labels[:, 1]).float().mean()),
    )


def load_subjects() -> Sequence[str]:
    """The subjects' words, in the order of the reader's logits."""
    from memhook.testbed.artwork import SUBJECTS

    return list(SUBJECTS)


@dataclass(frozen=True)
class PromptEvidence:
    """What the four pictures of one prompt show.

    Attributes:
        own: ``(n,)`` similarity of each picture to the prompt's own training picture; NaN where it has none.
        nearest: ``(n,)`` similarity to the nearest of all planted training pictures (and its own).
        diversity: One minus the mean similarity between the prompt's pictures: 0 if all seeds give one picture.
        subject_right: ``(n,)`` bool: the picture shows the caption's subject; None where the caption names none.
        color_right: ``(n,)`` bool: the background has the color that the caption names; None where it names none.
        magnitude: Mean magnitude over the first ten evaluations and the four pictures.
        first: The same at the first evaluation.
    """

    prompt: MemorizedPrompt | CleanPrompt
    own: np.ndarray
    nearest: np.ndarray
    diversity: float
    subject_right: np.ndarray | None
    color_right: np.ndarray | None
    magnitude: float
    first: float

    @property
    def reproduced(self) -> bool:
        """More than half of the seeds give a copy of the prompt's own training picture."""
        return bool((self.own >= COPY_THRESHOLD).mean() > 0.5)


@torch.no_grad()
def gather(study: Study) -> list[PromptEvidence]:
    """Look at every picture of the study."""
    planted = [prompt for prompt in study.prompts if isinstance(prompt, MemorizedPrompt)]
    known = [training_pictures(prompt) for prompt in planted]
    gallery = torch.cat(known)
    reader = load_reader()
    found = []
    for index, prompt in enumerate(study.prompts):
        pictures = to_tensor(study.images[index])
        if isinstance(prompt, MemorizedPrompt):
            own = copy_similarities(pictures, known[index]).amax(1)
        elif prompt.scene is not None:
            own = copy_similarities(pictures, to_tensor(draw(_scene(prompt.scene))[None])).amax(1)
        else:
            own = torch.full((len(pictures),), torch.nan)
        nearest = torch.fmax(copy_similarities(pictures, gallery).amax(1), own)
        between = copy_similarities(pictures, pictures)
        n = len(pictures)
        diversity = 1 - float((between.sum() - between.trace()) / (n * (n - 1)))
        reading = reader(pictures)
        subject, color = prompt.subject, getattr(prompt, "color", None)
        found.append(
            PromptEvidence(
                prompt, own.numpy(), nearest.numpy(), diversity,
                np.array([name == subject for name in reading.subjects()]) if subject is not None else None,
                np.array([name == color for name in reading.colors()]) if color is not None else None,
                float(study.magnitudes[index, :10].mean()), float(study.magnitudes[index, 0].mean()),
            )
        )  # fmt: skip
    return found
