"""Which words of a prompt make it memorized, without gradients: what the prompt scores without each of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import TYPE_CHECKING, Any, Literal, get_args

from memhook.detection.asking import Answer, Asker
from memhook.detection.prompt_words import PromptWord, edited, find_all, words_of
from memhook.errors import MemhookError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from memhook.capture.prediction import Encode
    from memhook.capture.trace import Trace
    from memhook.detection.asking import Ask, Progress
    from memhook.detection.calibration import Calibration

Pairs = Literal["none", "adjacent", "all"]


@dataclass(frozen=True)
class WithoutWords:
    """What a prompt scores without some of its words.

    Attributes:
        text: The words.
        numbers: Which words of the prompt they are, from 0.
        prompt: The prompt without them.
        score: Its magnitude at the first evaluation, averaged over the samples.
        drop: How much lower that is than the unchanged prompt's; negative where it is higher.
        p_value: What the calibration says of the score; None without one.
        excess: Of a pair: how much more the score drops without both than without each, added up. A phrase whose words each recall
            the picture alone has a large one. None for single words and for phrases.
    """

    text: str
    numbers: tuple[int, ...]
    prompt: str
    score: float
    drop: float
    p_value: float | None
    excess: float | None = None

    def __str__(self) -> str:
        said = "" if self.p_value is None else f" (p = {self.p_value:.2g})"
        return f"without {self.text!r} the score is {self.score:.2f}{said}"


@dataclass(frozen=True, eq=False)
class LeaveOneOut:
    """What a prompt scores without each of its words. Shown as a table in notebooks and by ``rich.print``, as plain text by ``print``.

    Attributes:
        prompt: The prompt.
        score: Its own score.
        p_value: What the calibration says of that; None without one.
        words: A row a word, in order.
        phrases: A row for each phrase that was asked for, at all of its places at once.
        pairs: A row for each pair of words that was asked for.
        samples: Over how many samples a score is averaged.
        asked: How many texts were run, the prompt itself included.
    """

    prompt: str
    score: float
    p_value: float | None
    words: tuple[WithoutWords, ...]
    phrases: tuple[WithoutWords, ...]
    pairs: tuple[WithoutWords, ...]
    samples: int
    asked: int

    @property
    def rows(self) -> tuple[WithoutWords, ...]:
        """Words, phrases and pairs."""
        return self.words + self.phrases + self.pairs

    def top(self, k: int) -> tuple[WithoutWords, ...]:
        """The ``k`` words without which the score is lowest, lowest first; all of them if there are fewer."""
        if k < 1:
            raise MemhookError(f"k is {k}; expected 1 or more")
        return tuple(sorted(self.words, key=lambda row: row.score)[:k])

    def to_dict(self) -> dict[str, Any]:
        """Everything shown, as plain lists and numbers for JSON."""

        def plain(row: WithoutWords) -> dict[str, Any]:
            return {**vars(row), "numbers": list(row.numbers)}

        return {
            "prompt": self.prompt,
            "score": self.score,
            "p_value": self.p_value,
            "samples": self.samples,
            "asked": self.asked,
            **{name: [plain(row) for row in getattr(self, name)] for name in ("words", "phrases", "pairs")},
        }

    def plot(self, *, ax: Axes | None = None) -> Axes:
        """A bar for each word: what the prompt scores without it (needs the extra ``plot``)."""
        from memhook.attribution.left_out_views import plot

        return plot(self, ax)

    def __str__(self) -> str:
        from memhook.attribution.left_out_views import to_text

        return to_text(self)

    def __repr__(self) -> str:
        return f"<LeaveOneOut: {len(self.words)} words, {len(self.phrases)} phrases, {len(self.pairs)} pairs, {self.samples} samples>"

    def _repr_html_(self) -> str:
        from memhook.attribution.left_out_views import to_html

        return to_html(self)

    def __rich__(self) -> Any:
        from memhook.attribution.left_out_views import to_rich

        return to_rich(self)


def leave_one_out(
    target: Trace | Ask,
    prompt: str,
    *,
    encode: Encode | None = None,
    calibration: Calibration | None = None,
    phrases: Iterable[str] = (),
    pairs: Pairs = "none",
    batch_size: int = 32,
    progress: Progress | None = None,
) -> LeaveOneOut:
    """Score a prompt without each of its words, on the same noise: what a word is worth, without a gradient.

    A prompt of ``n`` words takes ``n + 1`` first evaluations, many at a time; a phrase or a pair one more each. Nothing is
    differentiated, so it works under quantization, in compiled models and for hosts that can only be asked.

    Args:
        target: The prompt's trace that kept its calls (``memhook.probe(pipeline, lambda: pipeline(prompt, ...))``): its first guided
            evaluation is run again with the embeddings of the other texts, conditional rows alone. Or a function ``ask(texts)`` that
            asks the host and answers its trace (samples text by text) or scores, ``(n,)`` or ``(n, images)``, always on the same
            noise; such as ``memhook_diffusers.asking.asking(pipeline)``.
        prompt: The prompt.
        encode: ``encode(texts)``: the embeddings ``(n, l, d)``, or these and what else the denoiser is given of a text. The adapter's
            own where None. What it makes of the prompt is compared with what the trace was made with.
        calibration: Every row then carries its p-value. For a score over the evaluations that are asked, here the first.
        phrases: Of the prompt, to be left out as one, at all of their places.
        pairs: Two words at once: ``"adjacent"`` for neighbors (``n - 1`` more), ``"all"`` (``n (n - 1) / 2`` more).
        batch_size: Samples that are run at once.
        progress: ``progress(asked, most)``, called after each batch.

    Returns:
        Rows with the score without each word, phrase and pair. What leaves nothing of the prompt has no row.

    Raises:
        MemhookError: The prompt is empty or has one word, it does not hold a phrase, or an answer is not finite.
        CalibrationMismatchError: The run's setting is not the calibration's.
        ReplayError: The captured call cannot be run with other texts; says why, and what to do instead.

    >>> scores = {"red fox": 2.0, "red": 0.5, "fox": 1.5}
    >>> found = leave_one_out(lambda texts: [scores[text] for text in texts], "red fox")
    >>> [(row.text, row.score) for row in found.top(2)]
    [('fox', 0.5), ('red', 1.5)]
    """
    if pairs not in get_args(Pairs):
        raise MemhookError(f"pairs is {pairs!r}; expected one of {', '.join(get_args(Pairs))}")
    words = words_of(prompt) if isinstance(prompt, str) else ()
    named = list(find_all(words, phrases, what="phrases", prompt=prompt))
    chosen = {"none": [], "adjacent": list(pairwise(range(len(words)))), "all": list(combinations(range(len(words)), 2))}[pairs]
    if isinstance(prompt, str) and prompt.strip():
        _enough(prompt, words)
    asker = Asker(target, prompt, encode=encode, calibration=calibration, batch_size=batch_size, progress=progress)

    def without(numbers: tuple[int, ...]) -> str:
        return edited(prompt, words, dict.fromkeys(numbers, ""))

    groups = [*((word.text, (number,)) for number, word in enumerate(words)), *named]
    groups += [(f"{words[first].text} + {words[second].text}", (first, second)) for first, second in chosen]
    texts = [without(numbers) for _, numbers in groups]
    asker.most = 1 + len({text for text in texts if words_of(text)})
    answers = dict(zip((known := [text for text in texts if words_of(text)]), asker(known), strict=True))

    def row(name: str, numbers: tuple[int, ...], text: str) -> WithoutWords | None:
        answer: Answer | None = answers.get(text)
        if answer is None:
            return None  # nothing would be left: the unconditional prompt, whose score is 0
        return WithoutWords(name, numbers, answer.text, answer.score, asker.unchanged.score - answer.score, answer.p_value)

    made = [row(name, numbers, text) for (name, numbers), text in zip(groups, texts, strict=True)]
    singles = [found for found in made[: len(words)] if found is not None]
    alone = {found.numbers[0]: found.drop for found in singles}
    both = [
        WithoutWords(**{**vars(found), "excess": found.drop - alone[found.numbers[0]] - alone[found.numbers[1]]})
        for found in made[len(words) + len(named) :]
        if found is not None
    ]
    several = tuple(found for found in made[len(words) : len(words) + len(named)] if found is not None)
    return LeaveOneOut(prompt, asker.unchanged.score, asker.unchanged.p_value, tuple(singles), several, tuple(both), asker.samples, asker.asked)


def _enough(prompt: str, words: tuple[PromptWord, ...]) -> None:
    if len(words) >= 2:
        return
    seen = f"one word, {words[0].text!r}" if words else "no word"
    raise MemhookError(
        f"the prompt {prompt!r} has {seen}; without it nothing is left but the unconditional prompt, whose score is 0. Expected two words or more"
    )
