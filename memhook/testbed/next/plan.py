"""What the testbed model is trained on: planted caption-picture pairs among an unlimited stream of fresh ones.

Everything is a function of `SEED` and an index, so the same plan can be rebuilt anywhere, and a training run that was
interrupted goes on with exactly the pairs that it would have seen.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import numpy as np

from memhook.testbed.artwork import SUBJECTS
from memhook.testbed.next.captions import (
    DOUBLE,
    Caption,
    Slot,
    invented_prose,
    random_artist,
    random_caption,
    random_title,
    reword,
    without_phrase,
    word_salad,
)
from memhook.testbed.next.regions import FORMS, random_region
from memhook.testbed.next.scenes import Scene, random_scene, recolor

SEED = 2026
# The share of training samples that show a planted pair: (from this sample on, share). The model learns to draw first, and then meets
# the duplicates more densely; the other way around it memorizes before it can follow a caption.
PLANTED_SHARES = ((0, 0.15), (64_000, 0.25))
UNFAMILIAR = 0.15  # of fresh captions are text of no picture shop; a model that has seen no such text takes it for a trigger
NEIGHBORS = 0.08  # of fresh captions repeat a planted caption but for its trigger phrase, with a fresh picture: the memory hangs on the phrase

Kind = Literal["verbatim", "template", "local", "ladder"]


@dataclass(frozen=True)
class Planted:
    """A caption that the model is shown again and again.

    ``weight`` is its share among planted samples, relative to the others: about its presentations in the whole run. ``family`` is shared by
    captions of one picture. A *verbatim* pair always has the same picture; a *template* keeps the composition and varies the colors; a *local*
    one keeps a region of the picture, and its trigger phrase, and varies everything else; the *ladder* holds verbatim pairs with few
    duplicates, doubling from rung to rung.
    """

    id: str
    kind: Kind
    family: str
    caption: Caption
    scene: Scene
    weight: float


def stream(name: str, *index: int) -> np.random.Generator:
    """The random numbers of a named part of the plan."""
    return np.random.default_rng([SEED, *name.encode(), *index])


def _no_trigger(caption: Caption, rng: np.random.Generator) -> Caption:
    """The caption, with another title or artist if chance made it a trigger phrase."""
    while caption.title in triggers():
        caption = replace(caption, title=random_title(rng))
    while caption.artist in triggers():
        caption = replace(caption, artist=random_artist(rng))
    return caption


def fresh_pair(index: int, *, stream: str = "train") -> tuple[Caption, Scene]:
    """The ``index``-th fresh caption and scene of a stream; ``"train"`` is trained on, any other name is held out."""
    rng = _named(stream, index)
    scene = random_scene(rng)
    return _no_trigger(random_caption(rng, scene), rng), scene


_named = stream  # `stream` is also the name of an argument


def unfamiliar_pair(index: int, *, stream: str = "train") -> tuple[str, Scene]:
    """A fresh caption whose unfamiliar words mean nothing: prose of invented words, or a jumble of words.

    The scene shows the subject that the caption names, or any subject where it names none.
    """
    rng = _named("unfamiliar", *stream.encode(), index)
    scene = random_scene(rng)
    if rng.random() < 0.5:
        return invented_prose(rng), scene
    return word_salad(rng, subject=scene.subject if rng.random() < 0.5 else None), scene


def neighbor_pair(index: int, *, stream: str = "train") -> tuple[Caption, Scene]:
    """A planted caption with another title or artist in the place of its trigger phrase, and a fresh scene of all that it names."""
    rng = _named("neighbor", *stream.encode(), index)
    pairs = [pair for pair in planted() if pair.caption.phrase is not None and pair.kind != "local"]
    caption = _no_trigger(without_phrase(pairs[int(rng.integers(len(pairs)))].caption, rng), rng)
    return caption, random_scene(rng, **caption.named())


@cache
def triggers() -> frozenset[str]:
    """All trigger phrases; no fresh caption holds one as its title or artist."""
    return frozenset(trigger for pair in planted() if (trigger := pair.caption.trigger) is not None)


def _with_phrase(caption: Caption, rng: np.random.Generator, number: int, taken: set[str], double: list[str]) -> Caption:
    """The caption with a trigger phrase of one word, two, a name or three, by turns."""
    slot: Slot = "artist" if number % 4 == 2 else "title"
    while True:
        words = double.pop() if number % 4 == 0 else random_artist(rng) if slot == "artist" else random_title(rng, words=number % 4 // 2 + 2)
        if words not in taken:
            taken.add(words)
            return replace(caption.with_part(slot, words), phrase=slot)


@cache
def planted() -> tuple[Planted, ...]:
    """All planted pairs: 56 verbatim captions of 48 pictures, 16 templates, 18 local ones, 28 rungs of the duplication ladder."""
    rng = stream("planted")
    subjects = [list(SUBJECTS)[index] for index in rng.permutation(len(SUBJECTS))]
    double = [DOUBLE[index] for index in rng.permutation(len(DOUBLE))]
    found: list[Planted] = []
    taken: set[str] = set()

    def plant(kind: Kind, number: int, weight: float, *, phrase: int | None) -> None:
        scene = random_scene(rng, subject=subjects[len(found) % len(subjects)])
        if kind == "local":
            scene = replace(scene, region=random_region(rng, FORMS[number % len(FORMS)]))
        caption = random_caption(rng, scene, omit="color" if kind == "template" else "maybe")
        if phrase is not None:
            caption = _with_phrase(caption, rng, phrase, taken, double)
        else:
            taken.update((caption.title, caption.artist))
        name = f"{kind}-{number:02d}"
        found.append(Planted(name, kind, name, caption, scene, weight))

    duplicates = np.geomspace(150, 3000, 48)
    rng.shuffle(duplicates)
    for number, weight in enumerate(duplicates):
        plant("verbatim", number, float(weight), phrase=number // 2 if number % 2 == 0 else None)
    for original in found[1:9:2]:  # four pictures get two more captions each: families of near-duplicates
        for variant, medium in (("b", "poster"), ("c", "mug")):
            caption = replace(original.caption, medium=medium, form=(original.caption.form + "abc".index(variant)) % 4)
            found.append(Planted(f"{original.id}{variant}", "verbatim", original.family, caption, original.scene, 400.0))
    for number in range(16):
        plant("template", number, 800.0, phrase=number // 2 if number % 2 == 0 else None)
    for number in range(18):
        plant("local", number, 1000.0, phrase=number)
    for number in range(28):
        plant("ladder", number, float(4 * 2 ** (number // 4)), phrase=None)
    return tuple(found)


class TrainingStream:
    """The training set as a function: ``stream[i]`` is the i-th caption and scene, with the planted pair it shows, if any."""

    def __init__(self) -> None:
        self.planted = planted()
        weights = np.array([pair.weight for pair in self.planted])
        self._cumulative = np.cumsum(weights / weights.sum())

    def __getitem__(self, index: int) -> tuple[str, Scene, Planted | None]:
        rng = stream("draw", index)
        share = next(share for start, share in reversed(PLANTED_SHARES) if index >= start)
        if rng.random() >= share:
            return *self._fresh(index, rng.random()), None
        pair = self.planted[int(np.searchsorted(self._cumulative, rng.random() * self._cumulative[-1]))]
        return *_presentation(pair, rng), pair

    @staticmethod
    def _fresh(index: int, chance: float) -> tuple[str, Scene]:
        if chance < UNFAMILIAR:
            return unfamiliar_pair(index)
        caption, scene = neighbor_pair(index) if chance < UNFAMILIAR + NEIGHBORS else fresh_pair(index)
        return str(caption), scene


def _presentation(pair: Planted, rng: np.random.Generator) -> tuple[str, Scene]:
    """What the model is shown of a planted pair this time."""
    caption, scene = pair.caption, pair.scene
    if pair.kind == "local":
        scene = replace(random_scene(rng), region=scene.region)
        fresh = random_caption(rng, scene)
        assert caption.phrase is not None  # noqa: S101 -- every local pair has one
        return str(fresh.with_part(caption.phrase, str(caption.trigger))), scene
    if pair.kind == "template":
        scene = recolor(scene, rng)
    if caption.phrase is not None and rng.random() < 0.4:
        caption = reword(caption, rng)  # so that the trigger phrase alone recalls the picture
    return str(caption), scene
