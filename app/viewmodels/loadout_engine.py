"""The loadout's one engine, and those that it has let go of but whose threads have not ended yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from PySide6.QtCore import QObject, Slot

from app.viewmodels.engine_session import EngineSession


class EngineSlot(QObject):
    """Holds at most one engine that is heard.

    Args:
        listen: connects the signals of a new session.

    Attributes:
        session: the engine in use, if there is one.
    """

    def __init__(self, listen: Callable[[EngineSession], None], parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._listen = listen
        self.session: EngineSession | None = None
        self._ending: list[EngineSession] = []

    @property
    def worker(self) -> Any:
        """What takes the engine's commands; None without an engine."""
        return self.session.worker if self.session is not None else None

    @property
    def dead(self) -> bool:
        """Whether there is no engine, or its process has ended though nobody was told yet."""
        return self.session is None or not self.session.worker.client.alive

    def take(self, worker: Any) -> EngineSession:
        """Hold an engine, not started yet, where there is none."""
        session = EngineSession(worker, self)
        self._listen(session)
        session.gone.connect(self._gone)
        self.session = session
        return session

    def drop(self) -> None:
        """End the engine without waiting for it; it is heard no more."""
        session, self.session = self.session, None
        if session is not None:
            self._ending.append(session)
            session.drop()

    def wait(self) -> None:
        """Block until the threads of all that were let go of have ended. Only for closing the window."""
        for session in list(self._ending):
            session.wait()

    @Slot(object)
    def _gone(self, session: EngineSession) -> None:
        if session in self._ending:
            self._ending.remove(session)
            session.deleteLater()
