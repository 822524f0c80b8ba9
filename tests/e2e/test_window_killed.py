"""The real window, the real starter model, llama.cpp: killed in the middle of an answer, and on a disk that is full."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from app.core.conversation import StoredMessage
from app.core.paths import default_paths
from app.store.chats import ChatStore
from app.store.database import Database
from tests.e2e.command_line import ROOT
from tests.e2e.window_driver import QUESTION

ENGINE_GONE = 2.0  # seconds after the window's death
LOST = 1.0  # seconds of an answer that a kill may cost, at most

pytestmark = [
    pytest.mark.fault,
    pytest.mark.skipif(
        not os.environ.get("WEFT_PYTHON_LLAMACPP"),
        reason="WEFT_PYTHON_LLAMACPP names no interpreter with llama-cpp-python",
    ),
]


class Window:
    """A window in a process of its own, and what it told until now."""

    def __init__(self, folder: Path, mode: str) -> None:
        self._events = folder / f"{mode}-{time.time_ns()}.jsonl"
        self._events.touch()
        self._log = (folder / f"{mode}.log").open("ab")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.window_driver", str(self._events), mode],
            cwd=ROOT,
            env={**os.environ, "QT_QPA_PLATFORM": "offscreen", "WEFT_PYTHON_CORE": sys.executable},
            stdout=self._log,
            stderr=self._log,
        )

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = self._events.read_text("utf-8").splitlines(keepends=True)
        found = [json.loads(line) for line in lines if line.endswith("\n")]
        return [event for event in found if event["event"] == name]

    def received(self, until: float = float("inf")) -> str:
        """The answer as the window had it at a time."""
        return "".join(event["text"] for event in self.events("received") if event["at"] <= until)

    def wait_for(self, what: Callable[[], object], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert self.process.poll() is None, f"the window ended: {Path(self._log.name).read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"waited in vain; {self._events.read_text()[-2000:]}"
            time.sleep(0.02)

    def kill(self) -> float:
        """SIGKILL, as the system does it when memory runs out. Returns when; all its children must be gone soon after."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        assert family, "no engine runs"
        self.process.kill()
        at = time.time()
        self.process.wait()
        deadline = time.monotonic() + ENGINE_GONE
        while (left := [one for one in family if _alive(one)]) and time.monotonic() < deadline:
            time.sleep(0.01)
        print(f"children {len(family)}, gone after {time.time() - at:.2f} s (at most {ENGINE_GONE:g})")
        assert not left, f"still there {ENGINE_GONE:g} s later: {left}"
        return at

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._log.close()


def _alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def open_window(tmp_path: Path, home: Path) -> Iterator[Callable[[str], Window]]:
    opened: list[Window] = []

    def start(mode: str) -> Window:
        paths = default_paths()
        paths.settings.parent.mkdir(parents=True, exist_ok=True)
        paths.settings.write_text("load_last = false\n")
        opened.append(Window(tmp_path, mode))
        return opened[-1]

    yield start
    for window in opened:
        window.close()


def stored() -> list[StoredMessage]:
    """The messages of the newest chat, as a fresh process reads them."""
    database = Database(default_paths().database)
    try:
        assert not database.notice, database.notice
        store = ChatStore(database)
        return store.messages(store.conversations()[0].id)
    finally:
        database.close()


def reopen(open_window: Callable[[str], Window], answer: str) -> None:
    """Start Weft again: the chat is shown as it was saved, a new one is answered, and it closes in peace."""
    again = open_window("reopen")
    again.wait_for(lambda: again.events("reopened"))
    assert again.events("reopened")[0]["texts"] == [QUESTION, answer]
    again.wait_for(lambda: again.events("finished"))
    assert "LoRA" in again.received() and not again.events("failed")
    assert again.process.wait(timeout=20) == 0
    question, reply = stored()
    assert question.content == "How do I add a LoRA?" and reply.content == again.received() and reply.complete


def test_a_window_that_is_killed_in_the_middle_of_an_answer(open_window: Callable[[str], Window]) -> None:
    window = open_window("stream")
    window.wait_for(lambda: window.received())
    begun = time.time()
    window.wait_for(lambda: time.time() > begun + 3)
    at = window.kill()
    question, answer = stored()
    all_of_it, kept = window.received(), window.received(at - LOST)
    print(
        f"received {len(all_of_it)} characters, {len(kept)} of them {LOST:g} s before the kill; stored {len(answer.content)}"
    )
    assert len(kept) > 20, "it did not stream for long enough"
    assert question.content == QUESTION and not answer.complete
    assert answer.content.startswith(kept) and all_of_it.startswith(answer.content)
    reopen(open_window, answer.content)


@pytest.fixture
def small_disk(home: Path) -> Iterator[Path]:
    """WEFT_HOME on a disk of its own, of 24 MiB."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("only root may mount a small disk to fill")
    home.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "weft-test", str(home)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    yield home
    subprocess.run(["umount", "--lazy", str(home)], check=True)


def fill(disk: Path) -> Path:
    """Leave no room at all."""
    filler = disk / "filler"
    with filler.open("ab", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError:
                continue
    return filler


def test_a_disk_that_fills_up_in_the_middle_of_an_answer(
    small_disk: Path, open_window: Callable[[str], Window]
) -> None:
    window = open_window("stream")
    window.wait_for(lambda: len(window.received()) > 200)
    filled = time.time()
    filler = fill(small_disk)
    window.wait_for(lambda: window.events("failed"), 20)
    problem = window.events("failed")[0]
    assert problem["kind"] == "disk_full" and "no room" in problem["message"]
    assert len(window.events("failed")) == 1, "it is said once"
    before = len(window.received())
    window.wait_for(lambda: len(window.received()) > before + 50, 20)  # the answer goes on, in memory

    filler.unlink()  # there is room again: what waited is saved
    room = time.time()
    window.wait_for(lambda: time.time() > room + 2)
    (_, answer), kept = stored(), window.received(time.time() - LOST)
    assert kept and answer.content.startswith(kept), "what came while the disk was full is saved"

    filled = time.time()
    filler = fill(small_disk)
    window.wait_for(lambda: len(window.events("failed")) == 2, 20)
    window.kill()
    filler.unlink()  # somebody made room before the next start
    _, answer = stored()
    kept = window.received(filled - LOST)
    print(f"received {len(kept)} characters until {LOST:g} s before the disk was full; stored {len(answer.content)}")
    assert answer.content.startswith(kept) and window.received().startswith(answer.content)
    reopen(open_window, answer.content)
