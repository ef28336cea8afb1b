"""The public name of `memhook.adapting.fingerprint` for adapters written before that room was there."""

from memhook.adapting.fingerprint import Fingerprinted, fingerprint, is_fingerprint, same_fingerprint

__all__ = ["Fingerprinted", "fingerprint", "is_fingerprint", "same_fingerprint"]
