"""The tokens of a prompt as ComfyUI's text encoders cut it."""

from __future__ import annotations

from typing import Any

from memhook.attribution.tokens import Tokens, tokens_of

_SPECIAL = ("start_token", "end_token", "pad_token")


def prompt_tokens(clip: Any, text: str, length: int) -> Tokens | None:
    """One entry a position of an embedding of ``length`` positions.

    Encoders side by side in width (SDXL) see the same tokens, one after the other (SD3) their own; long prompts come in chunks.

    Args:
        clip: A CLIP.
        text: The prompt.
        length: Of its embedding.

    Returns:
        None where the tokenizers' output does not fit the embedding.
    """
    parts = [_part(clip.tokenizer, name, chunks) for name, chunks in clip.tokenize(text).items()]
    known = [part for part in parts if part is not None]
    alone = next((part for part in known if len(part[0]) == length), None)
    if alone is None:
        sizes = {len(pieces) for pieces, _ in known}
        joined = known if sum(len(pieces) for pieces, _ in known) == length else known[1:]  # SD3: l and g share their positions
        if len(sizes) < 1 or sum(len(pieces) for pieces, _ in joined) != length:
            return None
        alone = [piece for pieces, _ in joined for piece in pieces], [flag for _, flags in joined for flag in flags]
    pieces, special = alone
    return tokens_of(pieces, special=special, prompt=text)


def _part(tokenizer: Any, name: str, chunks: list[list[tuple[Any, ...]]]) -> tuple[list[str], list[bool]] | None:
    """Pieces and special flags of one encoder's tokens."""
    own = next((found for key in (f"clip_{name}", name) if (found := getattr(tokenizer, key, None)) is not None), tokenizer)
    words = getattr(own, "inv_vocab", None)
    if words is None:
        return None
    never_words = {getattr(own, attribute, None) for attribute in _SPECIAL} - {None}
    pieces, special = [], []
    for token, *_ in (entry for chunk in chunks for entry in chunk):
        plain = isinstance(token, int)  # else the vectors of a textual inversion
        pieces.append(str(words.get(token, f"<{token}>")) if plain else "<embedding></w>")
        special.append(plain and token in never_words)
    return pieces, special
