"""What every test gets: a home of its own, and a check that it leaves no thread and no process behind."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests import seeds

_GRACE = 20.0  # seconds that what is ending may take to end; only a test that fails takes them
# Helpers of the standard library and of native libraries that live as long as the interpreter, by design.
_FOR_LIFE = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if sys.platform.startswith("linux"):
    os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
# Who starts the tests in the background of a shell has Ctrl+C ignored, by all children too: some tests press it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> str:
    return f"random numbers: WEFT_TEST_RUN={seeds.RUN} repeats them"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    seeds.begin(item.nodeid)


@pytest.fixture
def seed() -> int:
    """What a test makes its random models, adapters and files of."""
    return seeds.given()


@pytest.fixture(autouse=True)
def collected_here() -> Iterator[None]:
    """Cycles are collected in this thread, after each test: Qt's objects do not survive being freed in a worker's.

    The window does the same (`app.workers.garbage`); without it a test's leftovers end some later test with a segmentation fault.
    """
    if "PySide6.QtCore" not in sys.modules:
        yield
        return
    from PySide6.QtCore import QCoreApplication, QEvent

    if gc.isenabled():
        gc.disable()
        gc.freeze()  # modules and test items: what stays is not walked through after every test
    yield
    if QCoreApplication.instance() is not None:
        QCoreApplication.sendPostedEvents(None, int(QEvent.Type.DeferredDelete.value))
    gc.collect()


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A WEFT_HOME of this test alone; the user's models, caches and keys are out of reach."""
    folder = tmp_path_factory.mktemp("home", numbered=True)
    monkeypatch.setenv("WEFT_HOME", str(folder / "weft"))
    monkeypatch.delenv("WEFT_ENVIRONMENTS", raising=False)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    monkeypatch.setenv("HF_HOME", str(folder / "hugging face"))
    for name in ("HF_TOKEN", "HF_HUB_CACHE", "OLLAMA_MODELS", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    return folder / "weft"


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest, home: Path) -> Iterator[None]:
    """Fail a test that leaves a thread, a QThread or a child process running."""
    threads_before = set(threading.enumerate())
    processes_before = {process.pid for process in _children()}
    qthreads = _watch_qthreads(request)
    yield
    if request.node.get_closest_marker("leaves_behind"):
        return
    left = _wait_until_empty(
        lambda: [
            *(f"thread {thread.name!r}" for thread in _threads() if thread not in threads_before),
            *(f"process {_words(process)}" for process in _children() if process.pid not in processes_before),
            *qthreads(),
        ]
    )
    if left:
        for process in _children():
            if process.pid not in processes_before:
                process.kill()  # so that the next test starts from nothing
        pytest.fail("left behind: " + "; ".join(left), pytrace=False)


def _threads() -> list[threading.Thread]:
    # A thread that Python did not start (a QThread, a native pool) shows as a dummy, for ever: QThreads are watched apart.
    return [t for t in threading.enumerate() if t.is_alive() and not isinstance(t, threading._DummyThread)]


def _children() -> list[psutil.Process]:
    children: list[psutil.Process] = []
    for process in psutil.Process().children(recursive=True):
        try:
            alive = process.status() != psutil.STATUS_ZOMBIE
            if alive and not any(mark in " ".join(process.cmdline()) for mark in _FOR_LIFE):
                children.append(process)
        except psutil.Error:
            continue
    return children


def _words(process: psutil.Process) -> str:
    try:
        return f"{process.pid} ({' '.join(process.cmdline())[:160]})"
    except psutil.Error:
        return str(process.pid)


def _wait_until_empty(left: Callable[[], list[str]]) -> list[str]:
    deadline = time.monotonic() + _GRACE
    while (now := left()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return now


def _watch_qthreads(request: pytest.FixtureRequest) -> Callable[[], list[str]]:
    """Remember every QThread that a test starts; the function returned names those that still run."""
    if "PySide6.QtCore" not in sys.modules:
        return list
    from PySide6.QtCore import QThread

    monkeypatch = request.getfixturevalue("monkeypatch")
    started: list[QThread] = []
    original = QThread.start

    def start(thread: QThread, *arguments: object) -> None:
        started.append(thread)
        original(thread, *arguments)

    monkeypatch.setattr(QThread, "start", start)

    def running() -> list[str]:
        found: list[str] = []
        for thread in started:
            try:
                if thread.isRunning():
                    found.append(f"QThread {type(thread).__name__} {thread.objectName()!r}")
            except RuntimeError:
                continue  # its C++ half is gone, so it has ended
        return found

    return running
