"""The tokens of a prompt as the positions of its embedding see them, and the words that they spell."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from memhook.attribution.inversion import added_tokens, with_all_vectors
from memhook.errors import MemhookError

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

Marks = Literal["</w>", "Ġ", "▁", "none"]
"""How a vocabulary writes the borders of words: CLIP ends a word with ``</w>``, byte-level vocabularies (GPT-2, Llama 3, Qwen) begin
one with ``Ġ``, SentencePiece ones (T5, Llama 2, Gemma) with ``▁``. Without marks every token is a word, but for ``##`` (BERT)."""

_UNLIMITED = 100_000  # tokenizers without a window say 1e30


@dataclass(frozen=True)
class Word:
    """A word of a prompt and the positions of its tokens."""

    text: str
    positions: tuple[int, ...]


@dataclass(frozen=True)
class WordScore:
    """A word, the norm of the magnitude's gradient with respect to all of its tokens, and their positions."""

    text: str
    score: float
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Tokens:
    """One prompt's tokens, an entry for each of the ``l`` positions of its embedding.

    Attributes:
        pieces: The vocabulary's entries, such as ``"snow"`` and ``"fall</w>"``.
        special: Which positions are start, end or padding.
        words: The words that the other positions spell, in order.
        prompt: The prompt, if known.
        cut_off: The end of the prompt that did not fit the encoder's window; empty if all of it did.

    >>> tokens = tokens_of(["<s>", "snow", "fall</w>", "in</w>", "</s>"], special=[True, False, False, False, True])
    >>> [word.text for word in tokens.words]
    ['snowfall', 'in']
    """

    pieces: tuple[str, ...]
    special: tuple[bool, ...]
    words: tuple[Word, ...]
    prompt: str = ""
    cut_off: str = ""

    def __len__(self) -> int:
        return len(self.pieces)

    def __add__(self, other: Tokens) -> Tokens:
        """Tokens of two encoders whose embeddings are joined along ``l``, such as CLIP and T5 in Stable Diffusion 3."""
        shifted = tuple(Word(word.text, tuple(position + len(self) for position in word.positions)) for word in other.words)
        cut_off = self.cut_off if len(self.cut_off) <= len(other.cut_off) else other.cut_off  # what neither encoder saw
        return Tokens(self.pieces + other.pieces, self.special + other.special, self.words + shifted, self.prompt or other.prompt, cut_off)


def tokens_of(
    pieces: Sequence[str],
    *,
    special: Sequence[bool] | None = None,
    marks: Marks | None = None,
    prompt: str = "",
    cut_off: str = "",
    added: Container[str] = (),
) -> Tokens:
    """Tokens from plain strings, for hosts without a Hugging Face tokenizer.

    Args:
        pieces: One string for each of the ``l`` positions.
        special: Which of them are start, end or padding; none of them where left out.
        marks: How borders of words are written; found in the strings where left out.
        prompt: The prompt itself.
        cut_off: What did not fit the encoder's window.
        added: Entries that were added to the vocabulary (textual inversion): a word each, together with its other vectors ``NAME_1`` and on.
    """
    if isinstance(pieces, str) or not all(isinstance(piece, str) for piece in pieces):
        kinds = sorted({type(piece).__name__ for piece in pieces})
        raise MemhookError(f"the tokens are a {type(pieces).__name__} of {', '.join(kinds)}; expected a list of strings, one a position")
    flags = tuple(bool(flag) for flag in special) if special is not None else (False,) * len(pieces)
    if len(flags) != len(pieces):
        raise MemhookError(f"there are {len(pieces)} tokens and {len(flags)} special flags; expected one flag a token")
    found = marks if marks is not None else _find_marks([piece for piece, flag in zip(pieces, flags, strict=True) if not flag])
    return Tokens(tuple(pieces), flags, _words(pieces, flags, found, added), prompt, cut_off)


