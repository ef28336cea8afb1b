"""What to write instead: the fewest words to leave out, or to exchange, until a prompt no longer looks memorized."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from memhook.detection.asking import Answer, Asker
from memhook.detection.prompt_words import PromptWord, edited, find_all, words_of
from memhook.errors import MemhookError

if TYPE_CHECKING:
    from memhook.capture.prediction import Encode
    from memhook.capture.trace import Trace
    from memhook.detection.asking import Ask, Progress
    from memhook.detection.calibration import Calibration

Changes = tuple[tuple[int, str], ...]
"""Which words are changed, by their numbers in order, and what stands in their places; an empty string where a word is left out."""


@dataclass(frozen=True)
class Edit:
    """A prompt with some words left out or exchanged.

    Attributes:
        prompt: What to write instead.
        changes: The words of the old prompt that are changed, each with what takes its place; empty where it is left out.
        numbers: Which words of the old prompt these are, from 0.
        score: The new prompt's magnitude at the first evaluation, averaged over the samples.
        p_value: What the calibration says of that.
        flagged: Whether it still looks memorized.
        reached: Whether it came as far as was asked.
    """

    prompt: str
    changes: tuple[tuple[str, str], ...]
    numbers: tuple[int, ...]
    score: float
    p_value: float
    flagged: bool
    reached: bool

    @property
    def said(self) -> str:
        """What was changed, in words."""
        out = ", ".join(repr(word) for word, new in self.changes if not new)
        new = ", ".join(f"{word!r} by {new!r}" for word, new in self.changes if new)
        return "; ".join([*([f"leave out {out}"] if out else []), *([f"replace {new}"] if new else [])])

    def __str__(self) -> str:
        return f"{self.said}: score {self.score:.2f}, p = {self.p_value:.2g}{', still flagged' if self.flagged else ''}: {self.prompt}"


@dataclass(frozen=True, eq=False)
class Edits:
    """What `suggest_edits` found. Shown as a table in notebooks and by ``rich.print``, as plain text by ``print``.

    Attributes:
        prompt: The prompt.
        score: Its own score.
        p_value: What the calibration says of that.
        flagged: Whether it looks memorized at all.
        fpr: At which false-positive rate.
        goal: The p-value that was asked for.
        suggestions: Fewest changes first. None of them is flagged: for each number of changes the best edit, and where the goal was
            reached, several.
        nearest: The edit with the lowest score that was seen; None where none was tried.
        kept: The words that were not to be touched.
        samples: Over how many samples a score is averaged.
        asked: How many texts were run.
        bound: How many it could have become.
    """

    prompt: str
    score: float
    p_value: float
    flagged: bool
    fpr: float
    goal: float
    suggestions: tuple[Edit, ...]
    nearest: Edit | None
    kept: tuple[str, ...]
    samples: int
    asked: int
    bound: int

    @property
    def reached(self) -> bool:
        """Whether an edit came as far as was asked."""
        return any(edit.reached for edit in self.suggestions)

    @property
    def best(self) -> Edit | None:
        """The edit to take: of those that reached the goal, else of those that are not flagged, the one with the lowest score."""
        chosen = [edit for edit in self.suggestions if edit.reached] or list(self.suggestions)
        return min(chosen, key=lambda edit: edit.score, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Everything shown, as plain lists and numbers for JSON."""

        def plain(edit: Edit) -> dict[str, Any]:
            return {**vars(edit), "changes": [list(change) for change in edit.changes], "numbers": list(edit.numbers)}

        return {
            **{
                name: getattr(self, name) for name in ("prompt", "score", "p_value", "flagged", "fpr", "goal", "samples", "asked", "bound", "reached")
            },
            "kept": list(self.kept),
            "suggestions": [plain(edit) for edit in self.suggestions],
            "nearest": None if self.nearest is None else plain(self.nearest),
        }

    def __str__(self) -> str:
        from memhook.mitigation.edit_views import to_text

        return to_text(self)

    def __repr__(self) -> str:
        return f"<Edits: {len(self.suggestions)} suggestions, {'reached' if self.reached else 'not reached'}, {self.asked} texts asked>"

    def _repr_html_(self) -> str:
        from memhook.mitigation.edit_views import to_html

        return to_html(self)

    def __rich__(self) -> Any:
        from memhook.mitigation.edit_views import to_rich

        return to_rich(self)


