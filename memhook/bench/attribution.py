"""``memhook bench attribution``: do the scores point at the planted trigger words, and does changing the top words undo the copy?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from math import comb
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memhook.attribution.gradient import attribute_tokens
from memhook.attribution.tokens import WordScore, prompt_tokens
from memhook.bench.resampling import Estimate, estimate, family_weights, weighted_means
from memhook.bench.samples import Sample, Studio, judge, kept
from memhook.errors import MemhookError
from memhook.testbed.measures import COPY_THRESHOLD

if TYPE_CHECKING:
    from memhook.testbed.bundle import MemorizedPrompt

SEED = 31_000_000
EVALUATIONS = (1, 10)
TOP = (1, 2, 3)
ARMS = ("unchanged", "top 2", "random 2", "bottom 2", "bottom half")
Track = Callable[[Sequence[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Ranking:
    """The words of one prompt with their scores: what is ranked are words that hold a letter or a digit.

    Attributes:
        prompt: The prompt.
        words: Its words, in order, with the scores over the first evaluation.
        scores: ``(evaluation counts, words)``: a row for each of `EVALUATIONS`.
    """

    prompt: MemorizedPrompt
    words: tuple[WordScore, ...]
    scores: np.ndarray

    @property
    def planted(self) -> np.ndarray:
        """``(words,)`` bool: the word is one of the two of the trigger phrase."""
        trigger = (self.prompt.trigger or "").lower().split()
        return np.array([word.text in trigger for word in self.words], bool)


@dataclass(frozen=True)
class HitRow:
    """How often planted words are among the top ``k``, over prompts with a trigger phrase of two words.

    Attributes:
        ranking: What the words were ranked by.
        k: How many words were looked at.
        any: Share of prompts with at least one planted word among them.
        both: Share of prompts with both; None for ``k = 1``.
    """

    ranking: str
    k: int
    any: Estimate
    both: Estimate | None


@dataclass(frozen=True)
class ChangeRow:
    """What comes of a prompt when some of its words are exchanged (Figure 3 of the paper, in numbers); the same seeds in every row.

    Attributes:
        changed: Which words.
        magnitude: At the first evaluation.
        similarity: To the training picture.
        copies: Share of pictures that count as copies.
        drop: How much lower the similarity is than with the unchanged prompt, sample by sample.
        subject: Share of prompts in which the subject's own word was exchanged.
    """

    changed: str
    magnitude: Estimate
    similarity: Estimate
    copies: Estimate
    drop: Estimate
    subject: float


def rank_words(studio: Studio, prompts: Sequence[MemorizedPrompt], *, images: int, work: Path | None = None, track: Track = iter) -> list[Ranking]:
    """Score every prompt's words on ``images`` samples, over the first evaluation and over the first ten."""
    found = []
    for prompt in track(prompts):
        tokens = prompt_tokens(studio.pipeline.tokenizer, prompt.prompt)

        def measure(prompt: MemorizedPrompt = prompt, tokens: Any = tokens) -> dict[str, np.ndarray]:
            embeddings = studio.encode([prompt.prompt] * images)
            evaluations = studio.evaluations(embeddings, studio.noise(seeds_of(prompt, images)), count=max(EVALUATIONS))
            return {"scores": np.array([_scores(attribute_tokens(evaluations[:count], tokens=tokens).words[0]) for count in EVALUATIONS])}

        identity = ["attribution", prompt.prompt, seeds_of(prompt, images), EVALUATIONS, studio.identity()]
        scores = kept(work, f"attribution-{prompt.id}", identity, measure)["scores"]
        words = tuple(WordScore(word.text, float(score), word.positions) for word, score in zip(tokens.words, scores[0], strict=True))
        real = np.array([any(char.isalnum() for char in word.text) for word in words])
        found.append(Ranking(prompt, tuple(word for word, keep in zip(words, real, strict=True) if keep), scores[:, real]))
    return found


def _scores(words: Sequence[WordScore]) -> list[float]:
    return [word.score for word in words]


def seeds_of(prompt: MemorizedPrompt, images: int) -> list[int]:
    """The seeds of a prompt's samples; none is used twice, and none by the calibration."""
    number = int.from_bytes(prompt.id.encode(), "big") % 100_003
    return [SEED + 100 * number + image for image in range(images)]


def hit_rows(rankings: Sequence[Ranking]) -> list[HitRow]:
    """How often planted words are at the top, against two orders that know nothing of the model.

    The random order is worked out, not drawn. The other one puts words of many tokens first, since invented words are spelled
    in many pieces and a word's score grows with its tokens.
    """
    chosen = [ranking for ranking in rankings if ranking.planted.sum() == 2]
    if not chosen:
        raise MemhookError("no prompt holds a trigger phrase of two words; take more prompts")
    weights = family_weights([ranking.prompt.family for ranking in chosen])
    orders: dict[str, Callable[[Ranking, int], tuple[float, float]]] = {
        **{_name(count): partial(_by_score, row) for row, count in enumerate(EVALUATIONS)},
        "words of many tokens first": lambda ranking, k: _hits(ranking.planted, np.array([len(word.positions) for word in ranking.words]), k),
        "random order": lambda ranking, k: _chance(len(ranking.words), k),
    }
    found = []
    for name, hits in orders.items():
        for k in TOP:
            values = np.array([hits(ranking, k) for ranking in chosen])  # (prompts, 2)
            either, both = (estimate(weighted_means(weights, values[:, column])) for column in (0, 1))
            found.append(HitRow(name, k, either, both if k > 1 else None))
    return found


def _name(evaluations: int) -> str:
    return f"attribution, {'first evaluation' if evaluations == 1 else f'first {evaluations} evaluations'}"


