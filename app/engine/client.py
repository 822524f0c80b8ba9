"""The parent's side of an engine: start it, speak with it, notice how it is, end it.

Threads, all asleep in the kernel while nothing happens: one waits for the child's death (death is waitpid,
not the end of a pipe), one reads events, one writes commands, one takes the log, one keeps the heartbeat.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from app.core.errors import ErrorKind, WeftError
from app.engine import protocol
from app.engine.event_queue import EngineEvent, EventQueue, Responsiveness
from app.engine.exits import EngineExit, describe_exit, oom_kills
from app.engine.heartbeat import Heartbeat
from app.engine.log_file import LogFile
from app.engine.pipes import PipeReader, PipeWriter
from app.engine.process_tree import ProcessTree
from app.engine.scratch import Scratch
from app.engine.surroundings import child_environment, empty_folder
from app.engine.wire import LineSplitter, LineTooLong, encode

__all__ = ["EngineClient", "EngineEvent", "EngineExit", "Responsiveness", "error_of"]

GRACE = 3.0  # seconds between Cancel and the kill
_TICK = 1.0


class EngineClient:
    """One engine, from start to exit. It cannot be started twice: `fresh()` makes another like it.

    Commands may be sent before `start()`. All methods may be called from any thread; none but `next_event`,
    `call` and `shutdown` waits for the engine.

    Args:
        python: interpreter of the loader's environment.
        backend: a loader's id, or "" for an engine that only runs tasks.
        log_path: where its stderr goes; bounded.
        environment: variables over those of `surroundings.child_environment`.
        module: what `python -m` runs; another one in tests.
    """

    def __init__(
        self,
        *,
        python: Path,
        backend: str,
        log_path: Path,
        environment: Mapping[str, str] | None = None,
        module: str = "app.engine.host",
    ) -> None:
        self.python = python
        self.backend = backend
        self.log_path = log_path
        self._environment = dict(environment or {})
        self._scratch: Scratch | None = None
        self._module = module
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._pending: dict[int, protocol.Command] = {}  # sent, without a terminal event
        self._early: list[bytes] = []  # sent before start()
        self._deadlines: dict[int, float] = {}  # of cancelled commands: then the engine is killed
        self._events = EventQueue()
        self._attention = threading.Event()  # wakes the heartbeat thread
        self._exited = threading.Event()
        self._started = False
        self._asked = False  # we wanted it to end
        self._shutdown = 0  # id of the Shutdown that shutdown() sent: nobody else waits for its Done
        self._killed = False
        self._cause: WeftError | None = None  # why we ended it, or why it says that it could not start
        self._ready: protocol.Ready | None = None
        self._tree: ProcessTree | None = None
        self._writer: PipeWriter | None = None

    # Life

    def fresh(self) -> EngineClient:
        """Another engine with the same settings, not started."""
        return EngineClient(
            python=self.python,
            backend=self.backend,
            log_path=self.log_path,
            environment=self._environment,
            module=self._module,
        )

    def start(self) -> None:
        """Start the child. Its Ready comes as the first event.

        Raises:
            WeftError: ENVIRONMENT when the interpreter cannot be started, CANCELLED when it was ended before it
                began. `next_event` then gives the EngineExit.
        """
        with self._lock:
            if (exit := self._events.exit) is not None:
                raise exit.error
            if self._started:
                raise RuntimeError("an EngineClient is started once; use fresh()")
            self._started = True
        self._log = LogFile(self.log_path)
        self._log.note(f"starting {self._module} {self.backend} with {self.python}")
        self._oom_kills = oom_kills()
        try:
            folder = empty_folder(self.log_path.parent)
            with contextlib.suppress(OSError):  # no room: what needs temporary files says so
                self._scratch = Scratch()
            tree = ProcessTree(
                [str(self.python), "-m", self._module, "--backend", self.backend],
                environment=child_environment((self._scratch.variables if self._scratch else {}) | self._environment),
                folder=folder,
            )
        except OSError as error:
            if self._scratch is not None:
                self._scratch.remove()
            problem = WeftError(
                ErrorKind.ENVIRONMENT,
                f"The engine's Python {self.python} cannot be started: {error.strerror}.",
                "Repair the loader's environment in the settings.",
            )
            self._log.close()
            self._close(EngineExit(code=None, error=problem, pending=self._take_pending()))
            raise problem from error
        self._run_threads(tree, folder)

    def _run_threads(self, tree: ProcessTree, folder: Path) -> None:
        process = tree.process
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        name = f"engine {self.backend or 'task'} {tree.pid}"
        self._splitter = LineSplitter()
        self._decoder = msgspec.json.Decoder(protocol.Event)
        self._heartbeat = Heartbeat(time.monotonic())
        reader = PipeReader(process.stdout.fileno(), self._take_data, f"{name} events")
        log = PipeReader(process.stderr.fileno(), self._log.write, f"{name} log")
        writer = PipeWriter(process.stdin.fileno(), f"{name} commands")
        for thread in (reader, log, writer):
            thread.start()
        with self._lock:
            self._tree, self._writer = tree, writer
            early, self._early = self._early, []
            for line in early:
                writer.put(line)
            killed = self._killed
        threading.Thread(
            target=self._wait, args=(tree, folder, reader, log, writer), name=f"{name} death", daemon=True
        ).start()
        threading.Thread(target=self._beat, args=(tree,), name=f"{name} heartbeat", daemon=True).start()
        if killed:
            tree.kill()

    @property
    def alive(self) -> bool:
        """Whether the child runs."""
        return self._tree is not None and not self._exited.is_set()

    @property
    def pid(self) -> int:
        """The child's process number, 0 before the start."""
        return self._tree.pid if self._tree is not None else 0

    @property
    def ready(self) -> protocol.Ready | None:
        """The handshake, once it has come."""
        return self._ready

    @property
    def pending(self) -> tuple[int, ...]:
        """Ids of the commands that have not ended."""
        with self._lock:
            return tuple(self._pending)

    # Speaking

    def send(self, command: protocol.Command) -> int:
        """Hand a command to the engine, never waiting for it. Returns the id that it got.

        Raises:
            WeftError: BAD_INPUT when it is too long for the wire; otherwise the reason why the engine is dead.
        """
        number = next(self._ids)
        command = msgspec.structs.replace(command, id=number)
        line = encode(command)
        if len(line) > protocol.MAX_LINE:
            raise WeftError(
                ErrorKind.BAD_INPUT,
                f"This is too long to send to an engine: {len(line):,} bytes.",
                "Send a shorter text.",
            )
        with self._lock:
            if (exit := self._events.exit) is not None:
                raise exit.error
            self._asked = self._asked or isinstance(command, protocol.Shutdown)
            if not isinstance(
                command, protocol.Cancel | protocol.Adjust
            ):  # answered by the end of their target, or never
                self._pending[number] = command
            self._write(line)
        return number

    def next_event(self, timeout: float | None = None) -> EngineEvent | None:
        """The next event, waiting for it; None when `timeout` seconds pass, or `wake()` is called, without one.

        After the engine's death, and once all that it said is taken, this gives the EngineExit, again and again.
        """
        return self._events.get(timeout)

    def wake(self) -> None:
        """Have a waiting `next_event` return None."""
        self._events.wake()

    def call(self, command: protocol.Command) -> Iterator[protocol.Event]:
        """Send a command and yield its events, the last one being Done (or Pong).

        For one caller at a time: events of other commands are passed over.

        Raises:
            WeftError: the command failed, or the engine died.
        """
        number = self.send(command)
        while True:
            event = self.next_event()
            self.raise_if_ended(number, event)
            if event is None or isinstance(event, Responsiveness | EngineExit) or event.id != number:
                continue
            yield event
            if isinstance(event, protocol.Done | protocol.Pong):
                return

    def raise_if_ended(self, command: int, event: EngineEvent | None) -> None:
        """Raises WeftError when `event` says that this command failed or that the engine died."""
        if isinstance(event, protocol.Failed) and event.id in (command, 0):
            raise error_of(event)
        if isinstance(event, EngineExit):
            raise event.error

    def cancel(self, command: int) -> None:
        """Stop a command. An engine that has not ended it after three seconds is killed."""
        with self._lock:
            if command not in self._pending or command in self._deadlines:
                return
            self._deadlines[command] = time.monotonic() + GRACE
            self._write(encode(protocol.Cancel(target=command)))
        self._attention.set()

    # Ending

    def shutdown(self, timeout: float = 2.0) -> None:
        """Ask the engine to end; kill it when it has not after `timeout` seconds. Returns when it is gone."""
        with self._lock:
            self._asked = True
            if self._end_unstarted() or self._exited.is_set():
                return
            for number in self._pending:
                self._write(encode(protocol.Cancel(target=number)))
            self._shutdown = next(self._ids)
            self._write(encode(protocol.Shutdown(id=self._shutdown)))
        if not self._exited.wait(timeout * 0.6):
            self.kill()
            self._exited.wait(max(1.0, timeout * 0.4))

    def kill(self) -> None:
        """End the engine and everything it started, at once; the EngineExit follows."""
        with self._lock:
            self._asked = True
            self._killed = True
            tree = None if self._end_unstarted() else self._tree
        if tree is not None:
            tree.kill()

    # Inside

    def _end_unstarted(self) -> bool:
        if self._started:
            return False
        if self._events.exit is None:
            error = WeftError(ErrorKind.CANCELLED, "The engine was ended before it started.")
            self._close(EngineExit(code=None, asked=True, error=error, pending=self._take_pending()))
        return True

    def _write(self, line: bytes) -> None:
        # With the lock held, so that commands keep their order.
        if self._writer is None:
            self._early.append(line)
        else:
            self._writer.put(line)

    def _take_data(self, data: bytes) -> None:
        self._heartbeat.heard(time.monotonic())
        if not self._heartbeat.responsive:
            self._attention.set()
        if self._killed and self._cause is not None:
            return  # after a violation nothing it says counts
        try:
            for line in self._splitter.feed(data):
                self._take(self._decoder.decode(line), len(line))
        except (LineTooLong, msgspec.MsgspecError, ValueError, RecursionError) as error:
            self._violation(f"The engine sent something that is not an event: {str(error)[:200]}.")

    def _take(self, event: protocol.Event, size: int) -> None:
        if self._ready is None:
            if isinstance(event, protocol.Failed):  # it could not start, and says why
                self._cause = error_of(event)
            elif not isinstance(event, protocol.Ready):
                self._violation("The engine spoke before its handshake.")
                return
            elif event.version != protocol.VERSION:
                self._violation(
                    f"The engine speaks version {event.version} of the protocol, the window version {protocol.VERSION}."
                )
                return
            else:
                self._ready = event
        elif isinstance(event, protocol.Pong) and event.id < 0:
            return  # the heartbeat's own
        if isinstance(event, protocol.Done | protocol.Failed | protocol.Pong):
            with self._lock:
                self._pending.pop(event.id, None)
                self._deadlines.pop(event.id, None)
            if event.id == self._shutdown != 0:
                return
        self._events.put(event, size)

    def _violation(self, message: str) -> None:
        self._end_because(
            WeftError(
                ErrorKind.PROTOCOL,
                message,
                "Repair the loader's environment in the settings; if that does not help, report it with the engine's log.",
            )
        )

    def _end_because(self, cause: WeftError) -> None:
        self._cause = self._cause or cause
        self._killed = True
        if self._tree is not None:
            self._tree.kill()

    def _beat(self, tree: ProcessTree) -> None:
        pings = itertools.count(-1, -1)
        while not self._exited.is_set():
            now = time.monotonic()
            with self._lock:
                deadline = min(self._deadlines.values(), default=now + _TICK)
            self._attention.wait(min(_TICK, max(0.01, deadline - now)))
            self._attention.clear()
            now = time.monotonic()
            self._kill_if_deaf(now)
            stopped = tree.stopped()
            if self._events.full:
                self._heartbeat.heard(now)  # it is we who do not listen
            ping, change = self._heartbeat.tick(now, stopped=stopped)
            if ping and self._ready is not None:
                with self._lock:
                    self._write(encode(protocol.Ping(id=next(pings))))
            if change is not None:
                self._events.put(
                    Responsiveness(responsive=change, seconds=now - self._heartbeat.heard_at, stopped=stopped)
                )

    def _kill_if_deaf(self, now: float) -> None:
        with self._lock:
            at_work = min(
                (number for number, c in self._pending.items() if not isinstance(c, protocol.Ping)), default=0
            )
            late = [number for number, deadline in self._deadlines.items() if deadline <= now]
            for number in late:
                # One that waits behind another is no reason to kill that one: its time begins when its turn comes.
                self._deadlines[number] = now + GRACE
        if at_work in late:
            self._end_because(
                WeftError(
                    ErrorKind.CANCELLED,
                    *self._deaf(),
                )
            )

    def _deaf(self) -> tuple[str, str]:
        """Message and hint when a cancel was not heard in time."""
        if self.backend:
            said = f"The engine did not stop within {GRACE:.0f} seconds and was ended."
            return said, "The model is loaded again with the next message."
        return (
            f"Cancelled: the job was in the middle of something for {GRACE:.0f} seconds more, and was ended there.",
            "",
        )

    def _wait(self, tree: ProcessTree, folder: Path, reader: PipeReader, log: PipeReader, writer: PipeWriter) -> None:
        status = tree.wait()
        self._events.release()
        for thread in (reader, log, writer):
            thread.finish()
        for pipe in (tree.process.stdin, tree.process.stdout, tree.process.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        with contextlib.suppress(OSError):
            if folder.name != "empty":
                folder.rmdir()
        if self._scratch is not None:  # before the death is told: a command line ends then
            self._scratch.remove()
        with self._lock:
            end = describe_exit(
                status,
                asked=self._asked,
                killed=self._killed,
                cause=self._cause,
                pending=self._take_pending(),
                tail=self._log.tail(),
                log_path=self.log_path,
                oom_kills=oom_kills() - self._oom_kills,
                ready=self._ready is not None,
            )
            self._log.note(f"ended with status {status}: {end.error}")
            self._log.close()
            self._close(end)

    def _take_pending(self) -> tuple[int, ...]:
        pending = tuple(
            number for number, command in self._pending.items() if not isinstance(command, protocol.Shutdown)
        )
        self._pending.clear()
        self._deadlines.clear()
        return pending

    def _close(self, end: EngineExit) -> None:
        self._events.close(end)
        self._exited.set()
        self._attention.set()


def error_of(event: protocol.Failed) -> WeftError:
    """The WeftError that a Failed event carries."""
    kind = ErrorKind(event.kind) if event.kind in set(ErrorKind) else ErrorKind.INTERNAL
    return WeftError(kind, event.message, event.hint)
