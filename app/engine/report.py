"""The child's way out: one writer that never interleaves, and a Report that thins out what a backend says.

Tokens leave in batches of at most one event every 16 ms, Progress at most 30 times a second. Both leave at
once when nothing left shortly before, so the first token of a generation is never held back. What is held
back is sent by one thread that sleeps in a queue: no timer spins beside a decode loop.
"""

from __future__ import annotations

import math
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Literal

import msgspec

from app.core.errors import ErrorKind, WeftError
from app.engine.failures import describe
from app.engine.protocol import MAX_LINE, Done, Event, Failed, Loaded, Log, Metric, News, ProgressEvent, Tokens
from app.engine.wire import encode

TOKENS_INTERVAL = 0.016  # seconds
PROGRESS_INTERVAL = 1 / 30
_TEXT_LIMIT = 64 * 1024  # characters held back, or in one log line

Level = Literal["debug", "info", "warning", "error"]


class Outbox:
    """Writes events to the parent, whole lines only, from any thread."""

    def __init__(self, fd: int, on_broken: Callable[[], None]) -> None:
        self._fd = fd
        self._lock = threading.Lock()
        self._on_broken = on_broken

    def send(self, event: Event) -> None:
        """Write one event. Blocks while the pipe is full.

        Raises:
            WeftError: PROTOCOL when the event is longer than a line may be; nothing is written then.
        """
        line = encode(event)
        if len(line) > MAX_LINE:
            raise WeftError(
                ErrorKind.PROTOCOL,
                f"An answer of {len(line):,} bytes is longer than the {MAX_LINE:,} that fit into one message.",
                "Ask for less at once.",
            )
        view = memoryview(line)
        try:
            with self._lock:
                while view:
                    view = view[os.write(self._fd, view) :]
        except BrokenPipeError:
            self._on_broken()


