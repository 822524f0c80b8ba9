"""Python's garbage collector, kept to the window's thread."""

from __future__ import annotations

import gc
import time

from PySide6.QtCore import QObject, QTimer, Slot

LOOK_MS = 100  # often, so that each time there is little to do
FULL_SECONDS = 300  # between collections of everything: each holds the window up for some tens of milliseconds


class GarbageCollector(QObject):
    """Collects cycles in the thread that it is made in, the window's, and nowhere else.

    By itself Python collects in whichever thread happens to allocate: a worker that reads a header would free a view model that
    stands in a cycle with a lambda, and Qt does not survive the death of a QObject in another thread than its own ("Timers cannot
    be stopped from another thread", then a crash in the event loop some time later). While this lives, collection is switched off
    and a timer here does it, by the thresholds that Python would go by.
    """

    def __init__(self, parent: QObject | None = None) -> None:
        super().__init__(parent)
        gc.disable()
        self._full = time.monotonic()
        self._timer = QTimer(self)
        self._timer.setInterval(LOOK_MS)
        self._timer.timeout.connect(self.look)
        self._timer.start()

    def settle(self) -> None:
        """What there is now stays until the end: modules, the first page. Later collections do not walk through it."""
        gc.freeze()

    @Slot()
    def look(self) -> None:
        """Collect the oldest generation whose turn it is."""
        counts, thresholds = gc.get_count(), gc.get_threshold()
        for generation in (2, 1, 0):
            if generation == 2 and time.monotonic() - self._full < FULL_SECONDS:
                continue
            if 0 < thresholds[generation] < counts[generation]:
                gc.collect(generation)
                if generation == 2:
                    self._full = time.monotonic()
                return

    def close(self) -> None:
        """Leave it to Python again: the window is gone."""
        self._timer.stop()
        gc.unfreeze()
        gc.enable()
