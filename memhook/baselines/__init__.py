"""What the paper compares with, so that its comparisons can be repeated."""

from memhook.mitigation.random_additions import add_embedding_noise, add_random_numbers, add_random_tokens, repeat_words

__all__ = ["add_embedding_noise", "add_random_numbers", "add_random_tokens", "repeat_words"]
