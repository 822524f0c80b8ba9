"""The window is killed while it trains: the child ends with it, and in the next window the run goes on from its last checkpoint."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from app.core.recognise import recognise_adapter

pytestmark = [
    pytest.mark.fault,
    pytest.mark.skipif(
        not os.environ.get("WEFT_PYTHON_CORE"), reason="WEFT_PYTHON_CORE names no interpreter with PyTorch"
    ),
]
PATIENCE = 180.0


def told(events: Path) -> list[dict[str, Any]]:
    if not events.exists():
        return []
    return [json.loads(line) for line in events.read_text("utf-8").splitlines()]


def drive(events: Path, data: Path, mode: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "QT_QPA_PLATFORM": "offscreen", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.e2e.train_driver", str(events), str(data), mode]
    return subprocess.Popen(command, env=environment)


def wait_for(events: Path, what: str, count: int, process: subprocess.Popen[bytes]) -> list[dict[str, Any]]:
    deadline = time.monotonic() + PATIENCE
    while True:
        found = [event for event in told(events) if event["event"] == what]
        if len(found) >= count:
            return found
        assert process.poll() is None or what == "ended", told(events)
        assert time.monotonic() < deadline, told(events)
        time.sleep(0.05)


def test_a_killed_windows_training_goes_on_in_the_next(home: Path, tmp_path: Path) -> None:
    data, events = tmp_path / "robot.jsonl", tmp_path / "events"
    rows = [{"prompt": f"What is number {n}?", "completion": f"Beep. It is {n * 7}."} for n in range(60)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    steps = random.randint(5, 12)
    print(f"killed after step {steps}")
    window = drive(events, data, "begin")
    try:
        wait_for(events, "step", steps, window)
        children = psutil.Process(window.pid).children(recursive=True)
        assert children
    finally:
        window.send_signal(signal.SIGKILL)
        window.wait()
    _, alive = psutil.wait_procs(children, timeout=15)
    assert not alive, "the child trains on without a window"
    before = max(event["step"] for event in told(events) if event["event"] == "step")
    events.unlink()
    window = drive(events, data, "resume")
    try:
        (ended,) = wait_for(events, "ended", 1, window)
        assert window.wait(60) == 0
    finally:
        if window.poll() is None:
            window.kill()
    found = told(events)
    reopened = next(event for event in found if event["event"] == "reopened")
    assert "closed or killed" in reopened["words"] and reopened["resume"]
    first = next(event["step"] for event in found if event["event"] == "step")
    assert 3 < first <= before + 1 + 3, "it goes on from a checkpoint, not from the beginning"
    assert ended["ended"] == "stopped" and not ended["error"]
    made = recognise_adapter(Path(ended["adapter"]))
    assert made is not None and not made.problem
