"""Attention processors that a pipeline exchanges for the time of a run, put back where memhook ended that run."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from memhook.capture.watching import EnoughSeen
from memhook.errors import MemhookError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import nn


@contextlib.contextmanager
def restored_if_ended(denoisers: Iterable[nn.Module]) -> Iterator[None]:
    """Where memhook itself ends a run (`memhook.probe`, a guard that stops), processors are what they were before the block.

    Perturbed-attention and self-attention guidance and Attend-and-Excite put their own in at the start of a run and the old ones
    back at its end, which a run that is ended never reaches; the next run would go on with them. A host's own errors are left
    to do what they do without memhook.
    """
    before = [(part, part.processor) for denoiser in denoisers for part in denoiser.modules() if hasattr(part, "processor")]
    try:
        yield
    except (EnoughSeen, MemhookError):
        for part, processor in before:
            if part.processor is not processor:
                _put(part, processor)
        raise


def _put(part: Any, processor: Any) -> None:
    if callable(getattr(part, "set_processor", None)):
        part.set_processor(processor)
    else:
        part.processor = processor