def prompt_tokens(tokenizer: Any, prompt: str, *, length: int | None = None) -> Tokens:
    """The tokens of a prompt from a Hugging Face tokenizer, padded and cut as pipelines do it.

    * Placeholders of textual inversion stand for all of their vectors, as diffusers expands them, and are one word.
    * An embedding that is several windows of a CLIP encoder long is labelled as compel, Stable Diffusion's long-prompt pipelines and their
      kin make it: as many tokens as fit in each window, with a start and an end; or one start and one end for all of it.
    * For Stable Diffusion XL, whose two encoders are joined along the width, either tokenizer will do. Where two are joined along the
      positions (Stable Diffusion 3), add their tokens: ``prompt_tokens(clip, p, length=77) + prompt_tokens(t5, p, length=256)``.

    Args:
        tokenizer: Such as ``pipeline.tokenizer``: CLIP, T5, Llama and their kin, fast or slow.
        prompt: The prompt as it was given to the pipeline.
        length: The positions ``l`` of the embedding. The tokenizer's own window where None (77 for CLIP); a tokenizer that has
            none is not padded.

    Warns:
        UserWarning: The prompt is longer than the window; says what was cut off. Or an encoder of this kind does not make ``length``
            positions, so they are numbered.
    """
    if not isinstance(prompt, str):
        raise MemhookError(f"the prompt is a {type(prompt).__name__}; expected a string. Call once for each prompt")
    marks, own = _marks_of(tokenizer), getattr(tokenizer, "model_max_length", None)
    own = own if own is not None and own < _UNLIMITED else None
    windows = 1
    if length is not None and own is not None and marks == "</w>" and length > own:
        windows = length // own if length % own == 0 else 1
        if windows == 1 and (length - 2) % (own - 2):
            return _numbered(length, own, prompt)
    expanded = with_all_vectors(tokenizer, prompt)
    whole = list(tokenizer(expanded, truncation=False, padding=False, verbose=False)["input_ids"])
    window = length if length is not None else own if own is not None else len(whole)
    if windows > 1 and own is not None:
        ids, attended = _in_windows(tokenizer, whole, own, windows)
    else:
        pads = getattr(tokenizer, "pad_token", None) is not None
        given = tokenizer(expanded, truncation=True, max_length=window, padding="max_length" if pads else False, return_attention_mask=True)
        ids, attended = list(given["input_ids"]), list(given["attention_mask"])
    never_words = _special_ids(tokenizer)
    special = [not seen or token in never_words for token, seen in zip(ids, attended, strict=True)]
    pieces = [str(piece) for piece in tokenizer.convert_ids_to_tokens(ids)]
    if length is not None:  # a tokenizer without padding
        special += [True] * (length - len(pieces))
        pieces += ["<pad>"] * (length - len(pieces))
    content = [token for token in whole if token not in never_words]
    lost = content[special.count(False) :]
    cut_off = tokenizer.decode(lost).strip() if lost else ""
    if lost:
        warnings.warn(
            f"the prompt has {len(content)} tokens, of which {len(content) - len(lost)} fit the encoder's window of {window} positions; "
            f"cut off, without influence on the images: {cut_off!r}. Shorten the prompt",
            stacklevel=2,
        )
    return tokens_of(pieces, special=special, marks=marks, prompt=prompt, cut_off=cut_off, added=added_tokens(tokenizer))


def id_tokens(tokenizer: Any, ids: Sequence[int], *, attended: Sequence[bool | int] | None = None, prompt: str = "") -> Tokens:
    """The tokens that a text encoder was given, for hosts that make them in a way of their own.

    Args:
        tokenizer: The one that made them.
        ids: What stands at each of the ``l`` positions.
        attended: The attention mask; start, end and padding are recognized by their ids as well.
        prompt: The prompt, if known.
    """
    ids = [int(token) for token in ids]
    never_words, pad = _special_ids(tokenizer), getattr(tokenizer, "pad_token_id", None)
    seen = [True] * len(ids) if attended is None else [bool(flag) for flag in attended]
    if len(seen) != len(ids):
        raise MemhookError(f"there are {len(ids)} ids and {len(seen)} flags of the attention mask; expected one flag an id")
    if attended is None and pad is not None:  # padding stands at the end: a prompt may hold that token too
        last = next((position for position in range(len(ids), 0, -1) if ids[position - 1] != pad), 0)
        seen[last:] = [False] * (len(ids) - last)
    special = [not flag or token in never_words for token, flag in zip(ids, seen, strict=True)]
    pieces = [str(piece) for piece in tokenizer.convert_ids_to_tokens(ids)]
    return tokens_of(pieces, special=special, marks=_marks_of(tokenizer), prompt=prompt, added=added_tokens(tokenizer))


def _numbered(length: int, own: int, prompt: str) -> Tokens:
    warnings.warn(
        f"the embedding has {length} positions, which no windows of {own} of this tokenizer's encoder make, so its positions are numbered and no "
        "words are shown: another encoder made some of them. Add the tokens of both: prompt_tokens(first, ...) + prompt_tokens(second, ...)",
        stacklevel=3,
    )
    return tokens_of([f"#{position}" for position in range(length)], marks="none", prompt=prompt)


