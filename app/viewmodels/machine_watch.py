"""The machine's free memory, followed while somebody looks at it."""

from __future__ import annotations

from PySide6.QtCore import QObject, QTimer, Signal, Slot

from app.core.memory import Machine
from app.viewmodels.background import Background

EVERY_MS = 5000
STEP = 0.02  # of the total: smaller changes are not worth a repaint


def _probe() -> Machine:
    from app.engine import machine  # the first paint does not wait for what it imports

    return machine.probe()


class MachineWatch(QObject):
    """Probes off the window's thread every few seconds; emits `changed` when free memory moved noticeably."""

    changed = Signal()

    def __init__(self, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._now: Machine | None = None
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
        """The latest figures; probes at once when there are none yet (tens of milliseconds)."""
        if self._now is None:
            self._now = _probe()
        return self._now

    def close(self) -> None:
        self._timer.stop()
        self._work.close()

    @Slot(object, object, object)
    def _probed(self, _key: object, result: object, _error: object) -> None:
        if not isinstance(result, Machine):
            return
        before, self._now = self._now, result
        if before is None or (
            abs(before.ram_free - result.ram_free) > STEP * max(1, result.ram_total)
            or abs(before.vram_free - result.vram_free) > STEP * max(1, sum(gpu.total for gpu in result.gpus))
            or len(before.gpus) != len(result.gpus)
        ):
            self.changed.emit()
