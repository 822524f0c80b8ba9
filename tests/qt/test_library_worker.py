"""The library's worker: finds what appears, forgets what goes, and never stalls the window."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PySide6.QtCore import QElapsedTimer, QObject, QThread, QTimer, Slot
from pytestqt.qtbot import QtBot

from app.core.errors import ErrorKind, WeftError
from app.core.roots import Root
from app.store.database import Database
from app.store.library import LibraryStore
from app.workers.library_worker import LibraryWorker
from tests.fakes.library_files import make_library, write_folder, write_gguf_model

Start = Callable[..., Any]


@pytest.fixture
def library(tmp_path: Path) -> Iterator[LibraryStore]:
    database = Database(tmp_path / "weft.sqlite")
    yield LibraryStore(database)
    database.close()


@pytest.fixture
def start(qtbot: QtBot, library: LibraryStore) -> Iterator[Start]:
    workers: list[LibraryWorker] = []

    def begin(*roots: Path) -> LibraryWorker:
        worker = LibraryWorker(library, [Root(path=str(root)) for root in roots])
        workers.append(worker)
        worker.recorder = Recorder(worker)  # type: ignore[attr-defined]  # before the first scan can begin
        worker.start()
        return worker

    yield begin
    for worker in workers:
        worker.stop()


class Recorder(QObject):
    """Keeps what a worker says, in the window's thread."""

    def __init__(self, worker: LibraryWorker) -> None:
        super().__init__()
        self.scans: list[bool] = []
        self.problems: list[WeftError] = []
        self.threads: set[QThread] = set()
        worker.scanning.connect(self.on_scanning)
        worker.problem.connect(self.on_problem)

    @Slot(bool)
    def on_scanning(self, on: bool) -> None:
        self.threads.add(QThread.currentThread())
        self.scans.append(on)

    @Slot(object)
    def on_problem(self, problem: WeftError) -> None:
        self.problems.append(problem)


def test_it_scans_at_start_and_tells(qtbot: QtBot, library: LibraryStore, start: Start, tmp_path: Path) -> None:
    make_library(tmp_path / "root", 9)
    worker = start(tmp_path / "root")
    recorder = worker.recorder
    qtbot.waitUntil(lambda: recorder.scans[-1:] == [False], timeout=20_000)
    assert library.count() == 6 and library.adapter_count() == 3
    assert recorder.threads == {QThread.currentThread()} and not recorder.problems