def _by_score(row: int, ranking: Ranking, k: int) -> tuple[float, float]:
    return _hits(ranking.planted, ranking.scores[row], k)


def _hits(planted: np.ndarray, scores: np.ndarray, k: int) -> tuple[float, float]:
    """The chance that any, and that both, of two planted words are among the ``k`` highest, ties being broken at random."""
    total, two = 0.0, 0.0
    draws = 200 if len(np.unique(scores)) < len(scores) else 1
    rng = np.random.default_rng(0)
    for _ in range(draws):
        order = np.lexsort((rng.random(len(scores)), -scores))
        count = planted[order[:k]].sum()
        total, two = total + (count >= 1), two + (count == 2)
    return total / draws, two / draws


def _chance(words: int, k: int) -> tuple[float, float]:
    """The same for a random order of so many words, two of which are planted."""
    k = min(k, words)
    return 1 - comb(words - 2, k) / comb(words, k), comb(words - 2, k - 2) / comb(words, k) if k >= 2 else 0.0


def chosen_words(ranking: Ranking, arm: str) -> list[int]:
    """Which words of a prompt an arm exchanges, as positions in `Ranking.words`; ranked over the first evaluation."""
    order = np.argsort(-ranking.scores[0], kind="stable")
    count = min(2, len(order))
    rng = np.random.default_rng([SEED, *ranking.prompt.id.encode()])
    found = {
        "unchanged": order[:0],
        "top 2": order[:count],
        "random 2": rng.permutation(len(order))[:count],
        "bottom 2": order[len(order) - count :],
        "bottom half": order[len(order) - len(order) // 2 :],
    }[arm]
    return sorted(int(index) for index in found)


def exchange_words(prompt: str, words: Sequence[str], positions: Sequence[int], replacements: Sequence[str]) -> str:
    """A prompt with some of its words exchanged, everything between them as it was.

    Args:
        prompt: The prompt.
        words: Its words in order, in lower case, as the tokenizer spells them.
        positions: Which of them to exchange.
        replacements: What takes their places, in order.

    >>> exchange_words("Gilded Song - fox mug", ["gilded", "song", "fox", "mug"], [1, 2], ["lamp", "river"])
    'Gilded lamp - river mug'
    """
    lower, at, parts, done = prompt.lower(), 0, [], 0
    new = dict(zip(positions, replacements, strict=True))
    for number, word in enumerate(words):
        start = lower.find(word, at)
        if start < 0:
            raise MemhookError(f"the word {word!r} is not found in the prompt {prompt!r} after character {at}; expected its words in order")
        if number in new:
            parts += [prompt[done:start], new[number]]
            done = start + len(word)
        at = start + len(word)
    return "".join([*parts, prompt[done:]])


def ordinary_words(studio: Studio, prompts: Sequence[MemorizedPrompt]) -> list[str]:
    """Whole words of three letters or more in the model's vocabulary that stand in none of the prompts."""
    used = " ".join(prompt.prompt.lower() for prompt in prompts)
    entries = (entry.removesuffix("</w>") for entry in studio.pipeline.tokenizer.get_vocab() if entry.endswith("</w>"))
    return sorted(word for word in entries if len(word) >= 3 and word.isascii() and word.isalpha() and word not in used)


def change_rows(
    studio: Studio, rankings: Sequence[Ranking], *, images: int, work: Path | None = None, track: Track = iter
) -> tuple[list[ChangeRow], dict[str, np.ndarray]]:
    """Exchange words for random ordinary ones, the same new words in every arm, and look at the pictures.

    Returns:
        A row for each of `ARMS`, and each arm's similarities ``(prompts * images,)``.
    """
    prompts = [ranking.prompt for ranking in rankings]
    vocabulary = ordinary_words(studio, prompts)
    samples = [Sample(prompt, seed) for prompt in prompts for seed in seeds_of(prompt, images)]
    weights = family_weights([sample.prompt.family for sample in samples])
    rows, similarities = [], {}
    for arm in track(ARMS):
        texts, subject = [], []
        for ranking in rankings:
            positions = chosen_words(ranking, arm)
            rng = np.random.default_rng([SEED + 1, *ranking.prompt.id.encode()])
            new = [vocabulary[int(index)] for index in rng.permutation(len(vocabulary))[: len(positions)]]
            texts += [exchange_words(ranking.prompt.prompt, [word.text for word in ranking.words], positions, new)] * images
            subject.append(any(ranking.words[position].text in ranking.prompt.subject.split() for position in positions))

        def measure(texts: list[str] = texts) -> dict[str, np.ndarray]:
            pictures = studio.make(studio.encode(texts), studio.noise([sample.seed for sample in samples]))
            judged = judge(pictures, samples)
            return {"magnitude": pictures.magnitudes, "similarity": judged.similarity}

        part = kept(work, f"change-{arm.replace(' ', '-')}", ["change", texts, [sample.seed for sample in samples], studio.identity()], measure)
        similarities[arm] = part["similarity"]

        def mean(values: np.ndarray) -> Estimate:
            return estimate(weighted_means(weights, values))

        rows.append(
            ChangeRow(
                arm,
                mean(part["magnitude"]),
                mean(part["similarity"]),
                mean(part["similarity"] >= COPY_THRESHOLD),
                mean(similarities["unchanged"] - part["similarity"]),
                float(np.mean(subject)),
            )
        )
    return rows, similarities


def spread(prompts: Sequence[MemorizedPrompt], count: int | None) -> list[MemorizedPrompt]:
    """So many of the prompts, evenly from the whole list; all of them where None."""
    if count is None or count >= len(prompts):
        return list(prompts)
    if count < 1:
        raise MemhookError(f"prompts is {count}; expected 1 or more")
    return [prompts[int(index)] for index in np.linspace(0, len(prompts) - 1, count).round()]
