"""Which words of a prompt a memorized picture hangs on.

Lives here:

    gradient  `attribute_tokens`: the gradient of the magnitude with respect to each token's
              embedding
    tokens    the tokens of a prompt as its embedding's positions see them, and the words that they
              spell
    views     an attribution as HTML, on a terminal, as text or bars, always with numbers beside the
              color

May use: `memhook.detection` and the rooms before it. Used by: `memhook.bench` and `memhook.cli`.
"""

from memhook.attribution.gradient import TokenAttribution, attribute_tokens, token_gradient
from memhook.attribution.tokens import WordScore

__all__ = ["TokenAttribution", "WordScore", "attribute_tokens", "token_gradient"]
