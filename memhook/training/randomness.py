"""The state of the random number generators that a forward pass draws from."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, eq=False)
class RandomState:
    """The CPU's generator and, where the model is elsewhere, its device's."""

    device: torch.device
    cpu: Tensor
    other: Tensor | None

    @staticmethod
    def of(device: torch.device) -> RandomState:
        """The state now; read from the host, without waiting for the device."""
        backend = _backend(device)
        return RandomState(device, torch.get_rng_state(), None if backend is None else backend.get_rng_state(device))

    def restore(self) -> None:
        """Set the generators to this state."""
        torch.set_rng_state(self.cpu)
        backend = _backend(self.device)
        if backend is not None and self.other is not None:
            backend.set_rng_state(self.other, device=self.device)

    def moved(self) -> bool:
        """Whether numbers were drawn since."""
        now = RandomState.of(self.device)
        return not torch.equal(now.cpu, self.cpu) or (self.other is not None and now.other is not None and not torch.equal(now.other, self.other))

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Draw the same numbers once more inside the block; afterwards the generators go on as if nothing had been drawn."""
        now = RandomState.of(self.device)
        self.restore()
        try:
            yield
        finally:
            now.restore()


def _backend(device: torch.device) -> Any:
    """``torch.cuda`` or the like; None for the CPU and for devices without a generator of their own."""
    if device.type in ("cpu", "meta", "mps"):
        return None
    backend = getattr(torch, device.type, None)
    return backend if hasattr(backend, "get_rng_state") else None