class Flusher:
    """Calls a report's `flush_due` at the time that it asked for, in one sleeping thread."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[float, HostReport]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="flusher", daemon=True).start()

    def at(self, when: float, report: HostReport) -> None:
        """Have `report.flush_due()` run at `when` (time.monotonic)."""
        self._queue.put((when, report))

    def _run(self) -> None:
        while True:
            when, report = self._queue.get()
            delay = when - time.monotonic()
            if delay > 0:
                time.sleep(delay)
            try:
                report.flush_due()
            except Exception as error:  # noqa: BLE001
                # Text that cannot be sent must not end the thread that sends all the rest.
                sys.stderr.write(f"flusher: {describe(error)}\n")


class HostReport:
    """How one command speaks while it works (backends.base.Report). Methods may be called from any thread."""

    def __init__(self, command: int, outbox: Outbox, flusher: Flusher) -> None:
        self._command = command
        self._outbox = outbox
        self._flusher = flusher
        self._lock = threading.RLock()
        self._closed = False
        self._armed = False
        self._rows: dict[int, tuple[list[str], int]] = {}  # row to (texts, count), not yet sent
        self._characters = 0
        self._tokens_sent = -math.inf  # when
        self._progress: ProgressEvent | None = None  # held back
        self._progress_sent = -math.inf
        self._cancelled = False
        self._callbacks: list[Callable[[], None]] = []
        self._adjustment: str | None = None  # the latest
        self._adjusters: list[Callable[[str], None]] = []

    # What a backend says

    def tokens(self, text: str, count: int, row: int = 0) -> None:
        """Hand on generated text. `count` tokens; `row` of a batched generation."""
        with self._lock:
            if self._closed:
                return
            texts, already = self._rows.get(row) or ([], 0)
            texts.append(text)
            self._rows[row] = (texts, already + count)
            self._characters += len(text)
            now = time.monotonic()
            if now - self._tokens_sent >= TOKENS_INTERVAL or self._characters >= _TEXT_LIMIT:
                self._send_progress(now)
                self._send_tokens(now)
            elif not self._armed:
                self._arm(self._tokens_sent + TOKENS_INTERVAL)

    def progress(self, phase: str, done: float = 0, total: float = 0, unit: str = "") -> None:
        """Say how far it is. What is not a number counts as unknown."""
        event = ProgressEvent(id=self._command, phase=phase, done=_finite(done), total=_finite(total), unit=unit)
        with self._lock:
            if self._closed:
                return
            now = time.monotonic()
            if self._progress is not None and self._progress.phase != phase:
                self._send_progress(now)  # the last of a phase is never lost
            self._progress = event
            if now - self._progress_sent >= PROGRESS_INTERVAL:
                self._send_tokens(now)
                self._send_progress(now)
            elif not self._armed:
                self._arm(self._progress_sent + PROGRESS_INTERVAL)

    def loaded(self, event: Loaded) -> None:
        """Say what was loaded."""
        self._send_now(msgspec.structs.replace(event, id=self._command))

    def log(self, level: Level, text: str) -> None:
        """Write to the engine's log, and tell the window."""
        text = text if len(text) <= _TEXT_LIMIT else text[:_TEXT_LIMIT] + " …"
        sys.stderr.write(f"{level}: {text}\n")
        self._send_now(Log(id=self._command, level=level, text=text))

    def metric(self, step: int, values: Mapping[str, float]) -> None:
        """Named numbers at a step of a task. What is not finite cannot travel: it is named in a warning instead."""
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        strange = sorted(set(values) - set(finite))
        if strange:
            self.log("warning", f"Step {step}: not a finite number: {', '.join(strange)}.")
        self._send_now(Metric(id=self._command, step=step, values=finite))

    def news(self, json: str) -> None:
        """What a task has to tell its worker, as JSON. Not thinned out: say it a few times a second at most."""
        self._send_now(News(id=self._command, json=json))

    @property
    def cancelled(self) -> bool:
        """Whether Cancel has come for this command."""
        return self._cancelled

    def on_cancel(self, callback: Callable[[], None]) -> None:
        """Have `callback` run, in the reader thread, as soon as Cancel comes; at once when it has come already."""
        with self._lock:
            if not self._cancelled:
                self._callbacks.append(callback)
                return
        callback()

    def on_adjust(self, callback: Callable[[str], None]) -> None:
        """Have `callback` run, in the reader thread, with the JSON of each Adjust; at once when one has come already."""
        with self._lock:
            self._adjusters.append(callback)
            already = self._adjustment
        if already is not None:
            callback(already)

    # What the host does

    def adjust(self, parameters: str) -> None:
        """Adjust has come."""
        with self._lock:
            if self._closed:
                return
            self._adjustment = parameters
            callbacks = list(self._adjusters)
        for callback in callbacks:
            try:
                callback(parameters)
            except Exception as error:  # noqa: BLE001  (a task's; the reader thread must live on)
                self.log("error", f"The task could not be changed.\n{describe(error)}")

    def cancel(self) -> None:
        """Cancel has come."""
        with self._lock:
            if self._closed or self._cancelled:
                return
            self._cancelled = True
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            try:
                callback()
            except Exception as error:  # noqa: BLE001  (a backend's; the reader thread must live on)
                self.log("error", f"A cancel callback failed.\n{describe(error)}")

    def finish(self, terminal: Done | Failed) -> None:
        """Send what is held back, then the terminal event; afterwards this report is silent."""
        with self._lock:
            if self._closed:
                return
            self.flush()
            self._outbox.send(terminal)
            self._closed = True
            self._callbacks.clear()
            self._adjusters.clear()

    def flush(self) -> None:
        """Send what is held back."""
        with self._lock:
            if not self._closed:
                now = time.monotonic()
                self._send_progress(now)
                self._send_tokens(now)

    def flush_due(self) -> None:
        """Send what has been held back for long enough, and ask to be called again for the rest."""
        with self._lock:
            self._armed = False
            if self._closed:
                return
            now = time.monotonic()
            due = [
                when
                for held, when in (
                    (bool(self._rows), self._tokens_sent + TOKENS_INTERVAL),
                    (self._progress is not None, self._progress_sent + PROGRESS_INTERVAL),
                )
                if held
            ]
            if due and min(due) > now:
                self._arm(min(due))
            elif due:
                self._send_progress(now)  # before the text that may come after it
                self._send_tokens(now)

    # Both with the lock held.

    def _arm(self, when: float) -> None:
        self._armed = True
        self._flusher.at(when, self)

    def _send_tokens(self, now: float) -> None:
        if not self._rows:
            return
        rows, self._rows, self._characters = self._rows, {}, 0
        for row, (texts, count) in rows.items():
            self._outbox.send(Tokens(id=self._command, text="".join(texts), count=count, row=row))
        self._tokens_sent = now

    def _send_progress(self, now: float) -> None:
        if self._progress is not None:
            event, self._progress = self._progress, None
            self._outbox.send(event)
            self._progress_sent = now

    def _send_now(self, event: Event) -> None:
        with self._lock:
            if not self._closed:
                self.flush()
                self._outbox.send(event)


def _finite(value: float) -> float:
    return float(value) if math.isfinite(value) else 0.0
