"""What an engine has said and nobody has taken yet."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

from app.engine import protocol
from app.engine.exits import EngineExit

UNREAD_LIMIT = 64 * 1024 * 1024  # bytes of events that nobody has taken; then the engine has to wait


@dataclass(frozen=True, kw_only=True)
class Responsiveness:
    """An engine stopped answering, or answers again. It is only a notice: nothing is killed for it."""

    responsive: bool
    seconds: float = 0.0  # since something was last heard
    stopped: bool = False  # the system says that the process stands still


EngineEvent = protocol.Event | Responsiveness | EngineExit


class EventQueue:
    """Events that nobody has taken yet, bounded in bytes, with the exit as its last and lasting entry."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._events: deque[tuple[protocol.Event | Responsiveness, int]] = deque()
        self._bytes = 0
        self._bounded = True
        self._woken = False
        self.exit: EngineExit | None = None

    def put(self, event: protocol.Event | Responsiveness, size: int = 0) -> None:
        """Add an event; one with a size waits while too much is unread."""
        with self._condition:
            while size and self._bounded and self._bytes > UNREAD_LIMIT:
                self._condition.wait()
            self._events.append((event, size))
            self._bytes += size
            self._condition.notify_all()

    def get(self, timeout: float | None) -> EngineEvent | None:
        with self._condition:
            self._condition.wait_for(lambda: self._events or self.exit is not None or self._woken, timeout)
            self._woken = False
            if self._events:
                event, size = self._events.popleft()
                if self._bytes > UNREAD_LIMIT >= self._bytes - size:
                    self._condition.notify_all()
                self._bytes -= size
                return event
            return self.exit

    @property
    def full(self) -> bool:
        """Whether the engine has to wait, because nobody takes what it said."""
        return self._bounded and self._bytes > UNREAD_LIMIT

    def wake(self) -> None:
        with self._condition:
            self._woken = True
            self._condition.notify_all()

    def release(self) -> None:
        """The engine is dead: what is left of its words fits, whatever its size."""
        with self._condition:
            self._bounded = False
            self._condition.notify_all()

    def close(self, end: EngineExit) -> None:
        with self._condition:
            self.exit = end
            self._bounded = False
            self._condition.notify_all()
