"""Cycles are collected in the window's thread alone: Qt's objects do not survive being freed in another."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from pytestqt.qtbot import QtBot

from app.workers import garbage
from app.workers.garbage import GarbageCollector

ROOT = Path(__file__).resolve().parents[2]


class Knot:
    """Refers to itself, and notes in which thread it is freed."""

    def __init__(self, freed_in: list[int]) -> None:
        self.me = self
        self._freed_in = freed_in

    def __del__(self) -> None:
        self._freed_in.append(threading.get_ident())


@pytest.fixture
def collector(qtbot: QtBot) -> Iterator[GarbageCollector]:
    made = GarbageCollector()
    yield made
    made.close()
    made.deleteLater()
    qtbot.wait(10)


def allocate() -> None:
    """Enough for a collection of every generation, by Python's own thresholds."""
    kept = [[number] for number in range(200_000)]
    assert len(kept) == 200_000


def in_another_thread() -> None:
    worker = threading.Thread(target=allocate)
    worker.start()
    worker.join()


def test_another_thread_collects_nothing(collector: GarbageCollector) -> None:
    freed_in: list[int] = []
    for _ in range(1000):
        Knot(freed_in)
    in_another_thread()
    assert freed_in == []
    collector.look()
    assert set(freed_in) == {threading.get_ident()}


def test_everything_is_walked_through_now_and_then_only(
    collector: GarbageCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    walked: list[int] = []
    monkeypatch.setattr(garbage.gc, "collect", walked.append)
    monkeypatch.setattr(garbage.gc, "get_count", lambda: (10_000, 100, 100))
    collector.look()
    assert walked == [1]
    collector._full -= garbage.FULL_SECONDS
    collector.look()
    collector.look()
    assert walked == [1, 2, 1]


def test_python_does_it_again_afterwards(qtbot: QtBot) -> None:
    made = GarbageCollector()
    made.settle()
    assert not gc.isenabled()
    assert gc.get_freeze_count()
    made.close()
    assert gc.isenabled()
    assert not gc.get_freeze_count()


WINDOW = """
import sys, threading
from PySide6.QtCore import QCoreApplication, QObject, QTimer
from app.workers.garbage import GarbageCollector

class Model(QObject):
    def __init__(self):
        super().__init__()
        self.me = self
        self.timer = QTimer(self)
        self.timer.start(1)

application = QCoreApplication(sys.argv)
collector = GarbageCollector() if sys.argv[1] == "here" else None

def allocate():
    kept = [[number] for number in range(200_000)]

def round():
    for _ in range(20):
        Model()
    worker = threading.Thread(target=allocate)
    worker.start()
    worker.join()

rounds = QTimer()
rounds.timeout.connect(round)
rounds.start(5)
QTimer.singleShot(1500, application.quit)
sys.exit(application.exec())
"""


@pytest.mark.fault
def test_objects_in_cycles_beside_a_busy_thread_do_not_end_the_window() -> None:
    """Without the collector this dies of a segmentation fault, after "Timers cannot be stopped from another thread"."""
    ran = subprocess.run(
        [sys.executable, "-c", WINDOW, "here"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "QT_QPA_PLATFORM": "offscreen"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    assert "another thread" not in ran.stderr
