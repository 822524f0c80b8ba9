"""Jobs: the queue of installations, progress, cancel, retry, the log that is followed; and the engines in Settings."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from PySide6.QtCore import QThread, Signal
from pytestqt.qtbot import QtBot

from app.core.errors import ErrorKind, WeftError
from app.core.jobs import JobState, Progress
from app.engine.environments import Environments, EnvironmentState
from app.store.jobs import JobStore
from app.viewmodels.jobs import INSTALL, JOB, PROGRESS, JobCenter, Pace, environment_of, progress_text
from app.viewmodels.library_roots import LibraryRoots
from app.viewmodels.settings import EngineList, SettingsView
from app.views.jobs.page import JobsPage
from app.views.log_view import LogView
from app.views.settings.page import SettingsPage
from tests.qt.shell_parts import Rooms


class Installation(QThread):
    """Stands for EnvironmentWorker: the same signals and job, an end on order instead of uv."""

    progress = Signal(object)
    log = Signal(str)
    finished_well = Signal()
    failed = Signal(object)

    def __init__(self, store: JobStore, name: str, log: Path) -> None:
        super().__init__()
        self.name, self.store = name, store
        self.job = store.create(
            INSTALL,
            f"Install {name}",
            parameters=msgspec.json.encode({"name": name, "repair": False}).decode(),
            log=str(log),
        )
        self.cancelled = False
        self.end = ""

    def cancel(self) -> None:
        self.cancelled = True

    def run(self) -> None:
        self.store.update(self.job.id, state=JobState.RUNNING)
        self.progress.emit(Progress(phase="Downloading torch", done=45e6, total=100e6, unit="bytes"))
        while not self.end and not self.cancelled:
            self.msleep(5)
        if self.cancelled:
            self.store.update(self.job.id, state=JobState.CANCELLED)
            error = WeftError(ErrorKind.CANCELLED, "Cancelled.")
        elif self.end == "well":
            self.store.update(self.job.id, state=JobState.DONE)
            error = None
        else:
            self.store.update(self.job.id, state=JobState.FAILED, message="No network.", hint="Retry.")
            error = WeftError(ErrorKind.NETWORK, "No network.", "Retry.")
        self.store.release()
        if error is None:
            self.finished_well.emit()
        else:
            self.failed.emit(error)


@pytest.fixture
def rooms(rooms: Rooms, monkeypatch: pytest.MonkeyPatch) -> Rooms:
    for name in ("WEFT_PYTHON_CORE", "WEFT_PYTHON_LLAMACPP"):
        monkeypatch.delenv(name, raising=False)  # here no engine is installed yet
    return rooms


class Yard:
    """A job center and the installations it made."""

    def __init__(self, rooms: Rooms) -> None:
        self.made: list[Installation] = []
        self.environments = Environments(rooms.paths.environments)
        self.log = rooms.paths.data / "install.log"

        def make(name: str, _repair: bool) -> Installation:
            worker = Installation(rooms.jobs, name, self.log)
            self.made.append(worker)
            return worker

        self.center = JobCenter(rooms.jobs, self.environments, make)
        rooms.closers.insert(0, self.center.close)


@pytest.fixture
def yard(rooms: Rooms) -> Yard:
    return Yard(rooms)


def test_installs_one_after_the_other(yard: Yard, qtbot: QtBot) -> None:
    center = yard.center
    center.install("core")
    center.install("llamacpp")
    center.install("core")  # under way already
    assert [worker.name for worker in yard.made] == ["core"]
    assert center.waiting == ["llamacpp"]
    with qtbot.waitSignal(center.environment_ready, timeout=20_000) as ready:
        yard.made[0].end = "well"
    assert ready.args == ["core"]
    qtbot.waitUntil(lambda: len(yard.made) == 2, timeout=20_000)
    with qtbot.waitSignal(center.environment_failed, timeout=20_000) as failed:
        yard.made[1].end = "badly"
    assert failed.args is not None
    assert failed.args[1].message == "No network."
    assert center.running is None


def test_closing_the_window_is_no_cancel(yard: Yard, rooms: Rooms) -> None:
    yard.center.install("core")
    yard.center.close()
    job = rooms.jobs.get(yard.made[0].job.id)
    assert job.state is JobState.CRASHED
    assert "goes on" in job.hint


def test_page_shows_progress_cancels_and_retries(yard: Yard, qtbot: QtBot) -> None:
    page = JobsPage(jobs=yard.center)
    qtbot.addWidget(page)
    page.show()
    assert page._stack.currentWidget() is page._empty
    yard.center.install("core")
    qtbot.waitUntil(
        lambda: "45.0 MB of 100 MB" in str(page.table.index(0, 2).data() if page.table.jobs else ""), timeout=20_000
    )
    assert page.cancel.isVisible()
    assert not page.retry.isVisible()
    page.cancel.click()
    qtbot.waitUntil(lambda: bool(page.table.jobs) and page.table.jobs[0].state is JobState.CANCELLED, timeout=20_000)
    assert page.retry.isVisible()
    page.retry.click()
    qtbot.waitUntil(lambda: len(page.table.jobs) == 2, timeout=20_000)
    assert environment_of(page.table.jobs[0]) == "core"
    yard.made[-1].end = "badly"
    qtbot.waitUntil(lambda: page.table.jobs[0].state is JobState.FAILED, timeout=20_000)
    assert page._problem.isVisible()
    assert page._problem.text.text() == "No network. Retry."
    page.remove.click()
    assert len(page.table.jobs) == 1


def test_log_is_followed(qtbot: QtBot, tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    view = LogView()
    qtbot.addWidget(view)
    view.show()
    view.show_log(path)
    path.write_text("first line\n")
    qtbot.waitUntil(lambda: "first line" in view.box.toPlainText(), timeout=20_000)
    with path.open("a") as file:
        file.write("second line\n")
    qtbot.waitUntil(lambda: "second line" in view.box.toPlainText(), timeout=20_000)
    path.write_text("new\n")
    qtbot.waitUntil(lambda: view.box.toPlainText() == "new", timeout=20_000)


def test_the_names_of_jobs_get_their_part_of_a_wide_window(yard: Yard, qtbot: QtBot) -> None:
    yard.center._store.create("merge", "Merge one model with one adapter")
    page = JobsPage(jobs=yard.center)
    qtbot.addWidget(page)
    page.resize(960, 600)
    page.show()
    narrow = page.view.columnWidth(JOB)
    page.resize(1440, 900)
    qtbot.waitUntil(lambda: page.view.columnWidth(JOB) > 1.3 * narrow)
    assert page.view.columnWidth(PROGRESS) > 400
    page.view.setColumnWidth(JOB, 300)  # a person drags it
    page.resize(1200, 900)
    qtbot.wait(20)
    assert page.view.columnWidth(JOB) == 300


def test_pace_and_words() -> None:
    now = [0.0]
    pace = Pace(lambda: now[0])
    for second in range(6):
        now[0] = float(second)
        pace.add(Progress(phase="x", done=10e6 * second, total=100e6, unit="bytes"))
    left = pace.left(Progress(phase="x", done=50e6, total=100e6, unit="bytes"))
    assert left == pytest.approx(5.0)
    text = progress_text(Progress(phase="Downloading", done=50e6, total=100e6, unit="bytes"), left)
    assert text == "Downloading · 50.0 MB of 100 MB · 5 s left"


def test_a_pause_does_not_slow_the_estimate_down() -> None:
    now, done = [0.0], 0.0
    pace = Pace(lambda: now[0])

    def work(seconds: int) -> Progress:
        nonlocal done
        for _ in range(seconds):
            now[0] += 1.0
            done += 1e6
            pace.add(Progress(phase="x", done=done, total=100e6, unit="bytes"))
        return Progress(phase="x", done=done, total=100e6, unit="bytes")

    assert pace.left(work(40)) == pytest.approx(60, rel=0.05)
    for _ in range(2):
        pace.hold(True)
        now[0] += 1.5
        at = Progress(phase="Paused", done=done, total=100e6, unit="bytes")
        pace.add(at)  # a task tells once more that it waits
        before = pace.left(at)
        now[0] += 3600
        pace.hold(True)  # said twice is held once
        assert pace.left(at) == before and before is not None
        pace.hold(False)
        pace.hold(False)
    assert pace.left(work(10)) == pytest.approx(50, rel=0.05)


def test_a_burst_does_not_promise_an_end_that_is_minutes_away() -> None:
    now = [0.0]
    pace = Pace(lambda: now[0])
    done = 0.0
    while done < 84e6:  # a minute of downloads, then everything is unpacked at once
        now[0] += 1.0
        done = min(84e6, done + (0.5e6 if now[0] < 60 else 20e6))
        pace.add(Progress(phase="x", done=done, total=100e6, unit="bytes"))
    left = pace.left(Progress(phase="x", done=84e6, total=100e6, unit="bytes"))
    assert left is not None and left > 10


def test_an_interrupted_installation_goes_on_in_one_row(yard: Yard, rooms: Rooms, qtbot: QtBot) -> None:
    page = JobsPage(jobs=yard.center)
    qtbot.addWidget(page)
    yard.center.install("core")
    qtbot.waitUntil(lambda: yard.center.running is not None and yard.center.running.progress is not None)
    yard.center.close()  # the window was closed meanwhile
    qtbot.waitUntil(lambda: yard.center.running is None)
    rooms.jobs.update(yard.made[0].job.id, state=JobState.CRASHED, message="Weft was closed meanwhile.")
    page.table.refresh()
    assert [job.state for job in page.table.jobs] == [JobState.CRASHED]
    yard.center.install("core")  # the next start goes on
    qtbot.waitUntil(lambda: len(yard.made) == 2)
    page.table.refresh()
    assert [job.id for job in page.table.jobs] == [yard.made[1].job.id]
    yard.made[1].end = "badly"
    qtbot.waitUntil(lambda: yard.center.running is None)
    yard.center.install("core")  # a failure is told, and stays listed
    page.table.refresh()
    assert len(page.table.jobs) == 2
    yard.made[2].end = "well"
    qtbot.waitUntil(lambda: yard.center.running is None)


def test_settings_page_engines_and_switches(yard: Yard, rooms: Rooms, qtbot: QtBot) -> None:
    engines = EngineList(yard.environments, yard.center)
    rooms.closers.insert(0, engines.close)
    page = SettingsPage(
        settings=SettingsView(rooms.settings),
        roots=LibraryRoots(rooms.settings, rooms.paths),
        engines=engines,
        paths=rooms.paths,
    )
    qtbot.addWidget(page)
    page.resize(900, 900)
    page.show()
    page.entered()
    card = page.engines.cards["core"]
    assert yard.environments.state("core") is EnvironmentState.MISSING
    assert card.install.isVisibleTo(page)
    assert not card.remove.isVisibleTo(page)
    card.install.click()
    qtbot.waitUntil(lambda: card.cancel.isVisibleTo(page), timeout=20_000)
    card.cancel.click()
    qtbot.waitUntil(lambda: card.install.isVisibleTo(page), timeout=20_000)
    page.appearance.setCurrentIndex(page.appearance.findData("dark"))
    assert rooms.settings.load().appearance == "dark"
