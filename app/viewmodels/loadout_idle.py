"""How long the loaded model has not been used."""

from __future__ import annotations

import time
from collections.abc import Callable

from PySide6.QtCore import QObject, QTimer, Signal, Slot

CHECK_MS = 30_000


class IdleWatch(QObject):
    """Looks every half minute while it runs.

    Args:
        minutes: after how many to tell, as the settings say now; 0 for never.

    Signals:
        idle: nothing was used for that long.
    """

    idle = Signal()

    def __init__(self, minutes: Callable[[], int], parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._minutes = minutes
        self._last_use = time.monotonic()
        self._timer = QTimer(self)
        self._timer.setInterval(CHECK_MS)
        self._timer.timeout.connect(self._look)

    @Slot()
    def used(self) -> None:
        """It is used now."""
        self._last_use = time.monotonic()

    def start(self) -> None:
        self._timer.start()

    @Slot()
    def stop(self) -> None:
        self._timer.stop()

    @Slot()
    def _look(self) -> None:
        minutes = self._minutes()
        if minutes and time.monotonic() - self._last_use > 60 * minutes:
            self.idle.emit()
