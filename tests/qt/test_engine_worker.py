"""The worker: signals in the window's thread, in order, never faster than the window takes them."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from PySide6.QtCore import QObject, QThread, Slot
from pytestqt.qtbot import QtBot

from app.core.errors import ErrorKind, WeftError
from app.engine import protocol
from app.engine.client import EngineExit
from app.workers.engine_worker import EngineWorker
from tests.fakes.fake_engine import Problem, Script, fake_client, fake_model


class Window(QObject):
    """Notes every signal, with the thread that it came in."""

    def __init__(self, worker: EngineWorker) -> None:
        super().__init__()
        self.worker = worker
        self.seen: list[tuple[object, ...]] = []
        self.threads: set[QThread] = set()
        self.pause = 0.0  # how long each batch of tokens takes to draw
        worker.ready.connect(self.on_ready)
        worker.loaded.connect(self.on_loaded)
        worker.tokens.connect(self.on_tokens)
        worker.progress.connect(self.on_progress)
        worker.done.connect(self.on_done)
        worker.failed.connect(self.on_failed)
        worker.log.connect(self.on_log)
        worker.responsive.connect(self.on_responsive)
        worker.exited.connect(self.on_exited)

    def note(self, *what: object) -> None:
        self.threads.add(QThread.currentThread())
        self.seen.append(what)

    @Slot(object)
    def on_ready(self, event: object) -> None:
        self.note("ready", event)

    @Slot(object)
    def on_loaded(self, event: object) -> None:
        self.note("loaded", event)

    @Slot(int, str, int)
    def on_tokens(self, command: int, text: str, count: int) -> None:
        self.note("tokens", command, text, count)
        time.sleep(self.pause)

    @Slot(int, object)
    def on_progress(self, command: int, progress: object) -> None:
        self.note("progress", command, progress)

    @Slot(int, object)
    def on_done(self, command: int, result: object) -> None:
        self.note("done", command, result)

    @Slot(int, object)
    def on_failed(self, command: int, error: object) -> None:
        self.note("failed", command, error)

    @Slot(str, str)
    def on_log(self, level: str, text: str) -> None:
        self.note("log", level, text)

    @Slot(bool)
    def on_responsive(self, responsive: bool) -> None:
        self.note("responsive", responsive)

    @Slot(object)
    def on_exited(self, exit: object) -> None:
        self.note("exited", exit)

    def of(self, kind: str) -> list[tuple[object, ...]]:
        return [entry[1:] for entry in self.seen if entry[0] == kind]

    def text(self, command: int) -> str:
        return "".join(str(text) for number, text, _ in self.of("tokens") if number == command)

    def ended(self, command: int) -> bool:
        return any(entry[0] == command for entry in self.of("done") + self.of("failed"))


@pytest.fixture
def window(qtbot: QtBot, tmp_path: Path) -> Iterator[Callable[..., Window]]:
    made: list[Window] = []

    def make(start: bool = True, **script: object) -> Window:
        window = Window(EngineWorker(fake_client(tmp_path, Script(**script))))  # type: ignore[arg-type]
        made.append(window)
        if start:
            window.worker.send(protocol.Load(model=fake_model()))
            window.worker.start()
        return window

    yield make
    for window in made:
        started = time.monotonic()
        window.worker.stop()
        assert time.monotonic() - started < 2
        assert window.worker.isFinished() or not window.worker.isRunning()


def words(count: int) -> str:
    return "".join(f"word{number} " for number in range(count))


def test_load_and_answer_in_order_in_the_windows_thread(qtbot: QtBot, window: Callable[..., Window]) -> None:
    w = window(load_seconds=0.2, prompt_seconds=0.1, tokens=50, rate=500)
    number = w.worker.send(protocol.Generate(prompt="x"))
    qtbot.waitUntil(lambda: w.ended(number), timeout=20_000)
    assert w.threads == {QThread.currentThread()}
    kinds = [str(entry[0]) for entry in w.seen]
    assert kinds[0] == "ready" and kinds[-1] == "done"
    order = list(dict.fromkeys(kinds))
    assert order == ["ready", "progress", "loaded", "done", "tokens"]
    assert w.text(number) == words(50)
    result = w.of("done")[-1][1]
    assert isinstance(result, protocol.Generated) and result.tokens == 50
    assert sum(int(str(count)) for _, _, count in w.of("tokens")) == 50


def test_a_busy_window_gets_few_signals_and_the_whole_text(qtbot: QtBot, window: Callable[..., Window]) -> None:
    w = window(tokens=3000, rate=3000)
    w.pause = 0.15  # ten times what a batch takes to come
    number = w.worker.send(protocol.Generate(prompt="x"))
    qtbot.waitUntil(lambda: w.ended(number), timeout=20_000)
    assert w.text(number) == words(3000)
    assert len(w.of("tokens")) <= 3000 / 3000 / 0.15 + 6
    assert [entry[0] for entry in w.seen][-1] == "done"


def test_a_window_that_does_not_look_at_all_gets_everything_in_one_piece(
    qtbot: QtBot, window: Callable[..., Window]
) -> None:
    w = window(tokens=2000, rate=4000)
    qtbot.waitUntil(lambda: w.ended(1), timeout=20_000)
    number = w.worker.send(protocol.Generate(prompt="x"))
    time.sleep(1.5)  # the event loop stands still
    assert not w.of("tokens")
    qtbot.waitUntil(lambda: w.ended(number), timeout=20_000)
    assert w.text(number) == words(2000)
    assert len(w.of("tokens")) <= 2  # the first, and the rest


def test_cancel(qtbot: QtBot, window: Callable[..., Window]) -> None:
    w = window(tokens=10_000, rate=100)
    number = w.worker.send(protocol.Generate(prompt="x"))
    qtbot.waitUntil(lambda: bool(w.of("tokens")), timeout=20_000)
    w.worker.cancel(number)
    qtbot.waitUntil(lambda: w.ended(number), timeout=3000)
    result = w.of("done")[-1][1]
    assert isinstance(result, protocol.Generated) and result.finish_reason == "cancelled"
    assert w.text(number) == words(result.tokens)


def test_a_failure_comes_as_an_error_after_the_text(qtbot: QtBot, window: Callable[..., Window]) -> None:
    w = window(fail_at=7, fail_with=Problem(message="Token 7 is bad.", hint="Skip it."))
    number = w.worker.send(protocol.Generate(prompt="x"))
    qtbot.waitUntil(lambda: w.ended(number), timeout=20_000)
    error = w.of("failed")[-1][1]
    assert isinstance(error, WeftError) and error.hint == "Skip it." and w.text(number) == words(7)
    again = w.worker.send(protocol.Generate(prompt="x"))
    qtbot.waitUntil(lambda: w.ended(again), timeout=20_000)


@pytest.mark.fault
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX")
def test_a_death_fails_every_command_and_then_says_how(qtbot: QtBot, window: Callable[..., Window]) -> None:
    w = window(tokens=10_000, rate=100)
    first = w.worker.send(protocol.Generate(prompt="x"))
    second = w.worker.send(protocol.Generate(prompt="y"))
    qtbot.waitUntil(lambda: bool(w.of("tokens")), timeout=20_000)
    processes = psutil.Process(w.worker.client.pid).children(recursive=True)
    before = w.text(first)
    os.kill(w.worker.client.pid, signal.SIGKILL)
    qtbot.waitUntil(lambda: bool(w.of("exited")), timeout=5000)
    assert [number for number, _ in w.of("failed")] == [first, second]
    assert w.text(first).startswith(before)
    exit = w.of("exited")[0][0]
    assert isinstance(exit, EngineExit) and exit.crashed and exit.signal == "SIGKILL"
    assert [entry[0] for entry in w.seen][-1] == "exited"
    assert w.worker.wait(5000)
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)
    with pytest.raises(WeftError):
        w.worker.send(protocol.Generate(prompt="z"))


@pytest.mark.fault
@pytest.mark.skipif(sys.platform == "win32", reason="SIGSTOP is POSIX")
def test_a_stopped_engine_is_shown_and_can_be_killed(qtbot: QtBot, window: Callable[..., Window]) -> None:
    w = window(hang_at=3, hang="stop")
    number = w.worker.send(protocol.Generate(prompt="x"))
    qtbot.waitUntil(lambda: w.of("responsive") == [(False,)], timeout=10_000)
    w.worker.kill()
    qtbot.waitUntil(lambda: bool(w.of("exited")), timeout=5000)
    error = dict(w.of("failed"))[number]  # type: ignore[arg-type]
    assert isinstance(error, WeftError) and error.kind is ErrorKind.CANCELLED


@pytest.mark.fault
def test_stopping_in_the_middle_of_a_hanging_answer_takes_less_than_two_seconds(
    qtbot: QtBot, window: Callable[..., Window]
) -> None:
    w = window(hang_at=3, hang="gil")
    w.worker.send(protocol.Generate(prompt="x"))
    qtbot.waitUntil(lambda: bool(w.of("tokens")), timeout=20_000)
    # The fixture stops the worker, with a clock beside it.


def test_a_worker_that_never_started_can_be_stopped(qtbot: QtBot, window: Callable[..., Window]) -> None:
    w = window(start=False)
    w.worker.stop()
    w.worker.start()  # too late: it ends at once, and says so
    qtbot.waitUntil(lambda: bool(w.of("exited")), timeout=5000)
    assert w.worker.client.pid == 0


def test_an_engine_that_cannot_start_says_why(qtbot: QtBot, window: Callable[..., Window]) -> None:
    w = window(start=False)
    w.worker.client.python = Path("/nowhere/python")
    number = w.worker.send(protocol.Load(model=fake_model()))
    w.worker.start()
    qtbot.waitUntil(lambda: bool(w.of("exited")), timeout=20_000)
    error = dict(w.of("failed"))[number]  # type: ignore[arg-type]
    assert isinstance(error, WeftError) and error.kind is ErrorKind.ENVIRONMENT and error.hint
    assert w.worker.wait(5000)


def test_a_defect_of_the_worker_does_not_vanish(
    qtbot: QtBot, window: Callable[..., Window], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(EngineWorker, "_pass_on", broken)
    w = window()
    qtbot.waitUntil(lambda: bool(w.of("exited")), timeout=20_000)
    exit = w.of("exited")[0][0]
    assert isinstance(exit, EngineExit) and exit.error.kind is ErrorKind.INTERNAL and "a defect" in exit.error.message
    assert "ZeroDivisionError" in exit.log_tail


def test_sending_does_not_wait(qtbot: QtBot, window: Callable[..., Window]) -> None:
    w = window(hang_at=0, hang="native")
    started = time.monotonic()
    for _ in range(100):
        w.worker.cancel(w.worker.send(protocol.Generate(prompt="x" * 100_000)))
    assert time.monotonic() - started < 1


class RowsWindow(QObject):
    """Notes the rows of a batch, slowly."""

    def __init__(self, worker: EngineWorker) -> None:
        super().__init__()
        self.texts: dict[int, list[str]] = {}
        self.plain: list[str] = []
        self.ends: list[object] = []
        worker.row_tokens.connect(self.on_row)
        worker.tokens.connect(self.on_tokens)
        worker.done.connect(self.on_done)

    @Slot(int, int, str, int)
    def on_row(self, command: int, row: int, text: str, count: int) -> None:
        self.texts.setdefault(row, []).append(text)
        time.sleep(0.03)

    @Slot(int, str, int)
    def on_tokens(self, command: int, text: str, count: int) -> None:
        self.plain.append(text)

    @Slot(int, object)
    def on_done(self, command: int, result: object) -> None:
        self.ends.append(result)


def test_rows_of_a_batch_come_apart_whole_and_put_together(qtbot: QtBot, tmp_path: Path) -> None:
    worker = EngineWorker(fake_client(tmp_path, Script(tokens=400, rate=1000)))
    window = RowsWindow(worker)
    worker.start()
    try:
        worker.send(protocol.Load(model=fake_model()))
        rows = tuple(protocol.BatchRow(prompt="x") for _ in range(3))
        worker.send(protocol.GenerateBatch(rows=rows))
        worker.send(protocol.Generate(prompt="x"))
        qtbot.waitUntil(lambda: len(window.ends) == 3, timeout=20_000)
    finally:
        worker.stop()
    words = [f"word{number} " for number in range(400)]
    assert {row: "".join(texts) for row, texts in window.texts.items()} == {
        row: "".join(words[: 400 - row]) for row in range(3)
    }
    assert "".join(window.plain) == "".join(words), "an answer of its own is no row"
    assert all(len(texts) < 200 for texts in window.texts.values()), "a busy window gets fewer, longer pieces"
    assert isinstance(window.ends[1], protocol.GeneratedBatch)
