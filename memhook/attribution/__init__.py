"""Which words of a prompt a memorized picture hangs on."""

from memhook.attribution.gradient import TokenAttribution, attribute_tokens, token_gradient
from memhook.attribution.leave_one_out import LeaveOneOut, WithoutWords, leave_one_out
from memhook.attribution.tokens import WordScore

__all__ = ["LeaveOneOut", "TokenAttribution", "WithoutWords", "WordScore", "attribute_tokens", "leave_one_out", "token_gradient"]
