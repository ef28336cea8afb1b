"""A prompt's words where they stand in its text, and the prompt without some of them or with others in their place."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from memhook.errors import MemhookError

_INSIDE = "'\N{RIGHT SINGLE QUOTATION MARK}-_.&@\N{ZERO WIDTH JOINER}\N{MIDDLE DOT}"  # joins two parts of one word, at an end it is no part of it
_OPEN, _CLOSE = r"[(\[{<\"'“‘«]", r"[)\]}>\"'”’»]"
_WEIGHT = re.compile(r":\s*\d+(?:\.\d+)?\s*(?=\))")  # of a part of the prompt, as ComfyUI and others write it: no word
_BETWEEN = r"[,;|/:·–—-]"  # stands between two parts of a prompt: with one of them gone it has nothing to divide


@dataclass(frozen=True)
class PromptWord:
    """A word as it is written in a prompt: ``prompt[start:end] == text``."""

    text: str
    start: int
    end: int

    @property
    def key(self) -> str:
        """What two spellings of one word share."""
        return unicodedata.normalize("NFKC", self.text).casefold()


def words_of(prompt: str) -> tuple[PromptWord, ...]:
    """The words of a prompt in order: what holds a letter, a digit or a symbol such as an emoji; each Chinese character is one.

    >>> [word.text for word in words_of("Rising Dream (fox, 1.5 m), in o'Neill's sea-side")]
    ['Rising', 'Dream', 'fox', '1.5', 'm', 'in', "o'Neill's", 'sea-side']
    """
    found: list[PromptWord] = []
    start: int | None = None
    weights = {place for weight in _WEIGHT.finditer(prompt) for place in range(*weight.span())}
    for place, char in enumerate(prompt):
        if place in weights:
            _close(found, prompt, start, place)
            start = None
        elif _is_han(char):
            _close(found, prompt, start, place)
            found.append(PromptWord(char, place, place + 1))
            start = None
        elif _is_part(prompt, place, open_word=start is not None):
            start = place if start is None else start
        else:
            _close(found, prompt, start, place)
            start = None
    _close(found, prompt, start, len(prompt))
    return tuple(found)


def _close(found: list[PromptWord], prompt: str, start: int | None, end: int) -> None:
    if start is not None:
        found.append(PromptWord(prompt[start:end], start, end))


def _is_part(prompt: str, place: int, *, open_word: bool) -> bool:
    char = prompt[place]
    kind = unicodedata.category(char)
    if kind[0] in "LN" or kind in ("So", "Sc"):
        return True
    if kind[0] == "M" or kind in ("Sk", "Cf"):  # accents, skin tones, joiners: part of what they follow
        return open_word
    after = prompt[place + 1] if place + 1 < len(prompt) else " "
    return open_word and char in _INSIDE and (unicodedata.category(after)[0] in "LN" or unicodedata.category(after) == "So") and not _is_han(after)


def _is_han(char: str) -> bool:
    return "㐀" <= char <= "鿿" or "豈" <= char <= "﫿" or "\U00020000" <= char <= "\U0003ffff"


def places_of(words: Sequence[PromptWord], phrase: str) -> tuple[tuple[int, ...], ...]:
    """Where a word or phrase stands: for each of its places the numbers of its words, whatever their capitals and what is between them.

    >>> places_of(words_of("Snow fox, snow Fox"), "snow fox")
    ((0, 1), (2, 3))
    """
    wanted = [word.key for word in words_of(phrase)]
    keys = [word.key for word in words]
    size = len(wanted)
    return tuple(tuple(range(at, at + size)) for at in range(len(keys) - size + 1) if size and keys[at : at + size] == wanted)


def find_all(words: Sequence[PromptWord], phrases: Iterable[str], *, what: str, prompt: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Each phrase with the numbers of all words at all of its places.

    Raises:
        MemhookError: The prompt does not hold one of them; says so with the prompt's words.
    """
    if isinstance(phrases, str):
        raise MemhookError(f"{what} is the one string {phrases!r}; expected a list of words or phrases, such as ({phrases!r},)")
    for phrase in phrases:
        places = places_of(words, phrase)
        if not places:
            raise MemhookError(
                f"{what} has {phrase!r}, which the prompt {prompt!r} does not hold; expected some of its words: "
                f"{', '.join(word.text for word in words)}"
            )
        yield phrase, tuple(sorted({number for place in places for number in place}))


def edited(prompt: str, words: Sequence[PromptWord], changes: Mapping[int, str]) -> str:
    """The prompt with other words in the places of some of its words; an empty one leaves a word out.

    Where a word is left out, so are a space, a comma or dash that it leaves with nothing to divide, and brackets around nothing.
    Everything else stays to the letter.

    >>> prompt = "Rising Dream (fox mug), blue"
    >>> edited(prompt, words_of(prompt), {0: "", 2: "cat", 4: ""})
    'Dream (cat mug)'
    """
    gap = next(char for char in map(chr, range(0xE000, 0xF8FF)) if char not in prompt and not any(char in new for new in changes.values()))
    parts, done = [], 0
    for number in sorted(changes):
        word = words[number]
        parts += [prompt[done : word.start], changes[number] or gap]
        done = word.end
    text = "".join([*parts, prompt[done:]])
    if gap not in text:
        return text
    before = ""
    while before != text:
        before = text
        text = re.sub(rf"{gap}[\s]*{gap}", gap, text)
        text = re.sub(rf"{_OPEN}\s*{gap}\s*(?:{_WEIGHT.pattern})?{_CLOSE}", gap, text)
        text = re.sub(rf"{_BETWEEN}\s*{gap}(?=\s*(?:{_BETWEEN}|{_CLOSE}|[.!?]+\s*$))", gap, text)
        text = re.sub(rf"^\s*{gap}\s*(?:[,;|/:.!?·–—]|-(?=\s))?", f"{gap}", text) if re.match(rf"^\s*{gap}\s*[,;|/:.!?·–—-]", text) else text
        text = re.sub(rf"{_BETWEEN}\s*{gap}\s*$", gap, text)
    text = re.sub(rf"^\s*{gap}\s*|\s*{gap}\s*$", "", text)
    text = re.sub(rf"\s*{gap}(?=\s*[,;.:!?)\]}}>])\s*|(?<=[(\[{{<]){gap}\s*", "", text)
    return re.sub(rf"(\s?)\s*{gap}(\s?)\s*", lambda found: " " if found[1] or found[2] else "", text)
