"""A command that the command line gives an engine, followed to its end: Ctrl+C stops the command, not the program."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from app.engine import protocol
from app.engine.client import EngineClient
from app.engine.event_queue import EngineEvent

T = TypeVar("T", protocol.Generated, protocol.GeneratedBatch, protocol.Scored, protocol.TaskResult)


class Asked:
    """Sends the command. Iterating gives all that the engine says until the command has ended; then its result is there.

    Attributes:
        id: the command's.
    """

    def __init__(self, engine: EngineClient, command: protocol.Command) -> None:
        self._engine = engine
        self._done: protocol.Done | None = None
        self.id = engine.send(command)

    def __iter__(self) -> Iterator[EngineEvent]:
        """Ctrl+C while it waits cancels the command.

        Raises:
            WeftError: the command failed (CANCELLED where it keeps nothing of what it did), or the engine died.
        """
        while self._done is None:
            try:
                event = self._engine.next_event(None)
            except KeyboardInterrupt:
                self._engine.cancel(self.id)
                continue
            self._engine.raise_if_ended(self.id, event)
            if isinstance(event, protocol.Done) and event.id == self.id:
                self._done = event
            elif event is not None:
                yield event

    def result(self, kind: type[T]) -> T:
        """What came of it, once nothing more is said."""
        assert self._done is not None and isinstance(self._done.result, kind)
        return self._done.result
