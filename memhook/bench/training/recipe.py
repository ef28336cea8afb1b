"""The recipe of the fine-tune: its sizes, its data, and the ways that are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from memhook.errors import MemhookError
from memhook.mitigation.random_additions import add_random_tokens
from memhook.testbed.plan import fresh_pair

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from memhook.testbed.captions import Caption
    from memhook.testbed.scenes import Scene


@dataclass(frozen=True)
class Recipe:
    """Sizes of a fine-tune.

    Attributes:
        steps: Optimizer steps.
        batch: Pairs a step.
        planted: New pairs that are shown again and again.
        share: The share of a batch that shows one of them.
        learning_rate: Of AdamW, after 20 steps of warm-up and before the decay; only the denoiser is trained.
        pictures: Made for each planted caption when the run is judged.
        held_out: Fresh captions that are never trained on, one picture each.
        sampling_steps: Of the sampler that makes these.
        observed: Batches of clean pairs that thresholds are read off.
        bins: Of timesteps, for the calibrated threshold.
        noisy_bins: The same, for a threshold that is calibrated at the noisy timesteps alone.
    """

    steps: int = 200
    batch: int = 16
    planted: int = 6
    share: float = 0.5
    learning_rate: float = 1e-3
    pictures: int = 4
    held_out: int = 24
    sampling_steps: int = 15
    observed: int = 96
    bins: int = 10
    noisy_bins: int = 3

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "planted", "pictures", "held_out", "sampling_steps", "observed", "bins", "noisy_bins"):
            if getattr(self, name) < 1:
                raise MemhookError(f"{name} is {getattr(self, name)}; expected at least 1")
        if not 0 < self.share < 1:
            raise MemhookError(f"share is {self.share}; expected a share between 0 and 1, such as 0.5")


@dataclass(frozen=True)
class Way:
    """One way to train.

    Attributes:
        name: As shown.
        tau: Filter with this number at every timestep.
        fpr: Filter with the calibrated threshold of this rate.
        noisy: Judge at the noisy timesteps alone, with a threshold that is calibrated there.
        remember: By how many verdicts a sample is left out at every timestep; 0 for none.
        fraction: The share of losses with an unconditional pass.
        tokens: Add so many random tokens to every caption (RTA, Somepalli et al. 2023), each time anew.
    """

    name: str
    tau: float | None = None
    fpr: float | None = None
    noisy: bool = False
    remember: int = 0
    fraction: float = 1.0
    tokens: int = 0

    @property
    def filters(self) -> bool:
        """Whether there is a filter."""
        return self.tau is not None or self.fpr is not None


NOISY = (800, 999)  # of 1,000: where pairs that the bundled model has memorized stand out (docs/training.md)
_REMEMBER = 10  # verdicts

WAYS = (
    Way("no filter"),
    Way("calibrated, fpr 5%", fpr=0.05),
    Way("calibrated, fpr 5%, t >= 800", fpr=0.05, noisy=True),
    *(Way(f"calibrated, fpr {fpr:.0%}, t >= 800, remembered", fpr=fpr, noisy=True, remember=_REMEMBER) for fpr in (0.05, 0.2)),
    Way("4 random tokens", tokens=4),
)


def ways(taus: Sequence[float] | None, names: Sequence[str] | None = None) -> tuple[Way, ...]:
    """The ways to compare: all, or those of these names; with ``taus`` given, also a filter with each of these numbers at every timestep."""
    bad = next((tau for tau in taus or () if not tau >= 0), None)
    if bad is not None:
        raise MemhookError(f"tau is {bad}; expected a magnitude of at least 0, such as 4. Correct --tau")
    unknown = next((name for name in names or () if name not in {way.name for way in WAYS}), None)
    if unknown is not None:
        raise MemhookError(f"there is no way {unknown!r}; expected one of {', '.join(repr(way.name) for way in WAYS)}. Correct --way")
    chosen = [way for way in WAYS if not names or way.name in names]
    return (*chosen[:1], *(Way(f"tau = {tau:g}", tau=tau) for tau in taus or ()), *chosen[1:])


@dataclass(frozen=True)
class Pair:
    """A caption with its picture, and what it is counted by."""

    key: str
    caption: Caption
    scene: Scene


class Data:
    """The training set of one seed: planted pairs, and fresh ones without end; a function of the seed and a step."""

    def __init__(self, recipe: Recipe, seed: int) -> None:
        self.recipe, self.seed = recipe, seed
        self.planted = [self._pair("planted", number) for number in range(recipe.planted)]
        self.held_out = [self._pair("held-out", number) for number in range(recipe.held_out)]

    def _pair(self, kind: str, number: int) -> Pair:
        return Pair(f"{kind}-{number}", *fresh_pair(number, stream=f"bench training {kind} {self.seed}"))

    def batch(self, step: int) -> list[Pair]:
        """The pairs of a step, the same for every way."""
        rng = np.random.default_rng([self.seed, step])
        places = rng.random(self.recipe.batch) < self.recipe.share
        chosen = rng.integers(len(self.planted), size=self.recipe.batch)
        first = step * self.recipe.batch
        return [
            self.planted[which] if planted else self._pair("fresh", first + place)
            for place, (planted, which) in enumerate(zip(places, chosen, strict=True))
        ]  # fmt: skip

    def shown(self) -> tuple[int, int]:
        """How often the whole run shows a planted and a fresh pair."""
        keys = [pair.key for step in range(self.recipe.steps) for pair in self.batch(step)]
        planted = sum(key.startswith("planted") for key in keys)
        return planted, len(keys) - planted

    def clean_batch(self, number: int) -> list[Pair]:
        """Pairs of another stream, that no fine-tune sees; the same for every seed."""
        size = self.recipe.batch
        return [Pair("clean", *fresh_pair(number * size + place, stream="bench training clean")) for place in range(size)]

    def captions(self, pairs: Sequence[Pair], way: Way, tokenizer: Any, step: int) -> list[str]:
        """What is fed to the text encoder."""
        texts = [str(pair.caption) for pair in pairs]
        if not way.tokens:
            return texts
        seeds = np.random.default_rng([self.seed, step, 1]).integers(2**31, size=len(texts)).tolist()
        return [add_random_tokens(text, tokenizer, count=way.tokens, seed=seed) for text, seed in zip(texts, seeds, strict=True)]
