"""The child's main loop: `python -m app.engine.host --backend NAME`.

The main thread works off commands in order. A reader thread takes Cancel and Ping at once, also in the
middle of a prompt. Standard output is kept for the protocol: file descriptor 1 points at stderr before
any library is imported, so nothing a library prints can corrupt it. The end of stdin means that the
window is gone: the whole process group is killed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import math
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol

import msgspec

from app.core.errors import ErrorKind, WeftError
from app.core.stack import AdapterStack
from app.engine import protocol, watchdog
from app.engine.failures import describe, failed
from app.engine.report import Flusher, HostReport, Outbox
from app.engine.wire import CHUNK, LineSplitter, LineTooLong

MAX_ROWS = 64  # of a batch: each has a KV cache of its own


class Backend(Protocol):
    """What the host needs of backends.base.Backend, which lies above it."""

    def libraries(self) -> dict[str, str]: ...
    def load(self, request: protocol.Load, report: Any) -> None: ...
    def unload(self) -> None: ...
    def generate(self, request: protocol.Generate, report: Any) -> protocol.Generated: ...
    def generate_batch(self, request: protocol.GenerateBatch, report: Any) -> protocol.GeneratedBatch: ...
    def set_adapters(self, adapters: AdapterStack, report: Any, *, baked: bool = False) -> None: ...
    def score(self, request: protocol.Score, report: Any) -> protocol.Scored: ...


class _Envelope(msgspec.Struct):
    """As much of a broken command as an answer needs."""

    id: int = 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve the backend named on the command line. Returns the exit status; 1 when it could not start."""
    parser = argparse.ArgumentParser(prog="app.engine.host", description="Run one engine; the window starts it.")
    parser.add_argument("--backend", default="", help="a loader's id; without one, tasks only")
    name: str = parser.parse_args(arguments).backend
    return serve(name, lambda: find_backend(name))


def find_backend(name: str) -> Backend | None:
    """The backend of a loader, by name; None for none.

    Raises:
        WeftError: NOT_FOUND when there is no such loader.
    """
    if not name:
        return None
    return importlib.import_module("app.backends").backend_class(name)()


def serve(name: str, make_backend: Callable[[], Backend | None]) -> int:
    """Take over stdin and stdout, make the backend, and work until Shutdown. Returns the exit status."""
    commands, events = _take_over_pipes()
    if sys.platform != "win32":
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C in a terminal is for the command line, which sends Cancel
    watchdog.start(commands)
    outbox = Outbox(events, watchdog.end_group)
    try:
        backend = make_backend()
        libraries = backend.libraries() if backend is not None else {}
    except Exception as error:  # noqa: BLE001  (whatever it is, the parent is told)
        sys.stderr.write(describe(error))
        outbox.send(failed(protocol.Unload(), error, cancelled=False))
        return 1
    host = Host(backend, outbox)
    outbox.send(
        protocol.Ready(
            version=protocol.VERSION, backend=name, pid=os.getpid(), python=sys.version.split()[0], libraries=libraries
        )
    )
    threading.Thread(target=host.read, args=(commands,), name="reader", daemon=True).start()
    status = host.work()
    sys.stderr.flush()
    # Not through interpreter shutdown: libraries hang or crash there, and the system takes everything back anyway.
    os._exit(status)


def _take_over_pipes() -> tuple[int, int]:
    commands, events = os.dup(0), os.dup(1)  # dup makes them close on exec: a grandchild does not inherit them
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    if sys.platform == "win32":
        import msvcrt

        msvcrt.setmode(commands, os.O_BINARY)
        msvcrt.setmode(events, os.O_BINARY)
    return commands, events


