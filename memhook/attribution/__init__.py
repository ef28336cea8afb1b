"""Which words of a prompt a memorized picture hangs on."""

from memhook.attribution.gradient import TokenAttribution, WordScore, attribute_tokens, token_gradient

__all__ = ["TokenAttribution", "WordScore", "attribute_tokens", "token_gradient"]
