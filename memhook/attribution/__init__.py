"""Which words of a prompt a memorized picture hangs on."""

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
