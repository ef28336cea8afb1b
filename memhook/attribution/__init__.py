"""Which words of a prompt a memorized picture hangs on.

Lives here:

    gradient   `attribute_tokens`: the gradient of the magnitude with respect to each token's
               embedding
    tokens     the tokens of a prompt as its embedding's positions see them, and the words that they
               spell
    views      an attribution as HTML, on a terminal, as text or bars, always with numbers beside
               the color
    inputs     the same with respect to what enters the text encoder
    left_out   `leave_one_out`: what the prompt scores without each of its words (`left_out_views`:
               to look at)
    maps       `difference_map`: where in the picture (`map_views`: to look at)
    inversion  placeholders in a prompt that stand for learned vectors (textual inversion)

May use: `memhook.detection` and the rooms before it. Used by: `memhook.bench` and `memhook.cli`.
"""

from memhook.attribution.gradient import TokenAttribution, attribute_tokens, token_gradient
from memhook.attribution.left_out import LeaveOneOut, WithoutWords, leave_one_out
from memhook.attribution.maps import DifferenceMap, difference_map
from memhook.attribution.tokens import WordScore

__all__ = [
    "DifferenceMap",
    "LeaveOneOut",
    "TokenAttribution",
    "WithoutWords",
    "WordScore",
    "attribute_tokens",
    "difference_map",
    "leave_one_out",
    "token_gradient",
]