def test_it_sees_what_appears_changes_and_goes(
    qtbot: QtBot, library: LibraryStore, start: Start, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    start(root)
    write_gguf_model(root / "user" / "repo" / "new.gguf")
    qtbot.waitUntil(lambda: library.count() == 1, timeout=20_000)
    write_folder(root / "user" / "second")  # in a folder that was made after the watch began
    qtbot.waitUntil(lambda: library.count() == 2, timeout=20_000)
    shutil.rmtree(root / "user")
    qtbot.waitUntil(lambda: library.count() == 0, timeout=20_000)


@pytest.mark.fault
def test_a_file_that_is_still_being_written_heals(
    qtbot: QtBot, library: LibraryStore, start: Start, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    whole = write_gguf_model(tmp_path / "whole.gguf").read_bytes()
    root.mkdir()
    (root / "growing.gguf").write_bytes(whole[:-5000])
    start(root)
    qtbot.waitUntil(lambda: bool(library.models() and library.models()[0].problem), timeout=20_000)
    qtbot.wait(300)
    with (root / "growing.gguf").open("ab") as file:
        file.write(whole[-5000:])
    qtbot.waitUntil(lambda: not library.models()[0].problem, timeout=20_000)


def test_other_roots(qtbot: QtBot, library: LibraryStore, start: Start, tmp_path: Path) -> None:
    make_library(tmp_path / "a", 3)
    make_library(tmp_path / "b", 6)
    worker = start(tmp_path / "a")
    qtbot.waitUntil(lambda: library.count() == 2, timeout=20_000)
    worker.set_roots([Root(path=str(tmp_path / "b"))])
    qtbot.waitUntil(lambda: library.count() == 4 and library.roots() == [str(tmp_path / "b")], timeout=20_000)
    thread = threading.Thread(target=lambda: worker.set_roots([]))  # from any thread
    thread.start()
    thread.join()
    qtbot.waitUntil(lambda: library.count() == 0, timeout=20_000)


def test_refresh_finds_what_watching_cannot(qtbot: QtBot, library: LibraryStore, start: Start, tmp_path: Path) -> None:
    worker = start(tmp_path / "later")  # there is nothing to watch yet
    recorder = worker.recorder
    qtbot.waitUntil(lambda: recorder.scans[-1:] == [False], timeout=20_000)
    make_library(tmp_path / "later", 3)
    worker.refresh()
    qtbot.waitUntil(lambda: library.count() == 2, timeout=20_000)


@pytest.mark.fault
def test_problems_are_told_once(
    qtbot: QtBot, library: LibraryStore, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> object:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("app.core.scan.os.scandir", refuse)
    make_library(tmp_path / "root", 3)
    worker = start(tmp_path / "root")
    recorder = worker.recorder
    qtbot.waitUntil(lambda: recorder.scans.count(False) == 1, timeout=20_000)
    worker.refresh()
    qtbot.waitUntil(lambda: recorder.scans.count(False) == 2, timeout=20_000)
    assert [problem.kind for problem in recorder.problems] == [ErrorKind.PERMISSION]


@pytest.mark.fault
def test_a_full_disk_is_told_and_the_thread_lives(
    qtbot: QtBot, library: LibraryStore, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_library(tmp_path / "root", 3)
    real = LibraryStore.put

    def full(*_: object) -> None:
        raise WeftError(ErrorKind.DISK_FULL, "No room.", "Free some.")

    monkeypatch.setattr(LibraryStore, "put", full)
    worker = start(tmp_path / "root")
    recorder = worker.recorder
    qtbot.waitUntil(lambda: bool(recorder.problems), timeout=20_000)
    assert recorder.problems[0].kind is ErrorKind.DISK_FULL
    monkeypatch.setattr(LibraryStore, "put", real)
    worker.refresh()
    qtbot.waitUntil(lambda: library.count() == 2, timeout=20_000)


def test_it_stops_in_the_middle_of_a_scan(qtbot: QtBot, library: LibraryStore, start: Start, tmp_path: Path) -> None:
    make_library(tmp_path / "root", 300)
    worker = start(tmp_path / "root")
    recorder = worker.recorder
    qtbot.waitUntil(lambda: recorder.scans[:1] == [True], timeout=20_000)
    began = time.monotonic()
    worker.stop()
    assert time.monotonic() - began < 5 and worker.isFinished()


class Heart(QObject):
    """Beats every few milliseconds; remembers the longest time between two beats."""

    def __init__(self) -> None:
        super().__init__()
        self.gaps: list[float] = []
        self._clock = QElapsedTimer()
        self._timer = QTimer(self, interval=5)
        self._timer.timeout.connect(self.beat)

    def start(self) -> None:
        self._clock.start()
        self._timer.start()

    def stop(self) -> list[float]:
        self._timer.stop()
        return sorted(self.gaps)

    @Slot()
    def beat(self) -> None:
        self.gaps.append(self._clock.nsecsElapsed() / 1e6)
        self._clock.restart()


@pytest.mark.slow
def test_ten_thousand_entries_never_stall_the_window(
    qtbot: QtBot, library: LibraryStore, start: Start, tmp_path: Path
) -> None:
    make_library(tmp_path / "root", 10_000)
    for what in ("first scan", "scan of known files"):
        heart = Heart()
        heart.start()
        worker = start(tmp_path / "root")
        recorder = worker.recorder
        began = time.monotonic()
        qtbot.waitUntil(lambda recorder=recorder: recorder.scans[-1:] == [False], timeout=300_000)
        seconds = time.monotonic() - began
        gaps = heart.stop()
        worker.stop()
        print(
            f"{what}: {seconds:.1f} s, {len(gaps)} beats, p99.9 {gaps[int(len(gaps) * 0.999)]:.0f} ms, longest {gaps[-1]:.0f} ms"
        )
        assert gaps[int(len(gaps) * 0.999)] < 100
    assert library.count() + library.adapter_count() == 10_000
