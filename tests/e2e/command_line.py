"""Run `weft` as a person does: a fresh process, its output, its exit status."""

from __future__ import annotations

import functools
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
QUESTION = "How do I add a LoRA?"
TURNS = ("what is a gguf file", QUESTION, "Who won the world cup?")


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


@functools.cache
def greedy(model: str, *more: str) -> dict[str, Any]:
    """`weft chat` on QUESTION at temperature 0: asked in a fresh process, and only once in a run of the tests."""
    return weft_json("chat", model, "-p", QUESTION, "--temperature", "0", *more)


def greedy_answer(model: str, *more: str) -> str:
    """What it says."""
    return greedy(model, *more)["text"]


@functools.cache
def greedy_turns(loader: str) -> list[dict[str, Any]]:
    """A conversation with `starter` over standard input, under a loader: TURNS and their answers, also only once."""
    return weft_json("chat", "starter", "--loader", loader, "--temperature", "0", stdin="\n".join(TURNS) + "\n")


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
    out, err = process.communicate(timeout=60)
    return process.returncode, (first + out).decode(), err.decode()