def _in_windows(tokenizer: Any, whole: Sequence[int], own: int, windows: int) -> tuple[list[int], list[bool]]:
    """Ids and attention of ``windows`` windows of ``own`` positions, each with a start, as much of the prompt as fits, an end, and padding."""
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    content = list(whole[1:-1]) if len(whole) > 1 and (whole[0], whole[-1]) == (start, end) else list(whole)
    ids, attended = [], []
    for number in range(windows):
        part = content[number * (own - 2) : (number + 1) * (own - 2)]
        padding = own - 2 - len(part)
        ids += [start, *part, end, *[pad] * padding]
        attended += [True] * (len(part) + 2) + [False] * padding
    return ids, attended


def printable(text: str) -> str:
    r"""Text that is safe to write to a terminal: control characters and invisible ones as escapes.

    >>> print(printable("red \x1b[31m fox"))
    red \x1b[31m fox
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def shown(piece: str) -> str:
    """A vocabulary entry as a reader wants to see it: without marks, and with its bytes decoded."""
    marks = _find_marks([piece])
    return _spell([piece], marks) if marks != "none" else piece


def _special_ids(tokenizer: Any) -> set[int]:
    """Ids that no word is made of. Stable Diffusion XL's second tokenizer pads with ``!``, which a prompt may contain."""
    ends = {getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "cls", "sep")} - {None}
    ambiguous = {getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "unk_token_id", None)} - ends
    return {token for token in (*tokenizer.all_special_ids, *ends) if token is not None and token not in ambiguous}


def _marks_of(tokenizer: Any) -> Marks:
    return _find_marks([str(piece) for piece in tokenizer.convert_ids_to_tokens(tokenizer("a a", add_special_tokens=False)["input_ids"])])


def _find_marks(pieces: Sequence[str]) -> Marks:
    if any(piece.endswith("</w>") for piece in pieces):
        return "</w>"
    if any(piece.startswith("Ġ") for piece in pieces):
        return "Ġ"
    return "▁" if any("▁" in piece for piece in pieces) else "none"


def _words(pieces: Sequence[str], special: Sequence[bool], marks: Marks, added: Container[str]) -> tuple[Word, ...]:
    found: list[list[int]] = []
    texts: dict[int, str] = {}  # of placeholders, by their first position
    vectors: dict[int, int] = {}  # how many of theirs were seen
    open_word = False  # the next position may go on with the last word
    for position, piece in enumerate(pieces):
        if special[position]:
            open_word = False
            continue
        if piece in added:
            # Some tokenizers keep the space before it as a piece of its own.
            blank = found.pop() if open_word and all(not pieces[index].strip("Ġ▁") for index in found[-1]) else []
            begin = blank[0] if blank else position
            name = texts.get(found[-1][0], "") if found else ""
            if name and found[-1][-1] == begin - 1 and piece == f"{name}_{vectors[found[-1][0]]}":
                vectors[found[-1][0]] += 1
                found[-1] += [*blank, position]
            else:
                found.append([*blank, position])
                texts[begin], vectors[begin] = piece, 1
            open_word = False
            continue
        if marks == "</w>":
            starts = not open_word
        elif marks == "none":
            starts = not (open_word and piece.startswith("##"))
        else:
            starts = not open_word or piece.startswith((marks, "Ċ") if marks == "Ġ" else marks)
        if starts:
            found.append([])
        found[-1].append(position)
        open_word = not (marks == "</w>" and piece.endswith("</w>"))
    return tuple(Word(texts.get(word[0]) or _spell([pieces[position] for position in word], marks), tuple(word)) for word in found)


def _spell(pieces: Sequence[str], marks: Marks) -> str:
    if marks == "none":
        return "".join(piece.removeprefix("##") if index else piece for index, piece in enumerate(pieces))
    if marks == "▁":
        text = re.sub("(?:<0x[0-9A-F]{2}>)+", _from_hex, "".join(pieces)).replace("▁", " ").strip()
    else:
        text = _from_bytes("".join(piece.removesuffix("</w>") for piece in pieces)).strip()
    return text or "".join(pieces)


def _from_hex(match: re.Match[str]) -> str:
    """SentencePiece's fallback for characters outside its vocabulary: one token per byte, ``<0xE2>``."""
    return bytes.fromhex(match[0].replace("<0x", "").replace(">", "")).decode("utf-8", "replace")


def _from_bytes(text: str) -> str:
    """Byte-level vocabularies write every byte as one printable character; this undoes it where it was done."""
    try:
        return bytes(_byte_characters()[char] for char in text).decode("utf-8")
    except (KeyError, UnicodeDecodeError):  # no byte-level vocabulary, or a part of a character
        return text


@cache
def _byte_characters() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 bytes are themselves, the others follow from U+0100 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {**{chr(byte): byte for byte in plain}, **{chr(256 + index): byte for index, byte in enumerate(others)}}
