"""Which words of a prompt a memorized picture hangs on."""

from memhook.attribution.gradient import TokenAttribution, attribute_tokens, token_gradient
from memhook.attribution.tokens import WordScore

__all__ = ["TokenAttribution", "WordScore", "attribute_tokens", "token_gradient"]