def suggest_edits(
    target: Trace | Ask,
    prompt: str,
    calibration: Calibration,
    *,
    keep: Iterable[str] = (),
    exchange: Iterable[str] | Mapping[str, Iterable[str]] = (),
    fpr: float = 0.01,
    p_value: float | None = 0.25,
    max_words: int = 4,
    beam: int = 3,
    count: int = 3,
    encode: Encode | None = None,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> Edits:
    """Find the fewest words to leave out of a prompt, or to exchange, until it no longer looks memorized.

    Nothing is optimized and no gradient taken: texts are asked on the same noise, one first evaluation each, sets of one word first.
    From each size the ``beam`` best sets are carried on by one more word; of size two all neighbors are tried as well, since a phrase
    whose words each recall the picture alone shows in neither of them. With ``o`` ways to change each of ``n`` words (1, and one more
    for each word to exchange it for), at most ``1 + o n + (n - 1) + beam (o (n - 1) + o (n - 2) + ...)`` texts are asked, the sum over
    sizes up to ``max_words``: 81 for 9 words with the defaults. The search ends at the size that reaches the goal.

    Args:
        target: As in `memhook.leave_one_out`: the prompt's trace that kept its calls, or a function that asks the host.
        prompt: The prompt.
        calibration: What is flagged, and how ordinary a score is.
        keep: Words or phrases that stay as they are, such as ``("penguin", "purple")``. Without them, the lowest score is that of a
            prompt that says nothing.
        exchange: Words that may take another's place; for some words only where it is a mapping from words of the prompt.
        fpr: The false-positive rate at which the prompt is flagged.
        p_value: How ordinary the prompt is to become: the search goes on until an edit's p-value is at least this, since one that has
            only just come below the threshold is often copied still. None: until it is not flagged.
        max_words: How many words may be changed.
        beam: How many sets of each size are carried on; 1 or more.
        count: How many suggestions that reach the goal are given.
        encode: As in `memhook.leave_one_out`.
        batch_size: Samples that are run at once.
        progress: ``progress(asked, most)``, called after each batch.

    Returns:
        The suggestions, each with its score and p-value. Their p-values are those of chosen edits, the lowest of many: judge a new prompt
        by a run of its own. A goal that no edit reaches is no error: `Edits.reached` is False, and `Edits.nearest` says what came nearest.

    Raises:
        MemhookError: The prompt is empty, has nothing that may be changed, or does not hold a word of ``keep``.
        CalibrationError: The calibration has too few prompts for the rate.
        CalibrationMismatchError: The run's setting is not the calibration's.
        ReplayError: As in `memhook.leave_one_out`.

    >>> import memhook
    >>> ask = lambda texts: [3.0 if "snow" in text and "fox" in text else 0.5 for text in texts]
    >>> calibration = memhook.calibrate([number / 100 for number in range(100)])
    >>> print(suggest_edits(ask, "red fox, snow", calibration, keep=["fox"]).best)
    leave out 'snow': score 0.50, p = 0.5: red fox
    """
    goal = _check(fpr, p_value, max_words=max_words, beam=beam, count=count)
    calibration.threshold(fpr)  # too few prompts: say so before anything runs
    words = words_of(prompt) if isinstance(prompt, str) else ()
    named = list(find_all(words, keep, what="keep", prompt=prompt))
    kept = {number for _, numbers in named for number in numbers}
    ways = _ways(prompt, words, kept, exchange)
    asker = Asker(target, prompt, encode=encode, calibration=calibration, batch_size=batch_size, progress=progress)
    if not ways:
        raise MemhookError(_nothing(prompt, words))
    bound = _bound(ways, max_words, beam)
    asker.most = bound
    unchanged = _judged(asker.unchanged, fpr, goal)
    search = _Search(asker, prompt, words, ways, fpr=fpr, goal=goal)
    if unchanged[0]:
        search.run(max_words=max_words, beam=beam)
    score, own = asker.unchanged.score, asker.unchanged.p_value
    return Edits(
        prompt, score, own if own is not None else 1.0, unchanged[0], fpr, goal, search.suggestions(count), search.nearest(),
        tuple(phrase for phrase, _ in named), asker.samples, asker.asked, bound,
    )  # fmt: skip


class _Search:
    """Sets of changes, size after size."""

    def __init__(
        self, asker: Asker, prompt: str, words: tuple[PromptWord, ...], ways: Mapping[int, tuple[str, ...]], *, fpr: float, goal: float
    ) -> None:
        self._asker, self._prompt, self._words, self._ways = asker, prompt, words, ways
        self._fpr, self._goal = fpr, goal
        self.sizes: list[list[Edit]] = []  # best first

    def run(self, *, max_words: int, beam: int) -> None:
        """Go on until a size reaches the goal."""
        front: list[Changes] = [()]
        for size in range(1, max_words + 1):
            wanted = [self._with(changes, number, new) for changes in front for number, news in self._ways.items() for new in news]
            if size == 2:
                wanted += [((number, ""), (number + 1, "")) for number in self._ways if number + 1 in self._ways]
            found = self._ask([changes for changes in dict.fromkeys(wanted) if len(changes) == size])
            if not found:
                return
            self.sizes.append([edit for _, edit in found])
            front = [changes for changes, _ in found[:beam]]
            if any(edit.reached for _, edit in found):
                return

    def suggestions(self, count: int) -> tuple[Edit, ...]:
        """Of each size the best edit that is not flagged, and ``count`` that reached the goal."""
        chosen: list[Edit] = []
        for edits in self.sizes:
            reached = [edit for edit in edits if edit.reached][:count]
            chosen += reached or [edit for edit in edits if not edit.flagged][:1]
        return tuple(chosen)

    def nearest(self) -> Edit | None:
        """The lowest score of all."""
        return min((edits[0] for edits in self.sizes), key=lambda edit: edit.score, default=None)

    @staticmethod
    def _with(changes: Changes, number: int, new: str) -> Changes:
        return tuple(sorted((*changes, (number, new)))) if number not in dict(changes) else ()

    def _ask(self, sets: list[Changes]) -> list[tuple[Changes, Edit]]:
        """An edit for each set that leaves something of the prompt, the lowest score first."""
        texts = {changes: edited(self._prompt, self._words, dict(changes)) for changes in sets}
        texts = {changes: text for changes, text in texts.items() if words_of(text)}
        answers = self._asker(list(texts.values()))
        found = [(changes, self._edit(changes, answer)) for changes, answer in zip(texts, answers, strict=True)]
        return sorted(found, key=lambda pair: (pair[1].score, pair[0]))

    def _edit(self, changes: Changes, answer: Answer) -> Edit:
        flagged, reached = _judged(answer, self._fpr, self._goal)
        said = tuple((self._words[number].text, new) for number, new in changes)
        p_value = answer.p_value if answer.p_value is not None else 1.0
        return Edit(answer.text, said, tuple(number for number, _ in changes), answer.score, p_value, flagged, reached)


def _judged(answer: Answer, fpr: float, goal: float) -> tuple[bool, bool]:
    """Whether an answer is flagged, and whether it reached the goal."""
    p_value = answer.p_value if answer.p_value is not None else 1.0
    flagged = p_value <= fpr
    return flagged, not flagged and p_value >= goal


def _check(fpr: float, p_value: float | None, **counts: int) -> float:
    for name, value in counts.items():
        if value < 1:
            raise MemhookError(f"{name} is {value}; expected 1 or more")
    if p_value is not None and not fpr < p_value <= 1:
        raise MemhookError(f"p_value is {p_value}; expected a number above the false-positive rate {fpr:g}, at most 1, or None")
    return fpr if p_value is None else p_value


def _ways(
    prompt: str, words: tuple[PromptWord, ...], kept: set[int], exchange: Iterable[str] | Mapping[str, Iterable[str]]
) -> dict[int, tuple[str, ...]]:
    """For each word that may be changed what may stand in its place: nothing, or a word of the list."""
    lists: dict[int, list[str]] = {number: [] for number in range(len(words))}
    if isinstance(exchange, str):
        raise MemhookError(f"exchange is the one string {exchange!r}; expected a list of words, or a mapping from words of the prompt to lists")
    if isinstance(exchange, Mapping):
        for phrase, numbers in find_all(words, exchange, what="exchange", prompt=prompt):
            for number in numbers:
                lists[number] += _listed(exchange[phrase])
    else:
        everywhere = _listed(exchange)
        lists = {number: [*everywhere] for number in lists}
    others = {
        number: tuple(dict.fromkeys(new for new in lists[number] if words_of(new)[0].key != word.key or len(words_of(new)) > 1))
        for number, word in enumerate(words)
        if number not in kept
    }
    # The only word of a prompt cannot be left out: nothing would be left.
    return {number: ("", *new) if len(words) > 1 else new for number, new in others.items() if len(words) > 1 or new}


def _listed(given: Iterable[str]) -> list[str]:
    found = [given] if isinstance(given, str) else list(given)
    wrong = next((word for word in found if not isinstance(word, str) or not words_of(word)), None)
    if wrong is not None:
        raise MemhookError(f"exchange has {wrong!r}; expected words to put in another's place")
    return found


def _nothing(prompt: str, words: tuple[PromptWord, ...]) -> str:
    if len(words) > 1:
        return f"every word of the prompt {prompt!r} is to be kept, so nothing can be changed; keep fewer"
    seen = f"one word, {words[0].text!r}" if words else "no word"
    return f"the prompt {prompt!r} has {seen}, so nothing can be left out of it; give words to exchange it for, or another prompt"


def _bound(ways: Mapping[int, tuple[str, ...]], max_words: int, beam: int) -> int:
    """The most texts that a search can ask."""
    choices = sorted(len(new) for new in ways.values())
    neighbors = sum(number + 1 in ways for number in ways) if max_words > 1 else 0
    # A set of so many words can be carried on by the choices of the others: the most where it has those with the fewest.
    return 1 + sum(choices) + neighbors + sum(beam * sum(choices[size - 1 :]) for size in range(2, max_words + 1))
