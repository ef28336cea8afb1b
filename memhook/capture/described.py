"""The setting of a watched run: asked of the adapter while the block lasts, and kept when it ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from memhook.errors import MemhookError

Describe = Callable[[], Mapping[str, Any]]


class Described:
    """What an adapter says of the setting. Shared by a trace and its parts.

    Inside the block, `read` asks anew each time. `take` asks for the last time, so that the model may change or be deleted afterwards;
    what that leaves on the device is read when somebody asks.
    """

    def __init__(self, describe: Describe | None) -> None:
        self._describe = describe
        self._known: dict[str, Any] | None = None if describe is not None else {}
        self._why_not: str | None = None

    def read(self) -> dict[str, Any]:
        """The setting, as JSON values.

        Raises:
            MemhookError: It could not be taken when the block ended.
        """
        if self._why_not is not None:
            raise MemhookError(self._why_not)
        if self._known is not None:
            return dict(self._known)
        assert self._describe is not None  # noqa: S101 -- for the type checker: one of the two is known
        return dict(self._describe())

    def take(self, snapshot: Callable[[], Describe] | None = None) -> None:
        """Keep the setting as of now.

        Args:
            snapshot: Takes it without waiting for the device, and answers what reads it; where None, the adapter is asked at once.
        """
        if self._known is not None or self._why_not is not None or self._describe is None:
            return
        try:
            if snapshot is None:
                self._known = dict(self._describe())
            else:
                self._describe = _Once(snapshot())
        except Exception as error:  # noqa: BLE001 -- the run is over, and its numbers are good; whoever asks for the setting is told
            self._why_not = str(error) if isinstance(error, MemhookError) else f"the setting could not be taken when the block ended: {error!r}"

    def __getstate__(self) -> dict[str, Any]:
        try:
            known, why_not = self.read(), None
        except MemhookError as error:
            known, why_not = None, str(error)
        return {"_describe": None, "_known": known, "_why_not": why_not}


class _Once:
    """Reads something once, and lets go of what it was read from."""

    def __init__(self, read: Describe) -> None:
        self._read: Describe | None = read
        self._found: Mapping[str, Any] = {}

    def __call__(self) -> Mapping[str, Any]:
        if self._read is not None:
            self._found = self._read()
            self._read = None
        return self._found
