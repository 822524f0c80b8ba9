"""An installation as a job: signals, the store, cancellation."""

from __future__ import annotations

import os
import shlex
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest
from PySide6.QtCore import QObject, Slot
from pytestqt.qtbot import QtBot

from app.core.errors import ErrorKind, WeftError
from app.core.jobs import JobState, Progress
from app.engine.environments import Environments, EnvironmentState
from app.engine.package_sources import Sources
from app.store.database import Database
from app.store.jobs import JobStore
from app.workers.environment_worker import TASK, EnvironmentWorker

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(os.name == "nt", reason="the fake uv is a POSIX script")

DEFINITION = """
title = "Thing"
summary = "For tests."
bytes = 1000
minutes = 1
python = ["3.11", "3.99"]
probe = "pass"

[[layers]]
name = "base"
title = "the base"
requirements = ["one==1"]
"""


class Ears(QObject):
    """Receives in the window's thread, and notes in which it did."""

    def __init__(self, worker: EnvironmentWorker) -> None:
        super().__init__()
        self.progress: list[Progress] = []
        self.lines: list[str] = []
        self.ends: list[WeftError | None] = []
        self.threads: set[int] = set()
        worker.progress.connect(self.on_progress)
        worker.log.connect(self.on_log)
        worker.finished_well.connect(self.on_well)
        worker.failed.connect(self.on_failed)

    @Slot(object)
    def on_progress(self, progress: Progress) -> None:
        self.progress.append(progress)
        self.threads.add(threading.get_ident())

    @Slot(str)
    def on_log(self, line: str) -> None:
        self.lines.append(line)

    @Slot()
    def on_well(self) -> None:
        self.ends.append(None)

    @Slot(object)
    def on_failed(self, error: WeftError) -> None:
        self.ends.append(error)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    fake = ROOT / "tests" / "fakes" / "fake_uv.py"
    words = " ".join(shlex.quote(str(part)) for part in (sys.executable, fake, tmp_path))
    (tmp_path / "uv").write_text(f'#!/bin/sh\nexec {words} "$@"\n')
    (tmp_path / "uv").chmod(0o755)
    (tmp_path / "definitions").mkdir()
    (tmp_path / "definitions" / "thing.toml").write_text(DEFINITION)
    monkeypatch.setenv("WEFT_UV", str(tmp_path / "uv"))
    monkeypatch.setattr("app.engine.environment_install.package_sources", lambda: Sources(variables={}))
    return tmp_path


@pytest.fixture
def environments(folder: Path) -> Environments:
    return Environments(folder / "environments", (folder / "definitions",))


@pytest.fixture
def jobs(folder: Path):
    database = Database(folder / "weft.sqlite")
    yield JobStore(database)
    database.close()


def test_an_installation_is_a_job_that_ends_well(qtbot: QtBot, environments: Environments, jobs: JobStore) -> None:
    worker = EnvironmentWorker(environments, "thing", jobs)
    assert worker.job.state is JobState.QUEUED
    ears = Ears(worker)
    with qtbot.waitSignal(worker.finished, timeout=30_000):
        worker.start()
    qtbot.waitUntil(lambda: ears.ends == [None])
    assert environments.state("thing") is EnvironmentState.READY
    assert ears.progress
    assert ears.threads == {threading.get_ident()}
    assert any("one==1" in line for line in ears.lines)
    job = jobs.get(worker.job.id)
    assert (job.task, job.title, job.state) == (TASK, "Install Thing", JobState.DONE)
    assert job.started <= job.ended
    assert msgspec.json.decode(job.parameters) == {"name": "thing", "repair": False}
    assert "one==1" in Path(job.log).read_text()


@pytest.mark.fault
def test_cancelling_ends_it_within_seconds_and_the_job_says_so(
    qtbot: QtBot, folder: Path, environments: Environments, jobs: JobStore
) -> None:
    (folder / "plan.json").write_text('{"one==1": {"sleep": 60}}')
    worker = EnvironmentWorker(environments, "thing", jobs)
    ears = Ears(worker)
    worker.start()
    qtbot.waitUntil(lambda: any("one==1" in line for line in ears.lines), timeout=20_000)
    assert jobs.get(worker.job.id).state is JobState.RUNNING
    started = time.monotonic()
    with qtbot.waitSignal(worker.finished, timeout=20_000):
        worker.cancel()
    assert time.monotonic() - started < 8
    qtbot.waitUntil(lambda: len(ears.ends) == 1)
    assert ears.ends[0] is not None
    assert ears.ends[0].kind is ErrorKind.CANCELLED
    assert jobs.get(worker.job.id).state is JobState.CANCELLED
    assert environments.state("thing") is EnvironmentState.INCOMPLETE


@pytest.mark.fault
def test_a_failure_reaches_the_window_and_the_store(
    qtbot: QtBot, folder: Path, environments: Environments, jobs: JobStore
) -> None:
    (folder / "plan.json").write_text('{"one==1": {"fail": "error: Connection refused"}}')
    worker = EnvironmentWorker(environments, "thing", jobs)
    ears = Ears(worker)
    with qtbot.waitSignal(worker.finished, timeout=30_000):
        worker.start()
    qtbot.waitUntil(lambda: len(ears.ends) == 1)
    job = jobs.get(worker.job.id)
    assert job.state is JobState.FAILED
    assert "Connection refused" in job.message
    assert job.hint


@pytest.mark.fault
def test_a_defect_of_ours_is_told_too(
    qtbot: QtBot, environments: Environments, jobs: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr(environments, "install", broken)
    worker = EnvironmentWorker(environments, "thing", jobs)
    ears = Ears(worker)
    with qtbot.waitSignal(worker.finished, timeout=30_000):
        worker.start()
    qtbot.waitUntil(lambda: len(ears.ends) == 1)
    assert ears.ends[0] is not None
    assert ears.ends[0].kind is ErrorKind.INTERNAL
    assert jobs.get(worker.job.id).state is JobState.FAILED
