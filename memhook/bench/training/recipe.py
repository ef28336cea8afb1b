"""The recipe of the fine-tune: its sizes, its data, and the ways that are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from memhook.baselines.token_addition import add_random_tokens
from memhook.errors import MemhookError
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
        learning_rate: Of AdamW, after 20 steps of warm-up; only the denoiser is trained.
        pictures: Made for each planted caption when the run is judged.
        held_out: Fresh captions that are never trained on, one picture each.
        sampling_steps: Of the sampler that makes these.
        observed: Batches of clean pairs that thresholds are read off.
        bins: Of timesteps, for the calibrated threshold.
    """

    steps: int = 90
    batch: int = 16
    planted: int = 4
    share: float = 0.5
    learning_rate: float = 5e-4
    pictures: int = 4
    held_out: int = 16
    sampling_steps: int = 15
    observed: int = 48
    bins: int = 10

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "planted", "pictures", "held_out", "sampling_steps", "observed", "bins"):
            if getattr(self, name) < 1:
                raise MemhookError(f"{name} is {getattr(self, name)}; expected at least 1")
        if not 0 < self.share < 1:
            raise MemhookError(f"share is {self.share}; expected a share between 0 and 1, such as 0.5")


@dataclass(frozen=True)
class Way:
    """One way to train.

    Attributes:
        name: As shown.
        quantile: Filter with one number for all timesteps: this quantile of the clean magnitudes.
        tau: Filter with this number.
        fpr: Filter with the calibrated threshold of this rate.
        fraction: The share of losses with an unconditional pass.
        tokens: Add so many random tokens to every caption (RTA, Somepalli et al. 2023), each time anew.
    """

    name: str
    quantile: float | None = None
    tau: float | None = None
    fpr: float | None = None
    fraction: float = 1.0
    tokens: int = 0

    @property
    def filters(self) -> bool:
        """Whether there is a filter."""
        return any(value is not None for value in (self.quantile, self.tau, self.fpr))


WAYS = (
    Way("no filter"),
    *(Way(f"tau at the {quantile:.0%} quantile", quantile=quantile) for quantile in (0.5, 0.8, 0.95)),
    *(Way(f"calibrated, fpr {fpr:.0%}", fpr=fpr) for fpr in (0.05, 0.2)),
    Way("calibrated, fpr 20%, every other step", fpr=0.2, fraction=0.5),
    Way("4 random tokens", tokens=4),
)


def ways(taus: Sequence[float] | None) -> tuple[Way, ...]:
    """The ways to compare; with ``taus`` given, these stand in the place of the quantiles."""
    if not taus:
        return WAYS
    bad = next((tau for tau in taus if not tau >= 0), None)
    if bad is not None:
        raise MemhookError(f"tau is {bad}; expected a magnitude of at least 0")
    numbers = tuple(Way(f"tau = {tau:g}", tau=tau) for tau in taus)
    return (WAYS[0], *numbers, *(way for way in WAYS[1:] if way.quantile is None))


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
