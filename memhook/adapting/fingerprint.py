"""Telling models apart: their fingerprints, and what was done to them beside their own weights."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from memhook.adapting.alterations import take
from memhook.adapting.snapshots import difference, fingerprint, is_fingerprint, read_later, same_fingerprint
from memhook.errors import MemhookError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Fingerprinted", "difference", "fingerprint", "is_fingerprint", "read_later", "same_fingerprint"]


class Fingerprinted:
    """Fingerprints of modules, taken when asked for, without keeping the modules alive."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = {name: weakref.ref(module) for name, module in modules.items()}

    def modules(self) -> dict[str, nn.Module]:
        """The modules that are left.

        Raises:
            MemhookError: One was deleted.
        """
        found = {name: reference() for name, reference in self._modules.items()}
        for name, module in found.items():
            if module is None:
                raise MemhookError(f"the {name} of this trace was deleted before its fingerprint was taken; keep it until the `with` block ends")
        return {name: module for name, module in found.items() if module is not None}

    def snapshot(self) -> Callable[[], dict[str, Any]]:
        """The fingerprints as of now, and what was done to the modules beside; without waiting for the device; call it to read them."""
        modules = self.modules()
        found, altered = {name: read_later(module, name) for name, module in modules.items()}, take(modules)
        return lambda: {
            **{name: read() for name, read in found.items()},
            **{field: value for field, value in altered().items() if value},
        }

    def describe(self) -> dict[str, Any]:
        """The same, read at once."""
        return self.snapshot()()
