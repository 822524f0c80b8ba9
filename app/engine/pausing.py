"""Holding a task and letting it go on: for tasks that are asked between two pieces of their work."""

from __future__ import annotations

import threading
import time

import msgspec

from app.core.errors import ErrorKind, WeftError
from app.core.merge_plan import MergeAdjustment
from app.engine.reporting import Report

_LOOK = 0.05  # seconds


class Pausing:
    """Listens to a task's report."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._paused = threading.Event()
        report.on_adjust(self._adjust)

    def _adjust(self, text: str) -> None:
        # In the reader's thread.
        if msgspec.json.decode(text, type=MergeAdjustment).paused:
            self._paused.set()
        else:
            self._paused.clear()

    def stopped(self) -> bool:
        """Whether it is cancelled. Waits here while it is paused."""
        while self._paused.is_set() and not self._report.cancelled:
            time.sleep(_LOOK)
        return self._report.cancelled

    def check(self) -> None:
        """The same. Raises WeftError CANCELLED."""
        if self.stopped():
            raise WeftError(ErrorKind.CANCELLED, "Cancelled.")
