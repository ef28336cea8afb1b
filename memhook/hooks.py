"""The public name of `memhook.adapting.hooks` for adapters written before that room was there."""

from memhook.adapting.hooks import Replaced, hook_arguments, hook_calls

__all__ = ["Replaced", "hook_arguments", "hook_calls"]
