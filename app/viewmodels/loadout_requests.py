"""Requests on their way: which wait for the model, which the engine works on, and why some failed with it."""

from __future__ import annotations

import itertools

from app.core.errors import WeftError
from app.engine.protocol import Generate, GenerateBatch

Request = Generate | GenerateBatch


class Requests:
    """The loadout's own ids of requests, and the engine's.

    Attributes:
        queued: wait for the model, by our id, in order.
    """

    def __init__(self) -> None:
        self._ids = itertools.count(1)
        self.queued: dict[int, Request] = {}
        self._running: dict[int, int] = {}  # the engine's id to ours
        self._last_words: dict[int, WeftError] = {}  # why requests failed with an engine whose end is not told yet

    def new_id(self) -> int:
        return next(self._ids)

    def begin(self, engine_id: int, ours: int) -> None:
        """The engine has it."""
        self._running[engine_id] = ours

    def running(self, engine_id: int) -> int:
        """Our id of what the engine works on, 0 for what it does not."""
        return self._running.get(engine_id, 0)

    def engine_id(self, ours: int) -> int:
        """The engine's id of our request, 0 when it does not work on it."""
        return next((engine_id for engine_id, request in self._running.items() if request == ours), 0)

    def end(self, engine_id: int) -> int:
        """The engine is done with it. Returns our id, 0 when it was none of ours."""
        return self._running.pop(engine_id, 0)

    @property
    def busy(self) -> bool:
        return bool(self._running)

    def keep_last_words(self, engine_id: int, error: WeftError) -> None:
        """It failed because the engine died; it is told together with the engine's end."""
        self._last_words[self._running[engine_id]] = error

    def take_queued(self) -> dict[int, Request]:
        """Everything that waits; nothing waits any more."""
        queued, self.queued = self.queued, {}
        return queued

    def take_lost(self, error: WeftError, *, queued: bool) -> dict[int, WeftError]:
        """What ends with the engine, and why: its own last words, or `error`.

        Args:
            queued: what waits ends too.
        """
        lost = {ours: self._last_words.get(ours, error) for ours in self._running.values()}
        self._running.clear()
        self._last_words.clear()
        if queued:
            lost |= dict.fromkeys(self.take_queued(), error)
        return lost