class Host:
    """Takes commands apart, runs them one at a time and answers each with exactly one terminal event."""

    def __init__(self, backend: Backend | None, outbox: Outbox) -> None:
        self._backend = backend
        self._outbox = outbox
        self._flusher = Flusher()
        self._decoder = msgspec.json.Decoder(protocol.Command)
        self._lock = threading.Lock()
        self._waiting: dict[int, protocol.Command] = {}  # taken, not begun; in order
        self._order: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._adjustments: dict[int, str] = {}  # of commands that have not begun
        self._current: HostReport | None = None
        self._busy = 0

    # The reader thread

    def read(self, commands: int) -> None:
        """Take commands from the pipe until its end, then end the process group."""
        try:
            self._read(commands)
        except Exception as error:  # noqa: BLE001
            # Without this thread nothing can be cancelled: better no engine than a deaf one.
            sys.stderr.write(f"reader: {describe(error)}\n")
            self._outbox.send(failed(protocol.Unload(), error, cancelled=False))
        sys.stderr.flush()
        watchdog.end_group()

    def _read(self, commands: int) -> None:
        splitter = LineSplitter()
        while data := os.read(commands, CHUNK):
            try:
                lines = splitter.feed(data)
            except LineTooLong as error:
                raise WeftError(
                    ErrorKind.PROTOCOL,
                    f"The window sent {error}.",
                    "This is a defect of Weft: report it with the engine's log.",
                ) from error
            for line in lines:
                self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            command = self._decoder.decode(line)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            self._refuse(line, error)
            return
        if isinstance(command, protocol.Ping):
            with self._lock:
                busy = self._busy or next(iter(self._waiting), 0)
            self._outbox.send(protocol.Pong(id=command.id, busy=busy))
        elif isinstance(command, protocol.Cancel):
            self._cancel(command.target)
        elif isinstance(command, protocol.Adjust):
            self._adjust(command)
        else:
            with self._lock:
                known = command.id in self._waiting or command.id == self._busy
                if not known:
                    self._waiting[command.id] = command
            if known:
                sys.stderr.write(f"ignored: a second command with the id {command.id}\n")
            else:
                self._order.put(command.id)

    def _refuse(self, line: bytes, error: Exception) -> None:
        text = f"This engine cannot read a command: {error}."
        # Parameters of a task may hold a secret, and this goes into a log: only what comes before them.
        sys.stderr.write(f"{text} {line[:200].partition(b'parameters')[0]!r}\n")
        try:
            number = msgspec.json.decode(line, type=_Envelope).id
        except (msgspec.MsgspecError, ValueError, RecursionError):
            number = 0
        if not number:
            self._outbox.send(protocol.Log(level="error", text=text))
            return
        hint = "Repair the loader's environment in the settings: it may belong to another version of Weft."
        self._outbox.send(protocol.Failed(id=number, kind=ErrorKind.PROTOCOL.value, message=text, hint=hint))

    def _cancel(self, target: int) -> None:
        with self._lock:
            waiting = self._waiting.pop(target, None)
            self._adjustments.pop(target, None)
            current = self._current if target == self._busy else None
        if waiting is not None:
            self._outbox.send(_cancelled(waiting))  # it never began: no need to wait for the one at work
        elif current is not None:
            current.cancel()

    def _adjust(self, command: protocol.Adjust) -> None:
        with self._lock:
            current = self._current if command.target == self._busy else None
            if current is None and command.target in self._waiting:
                self._adjustments[command.target] = command.parameters
        if current is not None:
            current.adjust(command.parameters)

    # The main thread

    def work(self) -> int:
        """Work off commands until Shutdown. Returns the exit status."""
        while True:
            number = self._order.get()
            with self._lock:
                command = self._waiting.pop(number, None)
                if command is None:
                    continue  # cancelled before it began
                report = HostReport(number, self._outbox, self._flusher)
                self._current, self._busy = report, number
                adjustment = self._adjustments.pop(number, None)
            if adjustment is not None:
                report.adjust(adjustment)
            if isinstance(command, protocol.Shutdown):
                return self._shut_down(report, number)
            self._run(command, report)

    def _run(self, command: protocol.Command, report: HostReport) -> None:
        trouble = False
        try:
            terminal = _travelling(protocol.Done(id=command.id, result=self._execute(command, report)))
        except (Exception, SystemExit) as error:  # noqa: BLE001  (whatever it is, the parent is told)
            trouble = True
            terminal = failed(command, error, cancelled=report.cancelled)
            if terminal.detail:
                sys.stderr.write(terminal.detail.rstrip("\n") + "\n")
        # Outside the except clause: the exception, and all that its frames hold on to, is gone by now.
        if trouble:
            gc.collect()
        with self._lock:
            self._current, self._busy = None, 0
        try:
            report.finish(terminal)
        except WeftError as error:
            report.finish(failed(command, error, cancelled=False))

    def _execute(
        self, command: protocol.Command, report: HostReport
    ) -> protocol.Generated | protocol.GeneratedBatch | protocol.Scored | protocol.TaskResult | None:
        if isinstance(command, protocol.RunTask):
            return run_task(command, report)
        backend = self._backend
        if backend is None:
            raise WeftError(ErrorKind.UNSUPPORTED, "This engine runs tasks only.", "Start one with a loader.")
        match command:
            case protocol.Load():
                backend.load(command, report)
            case protocol.Unload():
                backend.unload()
                gc.collect()
            case protocol.SetAdapters():
                with _only_where_supported("adapters"):
                    backend.set_adapters(command.adapters, report, baked=command.baked)
            case protocol.Generate():
                return backend.generate(command, report)
            case protocol.GenerateBatch():
                _check_batch(command)
                with _only_where_supported("adapters"):
                    return backend.generate_batch(command, report)
            case protocol.Score():
                with _only_where_supported("perplexity"):
                    return backend.score(command, report)
            case protocol.Cancel() | protocol.Adjust() | protocol.Ping() | protocol.Shutdown():
                raise AssertionError(f"{type(command).__name__} is never queued for work")
        return None

    def _shut_down(self, report: HostReport, number: int) -> int:
        try:
            if self._backend is not None:
                self._backend.unload()  # temporary files of a loader go with its model
        except Exception as error:  # noqa: BLE001  (the process ends anyway)
            sys.stderr.write(describe(error))
        report.finish(protocol.Done(id=number))
        return 0


