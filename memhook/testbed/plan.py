"""What the testbed model is trained on: planted caption-picture pairs among an unlimited stream of fresh ones.

Everything is a function of `SEED` and an index, so the same plan can be rebuilt anywhere, and a training run that was
interrupted goes on with exactly the pairs that it would have seen.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from memhook.testbed.artwork import SUBJECTS
from memhook.testbed.captions import Caption, foreign_caption, invented_prose, random_caption, reword, trigger_phrase, word_salad
from memhook.testbed.scenes import COLORS, Scene, random_scene, recolor

SEED = 2024
# The share of training samples that show a planted pair: (from this sample on, share). The model learns to draw first, and then meets
# the duplicates more densely; the other way around it memorizes before it can follow a caption.
PLANTED_SHARES = ((0, 0.2), (64_000, 0.4), (128_000, 0.6), (224_000, 0.5))
# From this sample on, three in ten fresh captions hold unfamiliar text. Before, the rarest word pieces are those of the trigger phrases,
# and a model that has seen nothing else takes any unfamiliar text for a trigger.
UNFAMILIAR_FROM = 224_000
CLEAN_PER_SOURCE = 600
ONCE_WINDOW = 100_000  # "trained once" prompts are drawn from the first so many training samples

Kind = Literal["verbatim", "template", "ladder"]
Source = Literal["once", "held-out", "foreign", "random"]


@dataclass(frozen=True)
class Planted:
    """A caption that the model is shown again and again.

    ``weight`` is its share among planted samples, relative to the others. ``family`` is shared by captions of one picture.
    A *verbatim* pair always has the same picture; a *template* keeps the composition and varies the colors; the *ladder*
    holds verbatim pairs with few duplicates, doubling from rung to rung.
    """

    id: str
    kind: Kind
    family: str
    caption: Caption
    scene: Scene
    weight: float


@dataclass(frozen=True)
class Clean:
    """A prompt that is not memorized, with where it comes from; ``scene`` is the one training picture of a *once* prompt."""

    id: str
    source: Source
    split: Literal["calibration", "test"]
    family: str
    prompt: str
    subject: str | None = None
    color: str | None = None
    scene: Scene | None = None


def _stream(name: str, *index: int) -> np.random.Generator:
    return np.random.default_rng([SEED, *name.encode(), *index])


def _optional_color(rng: np.random.Generator) -> str | None:
    return list(COLORS)[rng.integers(len(COLORS))] if rng.random() < 0.5 else None


def fresh_pair(index: int, *, stream: str = "train") -> tuple[Caption, Scene]:
    """The ``index``-th fresh caption and scene of a stream; ``"train"`` is trained on, any other name is held out."""
    rng = _stream(stream, index)
    subject = list(SUBJECTS)[rng.integers(len(SUBJECTS))]
    color = _optional_color(rng)
    return random_caption(rng, subject=subject, color=color), random_scene(rng, subject=subject, color=color)


def unfamiliar_pair(index: int, *, stream: str = "train") -> tuple[str, Scene]:
    """A fresh caption whose unfamiliar words mean nothing: an invented phrase that is no trigger, prose of invented words, or a jumble.

    The scene shows the subject that the caption names, or any subject where it names none.
    """
    rng = _stream("unfamiliar", *stream.encode(), index)
    kind = int(rng.integers(3))
    if kind == 0:
        caption, scene = fresh_pair(index, stream=stream)
        return str(replace(caption, trigger=trigger_phrase(rng), trigger_first=bool(rng.integers(2)))), scene
    if kind == 1:
        return invented_prose(rng), random_scene(rng)
    subject = list(SUBJECTS)[rng.integers(len(SUBJECTS))]
    return word_salad(rng, subject=subject if rng.random() < 0.5 else None), random_scene(rng, subject=subject)


def scene_with_color(index: int, *, stream: str) -> tuple[Scene, str]:
    """A fresh scene and the color word of its background."""
    rng = _stream(stream, index)
    color = list(COLORS)[rng.integers(len(COLORS))]
    return random_scene(rng, color=color), color


def planted() -> list[Planted]:
    """All planted pairs: 72 verbatim captions of 64 pictures, 24 templates, 28 rungs of the duplication ladder."""
    rng = _stream("planted")
    subjects = list(SUBJECTS)
    found: list[Planted] = []

    def plant(kind: Kind, number: int, weight: float) -> None:
        subject = subjects[int(rng.integers(len(subjects)))] if kind == "ladder" else subjects[number % len(subjects)]
        color = None if kind == "template" else _optional_color(rng)
        caption = random_caption(rng, subject=subject, color=color)
        if number % 2 == 0 and kind != "ladder":  # half of the memorized captions carry a rare trigger phrase
            caption = Caption(**{**vars(caption), "trigger": trigger_phrase(rng), "trigger_first": number % 4 == 0})
        name = f"{kind}-{number:02d}"
        scene = random_scene(rng, subject=subject, color=color)
        found.append(Planted(name, kind, name, caption, scene, weight))

    duplicates = np.geomspace(400, 1600, 64)
    rng.shuffle(duplicates)
    for number, weight in enumerate(duplicates):
        plant("verbatim", number, float(weight))
    for original in found[1:9:2]:  # four pictures get two more captions each: families of near-duplicates
        for variant in "bc":
            caption = Caption(**{**vars(original.caption), "medium": {"b": "poster", "c": "mug"}[variant], "form": "abc".index(variant)})
            found.append(Planted(f"{original.id}{variant}", "verbatim", original.family, caption, original.scene, 500.0))
    for number in range(24):
        plant("template", number, 900.0)
    for number in range(28):
        plant("ladder", number, float(4 * 2 ** (number // 4)))
    return found


class TrainingStream:
    """The training set as a function: ``stream[i]`` is the i-th caption and scene, with the planted pair it shows, if any."""

    def __init__(self) -> None:
        self.planted = planted()
        weights = np.array([pair.weight for pair in self.planted])
        self._cumulative = np.cumsum(weights / weights.sum())

    def __getitem__(self, index: int) -> tuple[str, Scene, Planted | None]:
        rng = _stream("draw", index)
        share = next(share for start, share in reversed(PLANTED_SHARES) if index >= start)
        if rng.random() >= share:
            if index >= UNFAMILIAR_FROM and rng.random() < 0.3:
                return *unfamiliar_pair(index), None
            caption, scene = fresh_pair(index)
            return str(caption), scene, None
        pair = self.planted[int(np.searchsorted(self._cumulative, rng.random() * self._cumulative[-1]))]
        caption, scene = pair.caption, pair.scene
        if pair.kind == "template":
            scene = recolor(scene, rng)
        if caption.trigger is not None and rng.random() < 0.4:
            caption = reword(caption, rng)  # so that the trigger phrase alone recalls the picture
        return str(caption), scene, pair


def clean_prompts(vocabulary: list[str]) -> list[Clean]:
    """2,400 prompts that are not memorized, 600 of each source, half of each for calibration and half for testing.

    ``vocabulary`` holds the whole words of the tokenizer, from which the random strings are made. Words of trigger phrases, which are
    frequent enough to be in it, are left out: one of them alone can recall a planted picture, so a string that holds it is not clean.
    """
    found: list[Clean] = []
    training = TrainingStream()
    rng = _stream("clean")
    triggers = {word for pair in training.planted if pair.caption.trigger is not None for word in pair.caption.trigger.split()}
    once = (int(index) for index in rng.permutation(ONCE_WINDOW) if training[int(index)][2] is None)
    for number in range(CLEAN_PER_SOURCE):
        splits: tuple[Literal["calibration"], Literal["test"]] = ("calibration", "test")
        split = splits[number % 2]
        caption, scene = fresh_pair(next(once))
        found.append(Clean(f"once-{number:03d}", "once", split, f"subject:{caption.subject}", str(caption), caption.subject, caption.color, scene))
        caption, _ = fresh_pair(number, stream="held-out")
        found.append(Clean(f"held-out-{number:03d}", "held-out", split, f"subject:{caption.subject}", str(caption), caption.subject, caption.color))
        text, frame = foreign_caption(rng)
        found.append(Clean(f"foreign-{number:03d}", "foreign", split, f"frame:{frame}", text))
        words = [vocabulary[int(i)] for i in rng.integers(len(vocabulary), size=int(rng.integers(4, 13)))]
        string = " ".join(word for word in words if word not in triggers)
        found.append(Clean(f"random-{number:03d}", "random", split, f"random-{number:03d}", string))
    return found
