"""A training run as it goes: curves of bounded size, sample answers, notes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PySide6.QtCore import QObject, Signal

from app.core.errors import WeftError
from app.core.jobs import Job, Progress
from app.store.runs import RunHistory

MOST_POINTS = 1600  # of a curve; beyond, of each stretch its lowest and highest are kept
MOST_NOTES = 200
Point = tuple[float, float]


class Curve:
    """Points (step, value) in order of step. What is said of an earlier step again (a resumed run) takes the place of all from there on."""

    def __init__(self, points: tuple[Point, ...] = ()) -> None:
        self.points: list[Point] = list(points)

    def add(self, step: float, value: float) -> None:
        """Take a point."""
        while self.points and self.points[-1][0] >= step:
            self.points.pop()
        self.points.append((float(step), value))
        if len(self.points) > MOST_POINTS:
            # The latest quarter stays as it is, so that what just happened is seen exactly.
            older = len(self.points) * 3 // 4
            self.points = [*_extremes(self.points[:older], MOST_POINTS // 4), *self.points[older:]]

    def __len__(self) -> int:
        return len(self.points)


def _extremes(points: list[Point], pairs: int) -> list[Point]:
    """Of each of so many stretches the lowest and the highest point, and the first of all."""
    size = len(points) / pairs
    kept: list[Point] = [points[0]]
    for number in range(pairs):
        stretch = points[int(number * size) : max(int(number * size) + 1, int((number + 1) * size))]
        low, high = min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])
        kept += sorted({low, high})
    return list(dict.fromkeys(kept))


class RunState(QObject):
    """A run as it goes: its metrics by step, samples and notes.

    Signals:
        changed: something was added.
    """

    changed = Signal()

    def __init__(self, job: Job, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self.job = job
        self.progress: Progress | None = None
        self.metrics: dict[str, Curve] = {}
        self.samples: list[tuple[int, tuple[tuple[str, str], ...]]] = []
        self.notes: list[str] = []
        self.paused = False
        self.stopping = False
        self.error: WeftError | None = None
        self.result: dict[str, Any] | None = None
        self.ended = ""
        self.unsaved = False

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Take a metric; a resumed run says some steps again."""
        for name, value in values.items():
            self.metrics.setdefault(name, Curve()).add(step, value)
        self.unsaved = True

    def note(self, text: str) -> bool:
        """Take a sentence. Returns whether it is new."""
        if not text or text in self.notes or len(self.notes) >= MOST_NOTES:
            return False
        self.notes.append(text)
        self.unsaved = True
        return True

    def series(self, name: str) -> tuple[Point, ...]:
        """Points of a metric in order of step."""
        found = self.metrics.get(name)
        return tuple(found.points) if found else ()

    def latest(self, name: str) -> float | None:
        """The last value of a metric."""
        found = self.metrics.get(name)
        return found.points[-1][1] if found else None

    # In the store ---------------------------------------------------------------------------------

    def history(self) -> RunHistory:
        """What is kept of it."""
        return RunHistory(
            curves={name: tuple(curve.points) for name, curve in self.metrics.items()},
            samples=tuple(self.samples),
            notes=tuple(self.notes),
            ended=self.ended,
        )

    def take(self, history: RunHistory) -> None:
        """Show what was kept."""
        self.metrics = {name: Curve(points) for name, points in history.curves.items()}
        self.samples = list(history.samples)
        self.notes = list(history.notes)
        self.ended = history.ended