def _check_batch(command: protocol.GenerateBatch) -> None:
    if not 1 <= len(command.rows) <= MAX_ROWS:
        raise WeftError(
            ErrorKind.BAD_INPUT,
            f"A batch has 1 to {MAX_ROWS} rows, not {len(command.rows)}.",
            "Compare fewer stacks at once.",
        )


@contextlib.contextmanager
def _only_where_supported(what: str) -> Generator[None, None, None]:
    # The base class raises NotImplementedError for what a loader does not do.
    try:
        yield
    except NotImplementedError as error:
        raise WeftError(ErrorKind.UNSUPPORTED, f"This loader does not do {what}.", "Choose another loader.") from error


def run_task(command: protocol.RunTask, report: HostReport) -> protocol.TaskResult:
    """Run `app.tasks.<task>.run(parameters, report)`.

    `parameters` is the module's `Parameters` struct where it has one, else what the JSON says.

    Raises:
        WeftError: NOT_FOUND for an unknown task, BAD_INPUT for parameters that it cannot take.
    """
    name = command.task
    if not name.isidentifier() or name.startswith("_"):
        raise WeftError(
            ErrorKind.BAD_INPUT, f"{name!r} is not the name of a task.", "Choose one of the tasks that Weft lists."
        )
    try:
        module = importlib.import_module(f"app.tasks.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"app.tasks.{name}":
            raise
        raise WeftError(
            ErrorKind.NOT_FOUND, f"There is no task {name!r}.", "Choose one of the tasks that Weft lists."
        ) from error
    try:
        parameters = msgspec.json.decode(command.parameters.encode(), type=getattr(module, "Parameters", Any))
    except (msgspec.MsgspecError, ValueError) as error:
        raise WeftError(
            ErrorKind.BAD_INPUT, f"The task {name} cannot take its parameters: {error}.", "Correct them."
        ) from error
    return protocol.TaskResult(json=msgspec.json.encode(module.run(parameters, report)).decode())


def _cancelled(command: protocol.Command) -> protocol.Done | protocol.Failed:
    nothing = protocol.Generated(finish_reason="cancelled", tokens=0, prompt_tokens=0)
    if isinstance(command, protocol.Generate):
        return protocol.Done(id=command.id, result=nothing)
    if isinstance(command, protocol.GenerateBatch):
        return protocol.Done(id=command.id, result=protocol.GeneratedBatch(rows=(nothing,) * len(command.rows)))
    return protocol.Failed(id=command.id, kind=ErrorKind.CANCELLED.value, message="Cancelled.")


def _travelling(done: protocol.Done) -> protocol.Done:
    # JSON has no NaN: msgspec would write null, which the parent cannot read as a number.
    result = done.result
    if isinstance(result, protocol.Scored) and not (math.isfinite(result.nll) and math.isfinite(result.perplexity)):
        raise WeftError(
            ErrorKind.CORRUPT,
            f"The score is not a finite number (mean negative log-likelihood {result.nll}).",
            "The model or an adapter holds damaged weights, or its data type overflows: try another data type.",
        )
    if isinstance(result, protocol.Generated):
        return protocol.Done(id=done.id, result=_with_finite_times(result))
    if isinstance(result, protocol.GeneratedBatch):
        rows = tuple(_with_finite_times(row) for row in result.rows)
        return protocol.Done(id=done.id, result=protocol.GeneratedBatch(rows=rows, note=result.note))
    return done


def _with_finite_times(result: protocol.Generated) -> protocol.Generated:
    times = {name: getattr(result, name) for name in ("prompt_seconds", "seconds")}
    strange = {name: 0.0 for name, value in times.items() if not math.isfinite(value)}
    return msgspec.structs.replace(result, **strange) if strange else result


if __name__ == "__main__":
    raise SystemExit(main())
