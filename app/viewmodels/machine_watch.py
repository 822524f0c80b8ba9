"""The machine's free memory, followed while somebody looks at it."""

from __future__ import annotations

import os
import sys

from PySide6.QtCore import QObject, QTimer, Signal, Slot

from app.core.memory import Machine
from app.viewmodels.background import Background

EVERY_MS = 5000
STEP = 0.02  # of the total: smaller changes are not worth a repaint


def _probe() -> Machine:
    from app.engine import machine  # the first paint does not wait for what it imports

    return machine.probe()


class MachineWatch(QObject):
    """Probes off the window's thread every few seconds.

    Signals:
        changed: free memory moved noticeably. known: the first figures are there.
    """

    changed = Signal()
    known = Signal()

    def __init__(self, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._now: Machine | None = None
        self._told = self._closed = False
        self._work = Background(self)
        self._work.done.connect(self._probed)
        self._timer = QTimer(self)
        self._timer.setInterval(EVERY_MS)
        self._timer.timeout.connect(self.refresh)

    def start(self) -> None:
        self.refresh()
        self._timer.start()

    @Slot()
    def refresh(self) -> None:
        self._work.run("machine", _probe)

    def now(self) -> Machine:
        """The latest figures, at once. Before the first probe has ended memory is 0, which stands for not known."""
        if self._now is not None:
            return self._now
        system = "windows" if sys.platform == "win32" else "darwin" if sys.platform == "darwin" else "linux"
        return Machine(system=system, cpu_count=os.cpu_count() or 1, ram_total=0, ram_free=0)

    def measured(self) -> Machine:
        """The latest figures for a decision that needs them: waits for the first probe if that has not ended."""
        if self._now is None:
            self._now = _probe()
        return self._now

    def close(self) -> None:
        """Measure no more; what is under way is not told."""
        self._closed = True
        self._timer.stop()
        self._work.close()

    @Slot(object, object, object)
    def _probed(self, _key: object, result: object, _error: object) -> None:
        if self._closed or not isinstance(result, Machine):
            return
        before, self._now = self._now, result
        if not self._told:
            self._told = True
            self.known.emit()
        if before is None or (
            abs(before.ram_free - result.ram_free) > STEP * max(1, result.ram_total)
            or abs(before.vram_free - result.vram_free) > STEP * max(1, sum(gpu.total for gpu in result.gpus))
            or len(before.gpus) != len(result.gpus)
        ):
            self.changed.emit()
