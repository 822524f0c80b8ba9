"""A thread that owns one engine and turns its events into signals, never faster than the window takes them."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass, field

from PySide6.QtCore import QObject, QThread, Signal, Slot

from app.core.errors import ErrorKind, WeftError
from app.core.jobs import Progress
from app.engine import protocol
from app.engine.client import EngineClient, EngineEvent, EngineExit, Responsiveness, error_of
from app.engine.failures import describe, one_line

_LOG_LINES = 200  # held back for a busy window; the log file has them all


@dataclass
class _HeldBack:
    """What the window has not been told yet."""

    # By command and row.
    tokens: dict[tuple[int, int], tuple[list[str], int]] = field(
        default_factory=dict[tuple[int, int], tuple[list[str], int]]
    )
    progress: dict[int, Progress] = field(default_factory=dict[int, Progress])
    log: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    log_dropped: int = 0


class EngineWorker(QThread):
    """Owns one EngineClient from start to exit. `start()` it after connecting; it ends when the engine does.

    While the window is busy, tokens, progress and log lines are put together: of each kind (of tokens, for each row of a
    batch) at most one signal is undelivered, besides the rest of a command's text, which goes out just before its `done` or `failed`.
    Nothing of a text is lost or changes its place.

    Signals (all in the receiver's thread, when connected to bound slots of QObjects):
        ready(protocol.Ready), loaded(protocol.Loaded, whose id is the Load's),
        tokens(id, text, count), row_tokens(id, row, text, count) for a GenerateBatch, progress(id, core.jobs.Progress),
        done(id, result: Generated, GeneratedBatch, Scored, TaskResult or None), failed(id, WeftError),
        metric(id, protocol.Metric), news(id, JSON of a task), log(level, text), responsive(bool),
        exited(EngineExit): once, last; before it `failed` comes for every command that the engine took along.
    """

    ready = Signal(object)
    loaded = Signal(object)
    tokens = Signal(int, str, int)
    row_tokens = Signal(int, int, str, int)
    progress = Signal(int, object)
    metric = Signal(int, object)
    news = Signal(int, str)
    done = Signal(int, object)
    failed = Signal(int, object)
    log = Signal(str, str)
    responsive = Signal(bool)
    exited = Signal(object)
    _delivered = Signal()

    def __init__(self, client: EngineClient, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self.setObjectName(f"engine {client.backend}")
        self._client = client
        self._lock = threading.Lock()
        self._undelivered = False
        self._held = _HeldBack()
        self._batches: set[int] = set()  # commands whose tokens belong to rows
        self._batches_lock = threading.Lock()
        self._delivered.connect(self._on_delivered)

    # From any thread; none of these waits, but for stop().

    @property
    def client(self) -> EngineClient:
        """The engine's client."""
        return self._client

    def send(self, command: protocol.Command) -> int:
        """Hand a command to the engine, also before it has started. Returns the command's id.

        Raises:
            WeftError: the engine is dead, for the reason given.
        """
        if not isinstance(command, protocol.GenerateBatch):
            return self._client.send(command)
        with self._batches_lock:  # its first tokens may come before its id is known here
            number = self._client.send(command)
            self._batches.add(number)
        return number

    def cancel(self, command: int) -> None:
        """Stop a command; within three seconds it ends, or the engine does."""
        self._client.cancel(command)

    def kill(self) -> None:
        """End the engine at once. `exited` follows."""
        self._client.kill()

    def stop(self, timeout: float = 2.0) -> None:
        """End the engine and this thread, and wait for both: for the application's end. Not from this thread itself."""
        self._client.shutdown(timeout * 0.75)
        if self.isRunning():
            self._client.kill()
            self.wait(int(timeout * 1000))

    # This thread

    def run(self) -> None:
        """Start the engine and pass its events on until it is dead."""
        try:
            end = self._serve()
        except Exception as error:  # noqa: BLE001  (it becomes an exit that says so)
            self._client.kill()
            end = EngineExit(
                code=None,
                error=WeftError(
                    ErrorKind.INTERNAL,
                    f"The engine's worker failed unexpectedly: {one_line(error)}",
                    f"Report it with the log {self._client.log_path}.",
                ),
                pending=self._client.pending,
                log_tail=describe(error),
            )
        self._flush()
        for command in end.pending:
            self.failed.emit(command, end.error)
        self.exited.emit(end)

    def _serve(self) -> EngineExit:
        with contextlib.suppress(WeftError):  # the client's EngineExit carries it
            self._client.start()
        while True:
            event = self._client.next_event()
            if isinstance(event, EngineExit):
                return event
            if event is not None:
                self._take(event)
            self._flush_if_delivered()

    def _take(self, event: EngineEvent) -> None:
        match event:
            case protocol.Tokens():
                key = (event.id, event.row)
                texts, count = self._held.tokens.get(key) or ([], 0)
                texts.append(event.text)
                self._held.tokens[key] = (texts, count + event.count)
            case protocol.ProgressEvent():
                self._held.progress[event.id] = event.progress
            case protocol.Log():
                if len(self._held.log) < _LOG_LINES:
                    self._held.log.append((event.level, event.text))
                else:
                    self._held.log_dropped += 1
            case Responsiveness():
                self.responsive.emit(event.responsive)
            case _:
                self._flush()
                self._pass_on(event)

    def _pass_on(self, event: EngineEvent) -> None:
        match event:
            case protocol.Ready():
                self.ready.emit(event)
            case protocol.Loaded():
                self.loaded.emit(event)
            case protocol.News():
                self.news.emit(event.id, event.json)
            case protocol.Metric():
                self.metric.emit(event.id, event)
            case protocol.Done():
                self.done.emit(event.id, event.result)
            case protocol.Failed():
                if event.id:  # id 0: it could not start; its exit says so too
                    self.failed.emit(event.id, error_of(event))
            case _:
                pass  # Pong

    def _flush_if_delivered(self) -> None:
        with self._lock:
            if self._undelivered:
                return
        self._flush()

    def _flush(self) -> None:
        held = self._held
        if not (held.tokens or held.progress or held.log):
            return
        self._held = _HeldBack()
        with self._lock:
            self._undelivered = True
        for level, text in held.log:
            self.log.emit(level, text)
        if held.log_dropped:
            self.log.emit("info", f"… and {held.log_dropped} more lines: see {self._client.log_path}")
        for command, progress in held.progress.items():
            self.progress.emit(command, progress)
        for (command, row), (texts, count) in held.tokens.items():
            with self._batches_lock:
                by_row = command in self._batches
            if by_row:
                self.row_tokens.emit(command, row, "".join(texts), count)
            else:
                self.tokens.emit(command, "".join(texts), count)
        # Posted last, so it arrives last: by then the window has taken all of the above.
        self._delivered.emit()

    # The window's thread (this object lives there)

    @Slot()
    def _on_delivered(self) -> None:
        with self._lock:
            self._undelivered = False
        self._client.wake()
