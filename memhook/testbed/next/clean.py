"""Prompts that are meant to be clean: ordinary ones from four sources, and hard ones that share words with planted captions.

Whether a hard one is clean is not assumed: the model's pictures have to decide.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from memhook.testbed.next.captions import Caption, foreign_caption, random_artist, random_title, without_phrase, word_salad
from memhook.testbed.next.plan import Planted, TrainingStream, fresh_pair, planted, stream, triggers
from memhook.testbed.next.scenes import Scene

PER_SOURCE = 600
PER_HARD_SOURCE = 120
ONCE_WINDOW = 100_000  # "trained once" prompts are drawn from the first so many training samples

Source = Literal["once", "held-out", "foreign", "random", "near", "half", "sense"]
Split = Literal["calibration", "test"]
ORDINARY: tuple[Source, ...] = ("once", "held-out", "foreign", "random")
HARD: tuple[Source, ...] = ("near", "half", "sense")
_SPLITS: tuple[Split, Split] = ("calibration", "test")


@dataclass(frozen=True)
class Clean:
    """A prompt that is meant to be clean, with where it comes from.

    ``caption`` is None for text that is no picture-shop caption; ``scene`` is the one training picture of a *once* prompt; ``beside`` is the
    planted pair that a hard prompt shares words with.
    """

    id: str
    source: Source
    split: Split
    family: str
    prompt: str
    caption: Caption | None = None
    scene: Scene | None = None
    beside: str | None = None


def clean_prompts(vocabulary: list[str]) -> list[Clean]:
    """2,400 ordinary prompts, 600 of each source, half of each for calibration and half for testing; then the hard ones, all for testing.

    ``vocabulary`` holds the whole words of the tokenizer, from which the random strings are made.
    """
    return [*_ordinary(vocabulary), *_hard()]


def _ordinary(vocabulary: list[str]) -> list[Clean]:
    found: list[Clean] = []
    training = TrainingStream()
    rng = stream("clean")
    once = (int(index) for index in rng.permutation(ONCE_WINDOW) if training[int(index)][0] == str(fresh_pair(int(index))[0]))
    for number in range(PER_SOURCE):
        split = _SPLITS[number % 2]
        caption, scene = fresh_pair(next(once))
        found.append(Clean(f"once-{number:03d}", "once", split, f"subject:{caption.subject}", str(caption), caption, scene))
        caption, _ = fresh_pair(number, stream="held-out")
        found.append(Clean(f"held-out-{number:03d}", "held-out", split, f"subject:{caption.subject}", str(caption), caption))
        text, frame = foreign_caption(rng)
        found.append(Clean(f"foreign-{number:03d}", "foreign", split, f"frame:{frame}", text))
        words = [vocabulary[int(index)] for index in rng.integers(len(vocabulary), size=int(rng.integers(4, 13)))]
        found.append(Clean(f"random-{number:03d}", "random", split, f"random-{number:03d}", " ".join(words)))
    return found


def _hard() -> list[Clean]:
    found: list[Clean] = []
    pairs = [pair for pair in planted() if pair.kind in ("verbatim", "template", "local") and pair.id == pair.family]
    phrased = [pair for pair in pairs if pair.caption.phrase is not None]
    several = [pair for pair in phrased if len(str(pair.caption.trigger).split()) > 1]
    for number in range(PER_HARD_SOURCE):
        rng = stream("hard", number)
        beside: dict[Source, Planted] = {"near": _turn(pairs, number), "half": _turn(several, number), "sense": _turn(phrased, number)}
        made = {
            "near": _near(beside["near"].caption, rng),
            "half": _half(beside["half"].caption, number, rng),
            "sense": _other_sense(beside["sense"], number, rng),
        }
        for source, pair in beside.items():
            prompt = made[source]
            caption = prompt if isinstance(prompt, Caption) else None
            found.append(Clean(f"{source}-{number:03d}", source, "test", f"beside:{pair.family}", str(prompt), caption, None, pair.id))
    return found


def _turn(pairs: list[Planted], number: int) -> Planted:
    return pairs[number % len(pairs)]


def _near(caption: Caption, rng: np.random.Generator) -> Caption:
    """All of a planted caption but its trigger phrase; but its title or artist where it has none."""
    if caption.phrase is None:
        slot: Literal["title", "artist"] = ("title", "artist")[int(rng.integers(2))]
        caption = replace(caption, phrase=slot)
    while True:
        made = without_phrase(caption, rng)
        if not {made.title, made.artist} & triggers():
            return made


def _half(caption: Caption, number: int, rng: np.random.Generator) -> Caption:
    """A fresh caption whose title or artist shares some words with a trigger phrase: all but one of them, at its place."""
    fresh, _ = fresh_pair(number, stream="half")
    words = str(caption.trigger).split()
    changed = int(rng.integers(len(words)))
    while True:
        other = random_artist(rng) if caption.phrase == "artist" else random_title(rng, words=len(words))
        made = " ".join(other.split()[index] if index == changed else word for index, word in enumerate(words))
        if made not in triggers():
            return fresh.with_part(caption.phrase or "title", made)


def _other_sense(pair: Planted, number: int, rng: np.random.Generator) -> Caption | str:
    """The words of a trigger phrase where they mean something else: a title's one word as a surname, longer phrases torn apart in a jumble."""
    words = str(pair.caption.trigger).split()
    fresh, _ = fresh_pair(number, stream="sense")
    if len(words) == 1:
        while (artist := f"{random_artist(rng).split()[0]} {words[0]}") in triggers():
            pass
        return replace(fresh, artist=artist)
    jumble = word_salad(rng, subject=fresh.subject).split()
    for word in words:  # each later one in front of the earlier ones, so that the phrase itself cannot come about
        jumble.insert(0, word.lower())
        jumble.insert(0, fresh.subject)
    return " ".join(jumble[1:])
