"""A second start hands over to the first and goes; what a killed instance left behind does not matter."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pytestqt.qtbot import QtBot

from app.core.paths import default_paths
from app.workers.single_instance import SingleInstance, absolute

ROOT = Path(__file__).resolve().parents[2]


Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start windows; whatever still runs at the end is killed."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(*arguments: str) -> subprocess.Popen[bytes]:
        variables = os.environ | {
            "QT_QPA_PLATFORM": "offscreen",
            "PYTHONPATH": str(ROOT),
            "WEFT_PYTHON_CORE": sys.executable,
            "WEFT_PYTHON_LLAMACPP": sys.executable,
        }
        command = [sys.executable, "-m", "app", *arguments]
        started.append(subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()


def test_hand_over_between_objects(qtbot: QtBot, home: Path, start: Start) -> None:
    first = SingleInstance(default_paths())
    assert first.claim()
    first.listen()
    with qtbot.waitSignal(first.received, timeout=40_000) as received:
        later = start()
    assert received.args == [[]]
    assert later.wait(30) == 0
    first.release()


@pytest.mark.fault
def test_second_start_exits_and_its_file_arrives(home: Path, tmp_path: Path, start: Start) -> None:
    (home).mkdir(parents=True, exist_ok=True)
    (home / "settings.toml").write_text("load_last = false\n")
    model = tmp_path / "models of mine"
    model.mkdir()
    first = start()
    deadline = time.monotonic() + 60
    while not (home / "window.ini").exists() and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    second = start(str(model))
    assert second.wait(40) == 0
    while str(model) not in (home / "settings.toml").read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert str(model) in (home / "settings.toml").read_text(), "the first window took the folder"
    assert first.poll() is None
    first.kill()
    first.wait()
    # Its socket and lock lie there now; the next start is not kept out by them.
    third = start()
    time.sleep(2)
    assert third.poll() is None


def test_relative_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute(["a.gguf", "weft://open?x=1"]) == [str(tmp_path / "a.gguf"), "weft://open?x=1"]


def test_first_paint_imports_nothing_heavy(home: Path) -> None:
    code = (
        "import sys; from app import bootstrap;"
        "bad = [m for m in ('torch', 'transformers', 'peft', 'llama_cpp', 'numpy', 'psutil', 'sqlite3', 'app.house',"
        " 'app.backends', 'pygments', 'PySide6.QtNetwork', 'send2trash', 'huggingface_hub') if m in sys.modules];"
        "sys.exit(', '.join(bad) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode()
