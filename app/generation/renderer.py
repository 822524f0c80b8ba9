"""Renderer: the parent's side of the process that renders chat templates."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from app.core.errors import ErrorKind, WeftError

START_TIMEOUT = 30.0  # seconds that Python and jinja2 may take to start on a busy machine
COMPILE_TIMEOUT = 2.0
LONGEST_ANSWER = 128 * 1024 * 1024  # bytes of one JSON line; the child bounds the text itself at 16 M characters
PIPE_BUFFER = 16 * 1024  # bytes that a pipe takes without anybody reading, on every system
TEMPLATE_HINT = "Set the option chat_template to another template, or use the model with raw text."


class TemplateRefusal(WeftError):
    """The template does not take this conversation: a role or an order that it does not know, or a defect of its own."""


class Renderer:
    """Runs one template in a child that is kept alive between calls and killed when it takes too long.

    Not to be used by two threads at once.

    Args:
        source: the Jinja template.
    """

    def __init__(self, source: str) -> None:
        self._compile = json.dumps({"source": source, "cpu": COMPILE_TIMEOUT}).encode() + b"\n"
        self._child: subprocess.Popen[bytes] | None = None
        self._starting = False  # its greeting and its answer to `_compile` are not read yet

    def start(self) -> None:
        """Start the child and hand it the template, without waiting for either."""
        if self._child is not None:
            return
        kept = ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH", "TZ", "LANG", "LC_ALL")
        self._child = subprocess.Popen(
            [sys.executable, "-I", str(Path(__file__).with_name("render_host.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).resolve().parent,
            env={name: value for name, value in os.environ.items() if name in kept},
        )
        self._starting = True
        if len(self._compile) <= PIPE_BUFFER:
            self._send(self._compile)

    def wait_until_ready(self) -> None:
        """Wait for what `start` began, so that the first `render` need not. What is wrong with it, `render` says."""
        if self._child is not None and self._starting:
            with contextlib.suppress(WeftError):
                self._greet()

    def render(self, messages: list[dict[str, Any]], variables: dict[str, Any], seconds: float) -> str:
        """Render once. The time that starting and compiling take does not count.

        Raises:
            TemplateRefusal: the template raised, or failed on this conversation.
            WeftError: CORRUPT (no template), HOSTILE (it attacks, or does not end), ENVIRONMENT (no child).
        """
        self._ready()
        self._send(json.dumps({"messages": messages, "variables": variables, "cpu": seconds}).encode() + b"\n")
        return _text(self._answer(seconds))

    def render_many(
        self, conversations: list[tuple[list[dict[str, Any]], dict[str, Any]]], seconds: float
    ) -> list[str | WeftError | None]:
        """Render many conversations (messages and variables) in one go, which is much faster than one by one.

        Returns:
            For each its text; or the error that `render` would raise for it; or None when it was left for another call.

        Raises:
            WeftError: as `render`, where it concerns the template and not one conversation.
        """
        self._ready()
        many = [{"messages": messages, "variables": variables} for messages, variables in conversations]
        self._send(json.dumps({"many": many, "cpu": seconds}).encode() + b"\n")
        found: list[str | WeftError | None] = []
        for answer in self._answer(seconds)["many"]:
            if "error" not in answer:
                found.append(answer["text"])
            else:
                found.append(None if answer["kind"] == "skipped" else _failure(answer["kind"], answer["error"]))
        return found

    def _ready(self) -> None:
        if self._child is not None and self._child.poll() is not None:
            self.close()
        self.start()
        if self._starting:
            self._greet()

    def close(self) -> None:
        """End the child. The next `render` starts another."""
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        for pipe in (child.stdin, child.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except OSError:
                continue  # bytes that were not sent yet, for a child that is dead
        child.wait()

    def _greet(self) -> None:
        line, late = self._read(START_TIMEOUT)
        if not line:
            self.close()
            cause = f" within {START_TIMEOUT:g} seconds" if late else ""
            raise WeftError(
                ErrorKind.ENVIRONMENT,
                f"The process that renders chat templates did not start{cause}.",
                "Repair this loader's environment on the Settings page (it needs jinja2).",
            )
        if len(self._compile) > PIPE_BUFFER:
            self._send(self._compile)
        try:
            _text(self._answer(COMPILE_TIMEOUT))
        except WeftError:
            self.close()  # so that the next call says the same again
            raise
        self._starting = False

    def _answer(self, seconds: float) -> dict[str, Any]:
        line, late = self._read(seconds)
        if not line:
            self.close()
            raise WeftError(
                ErrorKind.HOSTILE,
                f"The model's chat template did not end within {seconds:.1f} seconds and was stopped."
                if late
                else "The model's chat template brought its renderer down.",
                TEMPLATE_HINT,
            )
        return json.loads(line)

    def _read(self, seconds: float) -> tuple[bytes, bool]:
        """One line, and whether the child had to be killed for it."""
        assert self._child is not None and self._child.stdout is not None
        with _Deadline(self._child, seconds) as deadline:
            line = self._child.stdout.readline(LONGEST_ANSWER)
        return (line if line.endswith(b"\n") else b""), deadline.passed

    def _send(self, line: bytes) -> None:
        assert self._child is not None and self._child.stdin is not None
        try:
            self._child.stdin.write(line)
            self._child.stdin.flush()
        except OSError:
            return  # it is dead; reading its answer tells


class _Deadline:
    """Kills a child unless the block ends in time. A kill ends a blocking read on every system."""

    def __init__(self, child: subprocess.Popen[bytes], seconds: float) -> None:
        self.passed = False
        self._child = child
        self._timer = threading.Timer(max(0.0, seconds), self._kill)
        self._timer.daemon = True

    def _kill(self) -> None:
        self.passed = True
        self._child.kill()

    def __enter__(self) -> _Deadline:
        self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        self._timer.join()


def remaining(ends: float) -> float:
    """Seconds until a moment of time.monotonic, at least a hundredth."""
    return max(0.01, ends - time.monotonic())


def _text(answer: dict[str, Any]) -> str:
    if "error" in answer:
        raise _failure(answer["kind"], answer["error"])
    return answer["text"]


def _failure(kind: str, error: str) -> WeftError:
    if kind == "raised":
        return TemplateRefusal(
            ErrorKind.BAD_INPUT, f"The model's chat template refuses this conversation: {error}", TEMPLATE_HINT
        )
    if kind == "syntax":
        return WeftError(ErrorKind.CORRUPT, f"The model's chat template is damaged: {error}.", TEMPLATE_HINT)
    if kind == "security":
        return WeftError(
            ErrorKind.HOSTILE,
            f"The model's chat template tries what it must not ({error}) and was stopped.",
            TEMPLATE_HINT,
        )
    if kind == "memory":
        return WeftError(ErrorKind.HOSTILE, f"The model's chat template was stopped: {error}.", TEMPLATE_HINT)
    return TemplateRefusal(ErrorKind.BAD_INPUT, f"The model's chat template fails: {error}", TEMPLATE_HINT)
