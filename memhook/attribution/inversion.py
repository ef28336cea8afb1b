"""Textual inversion: placeholders in a prompt that stand for one or more learned vectors."""

from __future__ import annotations

import re
from itertools import count, takewhile
from typing import Any


def added_tokens(tokenizer: Any) -> frozenset[str]:
    """Entries that were added to a tokenizer's vocabulary, special ones left out."""
    names = frozenset(getattr(tokenizer, "added_tokens_encoder", {})) - frozenset(getattr(tokenizer, "all_special_tokens", ()))
    # What spells a word's end or a byte is no placeholder, though a vocabulary may have it as an added entry.
    return frozenset(name for name in names if not name.endswith("</w>") and not re.fullmatch("<0x[0-9A-F]{2}>", name))


def with_all_vectors(tokenizer: Any, prompt: str) -> str:
    """A prompt whose placeholders are written out: ``<cat>`` with three vectors is ``<cat> <cat>_1 <cat>_2``, as diffusers names them."""
    added = added_tokens(tokenizer)
    if not added:
        return prompt
    for placeholder in sorted({piece for piece in tokenizer.tokenize(prompt) if piece in added}, key=len, reverse=True):
        others = takewhile(lambda name: name in added, (f"{placeholder}_{number}" for number in count(1)))
        prompt = prompt.replace(placeholder, " ".join([placeholder, *others]))
    return prompt
