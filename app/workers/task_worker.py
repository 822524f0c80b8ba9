"""A thread that runs one job: its task in a child process, its state in the store, what it says on the way."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
from PySide6.QtCore import QObject, QThread, Signal

from app.core.errors import ErrorKind, WeftError
from app.core.jobs import Job, JobState, Progress
from app.engine import protocol
from app.engine.client import EngineClient, EngineExit, error_of
from app.engine.failures import one_line
from app.store.jobs import JobStore

_STORED_EVERY = 1.0  # seconds between writes of the progress into the store
_METRICS = 10_000  # kept while nobody takes them; the task's own files hold all


class Heard(msgspec.Struct, kw_only=True):
    """What a task said since it was last asked.

    Attributes:
        progress: the latest, or None when there was none.
        metrics: (step, values) in order. news: JSON texts in order, the last few. warnings: sentences worth showing.
    """

    progress: Progress | None = None
    metrics: list[tuple[int, dict[str, float]]] = []
    news: list[str] = []
    warnings: list[str] = []


class TaskWorker(QThread):
    """Runs one job to its end. `start()` it after connecting.

    Args:
        job: its row in the store, QUEUED. parameters: the task's, as JSON.
        make_client: makes the child, not started; may raise WeftError.
        complete: (job, parameters) to the parameters with what must not lie in the store, such as a token; called in this thread.

    Signals:
        spoke: the task said something: `take()` it. Never more than one undelivered.
        ended(dict or None, WeftError or None): once, last, after the store knows it. CANCELLED after `stop`.
    """

    spoke = Signal()
    ended = Signal(object, object)

    def __init__(
        self,
        job: Job,
        parameters: str,
        store: JobStore,
        *,
        make_client: Callable[[], EngineClient],
        complete: Callable[[Job, str], str] | None = None,
        parent: QObject | None = None,
    ) -> None:
        super().__init__(parent)
        self._complete = complete
        self.setObjectName(f"job {job.id} {job.task}")
        self.job = job
        self._parameters = parameters
        self._store = store
        self._make_client = make_client
        self._lock = threading.Lock()
        self._heard = Heard()
        self._told = False
        self._client: EngineClient | None = None
        self._command = 0
        self._stopping = False
        self._stored = 0.0

    # From any thread

    def take(self) -> Heard:
        """What was said since the last call."""
        with self._lock:
            heard, self._heard, self._told = self._heard, Heard(), False
        return heard

    def stop(self) -> None:
        """Cancel the task; a child that has not ended after a few seconds is killed. `ended` follows."""
        with self._lock:
            self._stopping = True
            client, command = self._client, self._command
        if client is not None:
            client.cancel(command)

    def kill(self) -> None:
        """End the child at once, so that what it has written stays. `ended` follows."""
        with self._lock:
            self._stopping = True
            client = self._client
        if client is not None:
            client.kill()

    def adjust(self, parameters: str) -> None:
        """Tell the running task to change something: JSON that it understands. Nothing happens when it has ended."""
        with self._lock:
            client, command = self._client, self._command
        if client is not None:
            with contextlib.suppress(WeftError):  # it has just ended
                client.send(protocol.Adjust(target=command, parameters=parameters))

    # This thread

    def run(self) -> None:
        """The thread's own work; call `start()`, not this."""
        result: dict[str, Any] | None = None
        error: WeftError | None = None
        try:
            result = self._work()
        except WeftError as known:
            error = known
        except Exception as unknown:  # noqa: BLE001  (a defect of ours must reach the window, not end a thread in silence)
            error = WeftError(
                ErrorKind.INTERNAL, f"The job failed: {one_line(unknown)}", "Please report this, with its log."
            )
        with self._lock:
            if error is not None and self._stopping:
                error = WeftError(ErrorKind.CANCELLED, "Cancelled.", error.hint)
            progress = self._heard.progress
        with contextlib.suppress(WeftError):  # a full disk fails the job and this; the signal still says so
            self._record(error, progress)
        self._store.release()
        self.ended.emit(result, error)

    def _record(self, error: WeftError | None, progress: Progress | None) -> None:
        last = {} if progress is None else {"progress": progress}
        if error is None:
            self._store.update(self.job.id, state=JobState.DONE, **last)
            return
        state = {ErrorKind.CANCELLED: JobState.CANCELLED, ErrorKind.CRASHED: JobState.CRASHED}.get(
            error.kind, JobState.FAILED
        )
        self._store.update(self.job.id, state=state, message=error.message, hint=error.hint, **last)

    def _work(self) -> dict[str, Any]:
        self._store.update(self.job.id, state=JobState.STARTING)
        client = self._make_client()
        parameters = self._parameters if self._complete is None else self._complete(self.job, self._parameters)
        try:
            client.start()
            with self._lock:
                if self._stopping:
                    raise WeftError(ErrorKind.CANCELLED, "Cancelled.")
                self._client = client
                self._command = client.send(protocol.RunTask(task=self.job.task, parameters=parameters))
            return self._listen(client, self._command)
        finally:
            with self._lock:
                self._client, self._command = None, 0
            client.shutdown()

    def _listen(self, client: EngineClient, command: int) -> dict[str, Any]:
        while True:
            event = client.next_event()
            if isinstance(event, EngineExit):
                raise event.error
            if isinstance(event, protocol.Failed) and event.id in (0, command):
                raise error_of(event)
            if isinstance(event, protocol.Ready):
                self._store.update(self.job.id, state=JobState.RUNNING)
            elif isinstance(event, protocol.Done) and event.id == command:
                assert isinstance(event.result, protocol.TaskResult)
                found = json.loads(event.result.json)
                return found if isinstance(found, dict) else {"result": found}
            else:
                self._hear(event)

    def _hear(self, event: object) -> None:
        with self._lock:
            heard = self._heard
            match event:
                case protocol.ProgressEvent():
                    heard.progress = event.progress
                case protocol.Metric():
                    heard.metrics = [*heard.metrics[-_METRICS:], (event.step, event.values)]
                case protocol.News():
                    heard.news = [*heard.news[-99:], event.json]
                case protocol.Log() if event.level in ("warning", "error"):
                    heard.warnings = [*heard.warnings[-99:], event.text]
                case _:
                    return
            tell, self._told = not self._told, True
            progress = heard.progress
        if tell:
            self.spoke.emit()
        now = time.monotonic()
        if progress is not None and now - self._stored >= _STORED_EVERY:
            self._stored = now
            with contextlib.suppress(WeftError):  # a figure that cannot be noted is no reason to stop
                self._store.update(self.job.id, progress=progress)
