"""What the user can do to a run while it is at work: pause, go on, stop and keep, checkpoint, sample; and Cancel."""

from __future__ import annotations

import threading

import msgspec

from app.engine.reporting import Report
from app.training.run_config import TrainAdjustment, TrainNews


class Control:
    """Takes Adjust and Cancel in the reader thread; the loop asks between batches."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._going = threading.Event()
        self._going.set()
        self._wanted: set[str] = set()
        self._lock = threading.Lock()
        self.stopping = False
        report.on_adjust(self._adjust)
        report.on_cancel(self._going.set)

    def _adjust(self, text: str) -> None:
        action = msgspec.json.decode(text, type=TrainAdjustment).action
        if action == "pause":
            self._going.clear()
        elif action == "resume":
            self._going.set()
        elif action == "stop":
            self.stopping = True
            self._going.set()
        else:
            with self._lock:
                self._wanted.add(action)

    @property
    def paused(self) -> bool:
        """Whether the run is to be held."""
        return not self._going.is_set()

    @property
    def cancelled(self) -> bool:
        """Whether Cancel has come."""
        return self._report.cancelled

    def wait(self) -> None:
        """Hold the run until it may go on."""
        self.tell("state", text="paused")
        self._going.wait()
        self.tell("state", text="stopping" if self.stopping else "running")

    def take(self, action: str) -> bool:
        """Whether `action` (checkpoint, sample) was asked for since the last time."""
        with self._lock:
            if action in self._wanted:
                self._wanted.discard(action)
                return True
        return False

    def tell(self, kind: str, **fields: object) -> None:
        """Send news."""
        news = msgspec.convert({"kind": kind, **fields}, TrainNews)
        self._report.news(msgspec.json.encode(news).decode())
