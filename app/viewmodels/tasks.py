"""TaskQueue: long work of the window's own making (train, merge, export, …), one job at a time on each resource."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from PySide6.QtCore import QObject, QTimer, Signal, Slot

from app.core.errors import ErrorKind, WeftError
from app.core.jobs import Job, JobState, Progress
from app.store.jobs import JobStore

log = logging.getLogger("weft")
CLOSE_MS = 6000
# What lies on the disk of these goes on from any moment, but is cleared away by a cancel: the end of the window kills them.
_HOLDS = {"pause": True, "resume": False, "stop": False}  # what a training is told
KILLED_AT_CLOSE = frozenset({"merge", "export_gguf", "quantize"})


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """A task that follows another one. See `TaskQueue.submit`. always: also when the one before it failed or was cancelled."""

    task: str
    title: str
    parameters: Any
    environment: str = "core"
    resource: str = "cpu"
    always: bool = False


class TaskQueue(QObject):
    """Runs tasks as jobs that the store remembers. Jobs of one resource wait for each other, in order.

    Args:
        make_client: (environment, log path) to an EngineClient, not started; may raise WeftError.
        make_worker: (job, parameters, store, make_client) to a TaskWorker.
        logs: folder of the jobs' logs.

    Signals:
        changed: a job was added, began or ended.
        progressed(job id, Progress), metric(job id, step, dict), news(job id, JSON), warned(job id, sentence): while it runs.
        held(job id, bool): it was told to pause, or to go on.
        ended(Job, result dict or None, WeftError or None): the job as it ended.
        followed(job id, Job): what was to follow a job that ended well is in the queue now.
    """

    changed = Signal()
    progressed = Signal(int, object)
    metric = Signal(int, int, object)
    news = Signal(int, str)
    warned = Signal(int, str)
    held = Signal(int, bool)
    ended = Signal(object, object, object)
    followed = Signal(int, object)

    def __init__(
        self,
        store: JobStore,
        *,
        make_client: Callable[[str, Path], Any],
        make_worker: Callable[..., Any],
        logs: Path,
        parent: QObject | None = None,
    ) -> None:
        super().__init__(parent)
        self._store = store
        self._make_client = make_client
        self._make_worker = make_worker
        self._logs = logs
        self._waiting: list[Job] = []
        self._running: dict[str, Any] = {}  # by resource
        self._latest: dict[int, Progress] = {}
        self._held: set[int] = set()
        self._over: set[int] = set()  # jobs that have ended, while their threads have not
        self._closing = False

    def submit(
        self,
        task: str,
        title: str,
        parameters: msgspec.Struct | Mapping[str, Any],
        *,
        environment: str = "core",
        resource: str = "cpu",
        then: Sequence[Step | Mapping[str, Any]] = (),
    ) -> Job:
        """Put a job into the queue. An environment of "" is the window's own.

        Args:
            then: what follows, one after the other, when it has ended well: also after a retry, and after a restart.

        Raises:
            WeftError: the store cannot be written.
        """
        envelope: dict[str, Any] = {"environment": environment, "parameters": parameters}
        if then:
            envelope["then"] = list(then)
        job = self._store.create(task, title, resource, msgspec.json.encode(envelope).decode())
        job = self._store.update(job.id, log=str(self._logs / f"job-{job.id}-{task}.log"))
        self._waiting.append(job)
        self.changed.emit()
        QTimer.singleShot(0, self, self._next)
        return job

    def adopt(self, task: str, title: str, parameters: Mapping[str, Any], *, environment: str, message: str) -> Job:
        """A job that was interrupted elsewhere, to be started again from the list of jobs. Raises WeftError."""
        envelope = {"environment": environment, "parameters": parameters}
        job = self._store.create(task, title, "cpu", msgspec.json.encode(envelope).decode())
        hint = "Start it again: what was already complete is used."
        job = self._store.update(job.id, state=JobState.CRASHED, message=message, hint=hint)
        self.changed.emit()
        return job

    def owns(self, job: Job) -> bool:
        """Whether a job is of this queue's kind."""
        return _envelope(job) is not None

    def is_active(self, job_id: int) -> bool:
        """Whether it runs or waits here."""
        return self._worker(job_id) is not None or any(job.id == job_id for job in self._waiting)

    def is_running(self, job_id: int) -> bool:
        """Whether it runs here."""
        return self._worker(job_id) is not None

    @property
    def busy(self) -> bool:
        """Whether any job runs here."""
        return bool(self._running)

    @property
    def any_progress(self) -> Progress | None:
        """How far the job is that runs longest."""
        return next(
            (self._latest[worker.job.id] for worker in self._running.values() if worker.job.id in self._latest), None
        )

    def progress(self, job_id: int) -> Progress | None:
        """The latest of a job that runs here."""
        return self._latest.get(job_id)

    def cancel(self, job_id: int) -> None:
        """Stop a job, or take it out of the queue. Does nothing when it has ended."""
        for job in self._waiting:
            if job.id == job_id:
                self._waiting.remove(job)
                self._end(job, JobState.CANCELLED, WeftError(ErrorKind.CANCELLED, "Cancelled before it began."))
                return
        worker = self._worker(job_id)
        if worker is not None:
            worker.stop()

    def adjust(self, job_id: int, parameters: Mapping[str, Any]) -> None:
        """Tell a running task to change something (`{"paused": true}`, a training's `{"action": "pause"}`, …)."""
        worker = self._worker(job_id)
        if worker is not None:
            worker.adjust(json.dumps(dict(parameters)))
            held = parameters.get("paused", _HOLDS.get(str(parameters.get("action"))))
            if isinstance(held, bool) and held != self.is_held(job_id):
                (self._held.add if held else self._held.discard)(job_id)
                self.held.emit(job_id, held)

    def is_held(self, job_id: int) -> bool:
        """Whether a job that runs here was told to pause."""
        return job_id in self._held

    def retry(self, job_id: int) -> Job:
        """A new job like an ended one. A task with a `resume` parameter goes on from what lies on disk.

        Raises:
            WeftError: BUSY while it runs; NOT_FOUND; UNSUPPORTED for another kind of job.
        """
        job = self._store.get(job_id)
        envelope = _envelope(job)
        if envelope is None:
            raise WeftError(ErrorKind.UNSUPPORTED, f"{job.title} cannot be started again from here.")
        if self.is_active(job_id):
            raise WeftError(ErrorKind.BUSY, f"{job.title} has not ended.", "Cancel it first.")
        parameters = envelope["parameters"]
        if "resume" in parameters:
            # A task that takes a word for it goes on only where there is something to go on with.
            parameters = {**parameters, "resume": "if_there" if isinstance(parameters["resume"], str) else True}
        return self.submit(
            job.task,
            job.title,
            parameters,
            environment=envelope["environment"],
            resource=job.resource,
            then=envelope.get("then", ()),
        )

    def close(self) -> None:
        """Stop what runs and wait for it: the window is going. Each can be started again from the Jobs page."""
        self._closing = True
        message, hint = "Weft was closed meanwhile.", "Start it again: what was already complete is used."
        for job in self._waiting:
            self._store.update(job.id, state=JobState.CRASHED, message="Weft was closed before this began.", hint=hint)
        self._waiting.clear()
        workers = list(self._running.values())
        for worker in workers:
            if worker.job.task in KILLED_AT_CLOSE:
                worker.kill()
            else:
                worker.stop()
        for worker in workers:
            if not worker.wait(CLOSE_MS):
                log.error("%s did not stop within %d s", worker.job.title, CLOSE_MS // 1000)
            if self._store.get(worker.job.id).state is not JobState.DONE:
                self._store.update(worker.job.id, state=JobState.CRASHED, message=message, hint=hint)

    # Inside

    def _worker(self, job_id: int) -> Any:
        """Of a job that has not ended: whoever hears that one has must not be told that it still runs."""
        held = self._running.values()
        return next((worker for worker in held if worker.job.id == job_id and job_id not in self._over), None)

    @Slot()
    def _next(self) -> None:
        if self._closing:
            return
        for job in list(self._waiting):
            if job.resource in self._running:
                continue
            self._waiting.remove(job)
            envelope = _envelope(job)
            assert envelope is not None
            parameters = json.dumps(envelope["parameters"])
            worker = self._make_worker(
                job,
                parameters,
                self._store,
                make_client=_Client(self._make_client, envelope["environment"], Path(job.log)),
            )
            self._running[job.resource] = worker
            worker.spoke.connect(self._heard)
            worker.ended.connect(self._ended)
            worker.finished.connect(self._finished)
            worker.start()
        self.changed.emit()

    @Slot()
    def _heard(self) -> None:
        # Every worker is asked: Qt does not say which one spoke when its signal is queued behind another's.
        for worker in list(self._running.values()):
            self._pass_on(worker)

    def _pass_on(self, worker: Any) -> None:
        heard, number = worker.take(), worker.job.id
        if heard.progress is not None:
            self._latest[number] = heard.progress
            self.progressed.emit(number, heard.progress)
        for step, values in heard.metrics:
            self.metric.emit(number, step, values)
        for text in heard.news:
            self.news.emit(number, text)
        for sentence in heard.warnings:
            self.warned.emit(number, sentence)

    @Slot(object, object)
    def _ended(self, result: object, error: WeftError | None) -> None:
        worker = self.sender()
        if worker is None or self._closing:
            return
        self._pass_on(worker)
        self._outcome(worker, result, error)

    def _outcome(self, worker: Any, result: object, error: WeftError | None) -> None:
        self._over.add(worker.job.id)
        job = self._store.get(worker.job.id)
        self.ended.emit(job, result, error)
        steps = (_envelope(job) or {}).get("then") or []
        step = msgspec.convert(steps[0], Step) if steps else None
        if step is not None and (step.always or job.state is JobState.DONE):
            following = self.submit(
                step.task,
                step.title,
                step.parameters,
                environment=step.environment,
                resource=step.resource,
                then=steps[1:],
            )
            self.followed.emit(job.id, following)

    @Slot()
    def _finished(self) -> None:
        done = self.sender()
        for resource, worker in list(self._running.items()):
            if worker is done:  # another one that has finished too may not have been heard to its end
                del self._running[resource]
                self._latest.pop(worker.job.id, None)
                self._held.discard(worker.job.id)
                self._over.discard(worker.job.id)
                worker.deleteLater()
        self._next()

    def _end(self, job: Job, state: JobState, error: WeftError) -> None:
        job = self._store.update(job.id, state=state, message=error.message, hint=error.hint)
        self.ended.emit(job, None, error)
        self.changed.emit()


class _Client:
    """Makes one job's child, in the worker's thread."""

    def __init__(self, make: Callable[[str, Path], Any], environment: str, log_path: Path) -> None:
        self._make, self._environment, self._log = make, environment, log_path

    def __call__(self) -> Any:
        return self._make(self._environment, self._log)


def _envelope(job: Job) -> dict[str, Any] | None:
    try:
        found = json.loads(job.parameters)
    except ValueError:
        return None
    well = isinstance(found, dict) and isinstance(found.get("environment"), str)
    return found if well and isinstance(found.get("parameters"), dict) else None


def parameters_of(job: Job) -> dict[str, Any]:
    """The task's parameters of a job of the queue; {} for another kind."""
    envelope = _envelope(job)
    return {} if envelope is None else envelope["parameters"]
