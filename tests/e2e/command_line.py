"""Run `weft` as a person does: a fresh process, its output, its exit status."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def weft(*arguments: str, stdin: str = "", timeout: float = 180) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "app", *arguments],
        cwd=ROOT,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )


def weft_json(*arguments: str, stdin: str = "") -> Any:
    """Run one command that must end well, and decode what it prints."""
    ended = weft(*arguments, "--json", stdin=stdin)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def interrupt_after(seconds: float, arguments: Sequence[str]) -> tuple[int, str, str]:
    """Start a command and press Ctrl+C once its answer has begun and some time passed. Exit status, stdout, stderr."""
    process = subprocess.Popen(
        [sys.executable, "-m", "app", *arguments],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        start_new_session=True,
        bufsize=0,  # what is read below is all that is taken from the pipe
    )
    assert process.stdout is not None
    first = process.stdout.read(1)
    time.sleep(seconds)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)
    return process.returncode, (first + out).decode(), err.decode()
