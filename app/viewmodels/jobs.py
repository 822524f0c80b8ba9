"""Jobs as the window sees them: what runs now, what ran before, and the queue of environment installations."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from PySide6.QtCore import QAbstractTableModel, QModelIndex, QObject, QPersistentModelIndex, Qt, QTimer, Signal, Slot

from app.core.errors import WeftError
from app.core.jobs import Job, JobState, Progress
from app.engine.environments import USABLE, Environments
from app.store.jobs import JobStore
from app.viewmodels.tasks import TaskQueue
from app.viewmodels.units import readable_bytes, readable_seconds, readable_when

log = logging.getLogger("weft")
Index = QModelIndex | QPersistentModelIndex
INSTALL = "install_environment"
REFRESH_MS = 250
SHOWN = 500
CLOSE_MS = 5000


class Pace:
    """Seconds left, from how far a piece of work has come, lately and in all. Time in which it was held does not count."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._away = 0.0  # seconds of pauses that are over
        self._held: float | None = None  # when the pause began that is not
        self._points: list[tuple[float, float]] = []
        self._begun = (0.0, 0.0)
        self._phase_total = 0.0

    def hold(self, held: bool) -> None:
        """The work was paused, or goes on."""
        if held and self._held is None:
            self._held = self._clock()
        elif not held and self._held is not None:
            self._away += self._clock() - self._held
            self._held = None

    def _now(self) -> float:
        """The clock, without pauses."""
        return (self._clock() if self._held is None else self._held) - self._away

    def add(self, progress: Progress) -> None:
        now = self._now()
        if progress.total != self._phase_total or (self._points and progress.done < self._points[-1][1]):
            self._points.clear()
            self._begun = (now, progress.done)
            self._phase_total = progress.total
        if not self._points or now - self._points[-1][0] >= 0.5:
            self._points.append((now, progress.done))
            # The last half minute tells more than the whole: downloads and compilers change their speed.
            while len(self._points) > 2 and now - self._points[0][0] > 30:
                self._points.pop(0)

    @property
    def speed(self) -> float:
        """Units a second; 0 while unknown."""
        if len(self._points) < 2:
            return 0.0
        (start, first), (end, last) = self._points[0], self._points[-1]
        return (last - first) / (end - start) if end - start >= 1.5 and last > first else 0.0

    def left(self, progress: Progress) -> float | None:
        """Seconds, or None while unknown.

        The slower of the last half minute and of the whole: where packages are unpacked a gigabyte comes in a second, and what
        follows takes minutes all the same.
        """
        rest = progress.total - progress.done
        if not self.speed or rest <= 0:
            return None
        start, first = self._begun
        whole = rest * (self._now() - start) / (progress.done - first) if progress.done > first else 0.0
        return max(rest / self.speed, whole)


class Running:
    """A job at work in this process."""

    def __init__(self, environment: str, worker: Any) -> None:
        self.environment = environment
        self.worker = worker
        self.progress: Progress | None = None
        self.pace = Pace()
        self.error: WeftError | None = None
        self.well = False


class JobCenter(QObject):
    """Starts, follows and ends jobs. Environments are installed one after the other.

    Args:
        make_worker: makes the worker (a QThread) that installs the environment of this name.

    Signals:
        changed: some job changed; at most a few times a second.
        progressed(name, Progress): an installation came further.
        environment_ready(name), environment_failed(name, WeftError), environment_changed(name): after the fact.
        removed(Job): an ended one was taken off the list by a person.
    """

    changed = Signal()
    progressed = Signal(str, object)
    environment_ready = Signal(str)
    environment_failed = Signal(str, object)
    environment_changed = Signal(str)
    removed = Signal(object)

    def __init__(
        self,
        store: JobStore,
        environments: Environments,
        make_worker: Callable[[str, bool], Any],
        parent: QObject | None = None,
        *,
        tasks: TaskQueue | None = None,
    ) -> None:
        super().__init__(parent)
        self._store = store
        self.tasks = tasks
        self._environments = environments
        self._make_worker = make_worker
        self._queue: list[tuple[str, bool]] = []
        self.running: Running | None = None
        self._throttle = QTimer(self)
        self._throttle.setSingleShot(True)
        self._throttle.setInterval(REFRESH_MS)
        self._throttle.timeout.connect(self.changed)
        self._paces: dict[int, Pace] = {}
        if tasks is not None:
            tasks.changed.connect(self.changed)
            tasks.progressed.connect(self._task_progress)
            tasks.held.connect(self._task_held)
            tasks.ended.connect(self._task_ended)

    # Environments -----------------------------------------------------------------------------------

    def is_ready(self, name: str) -> bool:
        """Whether the environment of this name can be used."""
        return self._environments.state(name) in USABLE

    def title(self, name: str) -> str:
        return self._environments.spec(name).title

    def expected_bytes(self, name: str) -> int:
        """About what it takes on the disk when it is installed."""
        return self._environments.expected_bytes(name)

    def is_installing(self, name: str) -> bool:
        """Whether it is being installed now, or waits for its turn."""
        return (self.running is not None and self.running.environment == name) or any(
            name == queued for queued, _ in self._queue
        )

    def install(self, name: str, *, repair: bool = False) -> None:
        """Install an environment as a job, after those that wait already. Does nothing when it is under way."""
        if not self.is_installing(name):
            self._queue.append((name, repair))
            self._next()
            self.changed.emit()

    def cancel_install(self, name: str) -> None:
        self._queue = [(queued, repair) for queued, repair in self._queue if queued != name]
        if self.running is not None and self.running.environment == name:
            self.running.worker.cancel()
        self.changed.emit()

    @property
    def waiting(self) -> list[str]:
        """Environments whose turn has not come."""
        return [name for name, _ in self._queue]

    def _next(self) -> None:
        if self.running is not None or not self._queue:
            return
        name, repair = self._queue.pop(0)
        try:
            worker = self._make_worker(name, repair)
        except WeftError as error:
            self.environment_failed.emit(name, error)
            QTimer.singleShot(0, self, self._next)
            return
        self._forget_interrupted(name, worker.job.id)
        self.running = Running(name, worker)
        worker.progress.connect(self._progress)
        worker.finished_well.connect(self._well)
        worker.failed.connect(self._failed)
        worker.finished.connect(self._finished)
        worker.start()

    def _forget_interrupted(self, name: str, now: int) -> None:
        """The installation goes on as job `now`: what was interrupted before is the same work, and not listed a second time."""
        try:
            for job in self._store.jobs(SHOWN):
                same = job.task == INSTALL and environment_of(job) == name
                if same and job.state is JobState.CRASHED and job.id != now:
                    self._store.remove(job.id)
        except WeftError as error:
            log.warning("An old job could not be taken off the list: %s", error)

    @Slot(object)
    def _progress(self, progress: Progress) -> None:
        if self.running is not None:
            self.running.progress = progress
            self.running.pace.add(progress)
            self.progressed.emit(self.running.environment, progress)
            if not self._throttle.isActive():
                self._throttle.start()

    @Slot(int, object)
    def _task_progress(self, job: int, progress: Progress) -> None:
        if job not in self._paces:
            self._paces[job] = Pace()
            self._paces[job].hold(self.tasks is not None and self.tasks.is_held(job))
        self._paces[job].add(progress)
        if not self._throttle.isActive():
            self._throttle.start()

    @Slot(int, bool)
    def _task_held(self, job: int, held: bool) -> None:
        if job in self._paces:
            self._paces[job].hold(held)
        self.changed.emit()

    @Slot(object, object, object)
    def _task_ended(self, job: Job, _result: object, _error: object) -> None:
        self._paces.pop(job.id, None)
        self.changed.emit()

    @Slot()
    def _well(self) -> None:
        if self.running is not None:
            self.running.well = True

    @Slot(object)
    def _failed(self, error: WeftError) -> None:
        if self.running is not None:
            self.running.error = error

    @Slot()
    def _finished(self) -> None:
        # The thread has ended, so the job's last state is in the store by now.
        running, self.running = self.running, None
        if running is None:
            return
        running.worker.deleteLater()
        if running.well:
            self.environment_ready.emit(running.environment)
        elif running.error is not None:
            self.environment_failed.emit(running.environment, running.error)
        self.environment_changed.emit(running.environment)
        self.changed.emit()
        self._next()

    # Jobs -------------------------------------------------------------------------------------------

    def jobs(self) -> list[Job]:
        """Newest first, with the live progress of what runs here."""
        found = self._store.jobs(SHOWN)
        live = self.live_job
        if live is not None and self.running is not None:
            found = [live if job.id == live.id else job for job in found]
        return [self._with_progress(job) for job in found]

    def _with_progress(self, job: Job) -> Job:
        progress = self.tasks.progress(job.id) if self.tasks is not None and not job.state.ended else None
        return job if progress is None else msgspec.structs.replace(job, progress=progress)

    def _is_task(self, job: Job) -> bool:
        return self.tasks is not None and job.task != INSTALL and self.tasks.owns(job)

    @property
    def busy(self) -> bool:
        """Whether anything runs in this process."""
        return self.running is not None or (self.tasks is not None and self.tasks.busy)

    @property
    def fraction(self) -> float | None:
        """0 to 1 of what runs in this process, -1 while that is unknown; None when nothing runs."""
        if not self.busy:
            return None
        progress = self.running.progress if self.running is not None else None
        if progress is None and self.tasks is not None:
            progress = self.tasks.any_progress
        fraction = progress.fraction if progress is not None else None
        return -1.0 if fraction is None else fraction

    @property
    def live_job(self) -> Job | None:
        """The job at work in this process."""
        if self.running is None:
            return None
        for job in self._store.jobs(50):
            if not job.state.ended and job.task == INSTALL and environment_of(job) == self.running.environment:
                return job
        return None

    def log_path(self, job: Job) -> Path | None:
        return Path(job.log) if job.log else None

    def seconds_left(self, job: Job) -> float | None:
        if job.id in self._paces and job.progress is not None:
            return self._paces[job.id].left(job.progress)
        if self.running is None or self.running.progress is None or environment_of(job) != self.running.environment:
            return None
        return self.running.pace.left(self.running.progress)

    def is_held(self, job: Job) -> bool:
        """Whether it was told to pause."""
        return not job.state.ended and self.tasks is not None and self.tasks.is_held(job.id)

    def can_cancel(self, job: Job) -> bool:
        if self._is_task(job):
            return self.tasks is not None and self.tasks.is_active(job.id)
        return job.task == INSTALL and not job.state.ended and self.is_installing(environment_of(job))

    def can_retry(self, job: Job) -> bool:
        if self._is_task(job):
            return job.state in (JobState.FAILED, JobState.CANCELLED, JobState.CRASHED)
        if job.task != INSTALL or job.state not in (JobState.FAILED, JobState.CANCELLED, JobState.CRASHED):
            return False
        name = environment_of(job)
        return name in self._environments.specs() and not self.is_installing(name) and not self.is_ready(name)

    def cancel(self, job: Job) -> None:
        if self.tasks is not None and self._is_task(job):
            self.tasks.cancel(job.id)
        elif self.can_cancel(job):
            self.cancel_install(environment_of(job))

    def retry(self, job: Job) -> None:
        if self.tasks is not None and self._is_task(job):
            self.tasks.retry(job.id)
        elif self.can_retry(job):
            self.install(environment_of(job))

    def remove(self, job: Job) -> None:
        """Take an ended job off the list; its log stays."""
        if job.state.ended:
            self._store.remove(job.id)
            self.removed.emit(job)
            self.changed.emit()

    def close(self) -> None:
        """Cancel what runs and wait for it: the window is going. It goes on from there next time."""
        self._queue.clear()
        running = self.running
        if running is None:
            return
        job = running.worker.job
        running.worker.cancel()
        if not running.worker.wait(CLOSE_MS):
            log.error("The installation of %s did not stop within %d s", running.environment, CLOSE_MS // 1000)
        if self._store.get(job.id).state is not JobState.DONE:
            # Not what the user cancelled: the next start goes on with it.
            message, hint = "Weft was closed meanwhile.", "It goes on when Weft starts again."
            self._store.update(job.id, state=JobState.CRASHED, message=message, hint=hint)


def environment_of(job: Job) -> str:
    """The environment that an installation job is about, or ""."""
    try:
        found = json.loads(job.parameters)
    except ValueError:
        return ""
    return str(found.get("environment") or found.get("name") or "") if isinstance(found, dict) else ""


STATE_WORDS = {
    JobState.QUEUED: ("Waiting", "clock", "muted"),
    JobState.STARTING: ("Starting", "clock", "accent"),
    JobState.RUNNING: ("Running", "reload", "accent"),
    JobState.DONE: ("Done", "done", "positive"),
    JobState.FAILED: ("Failed", "error", "negative"),
    JobState.CANCELLED: ("Cancelled", "cancelled", "muted"),
    JobState.CRASHED: ("Interrupted", "warning", "warning"),
}


def progress_text(progress: Progress | None, left: float | None = None) -> str:
    """`Downloading torch · 312 MB of 1.1 GB · 4 min left`."""
    if progress is None:
        return ""
    parts = [progress.phase]
    if progress.unit == "bytes" and progress.done:
        of = f" of {readable_bytes(progress.total)}" if progress.total else ""
        parts.append(f"{readable_bytes(progress.done)}{of}")
    elif progress.total:
        unit = f" {progress.unit}" if progress.unit else ""
        parts.append(f"{progress.done:,.0f} of {progress.total:,.0f}{unit}")
    if left is not None:
        parts.append(f"{readable_seconds(left)} left")
    return " · ".join(part for part in parts if part)


JOB, STATE, PROGRESS, STARTED, TOOK = range(5)
_HEADERS = ("Job", "State", "Progress", "Started", "Took")
JobRole = Qt.ItemDataRole.UserRole
FractionRole = Qt.ItemDataRole.UserRole + 1


class JobTable(QAbstractTableModel):
    """Jobs as a table, newest first."""

    def __init__(self, center: JobCenter, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._center = center
        self.jobs: list[Job] = []
        center.changed.connect(self.refresh)
        self.refresh()

    @Slot()
    def refresh(self) -> None:
        jobs = self._center.jobs()
        if [job.id for job in jobs] == [job.id for job in self.jobs]:
            changed = [
                row
                for row, (old, new) in enumerate(zip(self.jobs, jobs, strict=True))
                if old != new or not new.state.ended
            ]
            self.jobs = jobs
            for row in changed:
                self.dataChanged.emit(self.index(row, 0), self.index(row, len(_HEADERS) - 1))
            return
        self.beginResetModel()
        self.jobs = jobs
        self.endResetModel()

    def rowCount(self, parent: Index = QModelIndex()) -> int:
        return 0 if parent.isValid() else len(self.jobs)

    def columnCount(self, parent: Index = QModelIndex()) -> int:
        return 0 if parent.isValid() else len(_HEADERS)

    def headerData(self, section: int, orientation: Qt.Orientation, role: int = Qt.ItemDataRole.DisplayRole) -> object:
        if orientation == Qt.Orientation.Horizontal:
            if role == Qt.ItemDataRole.DisplayRole:
                return _HEADERS[section]
            if role == Qt.ItemDataRole.TextAlignmentRole:
                return int(Qt.AlignmentFlag.AlignLeft | Qt.AlignmentFlag.AlignVCenter)
        return None

    def data(self, index: Index, role: int = Qt.ItemDataRole.DisplayRole) -> object:
        job = self.jobs[index.row()]
        if role in (Qt.ItemDataRole.DisplayRole, Qt.ItemDataRole.AccessibleTextRole):
            return self._text(job, index.column())
        if role == Qt.ItemDataRole.ToolTipRole:
            return f"{job.message} {job.hint}".strip() or self._text(job, index.column())
        if role == JobRole:
            return job
        if role == FractionRole and not job.state.ended:
            progress = self._progress(job)
            return None if progress is None else progress.fraction
        return None

    def _progress(self, job: Job) -> Progress | None:
        running = self._center.running
        if running is not None and not job.state.ended and environment_of(job) == running.environment:
            return running.progress or job.progress
        return job.progress

    def _text(self, job: Job, column: int) -> str:
        if column == JOB:
            return job.title
        if column == STATE:
            return "Paused" if self._center.is_held(job) else STATE_WORDS[job.state][0]
        if column == PROGRESS:
            if job.state.ended:
                return job.message or ("" if job.state is JobState.DONE else job.hint)
            return progress_text(self._progress(job), self._center.seconds_left(job))
        if column == STARTED:
            return readable_when(job.started or job.created)
        end = job.ended or (time.time() if not job.state.ended else 0)
        return readable_seconds(end - job.started) if job.started and end else "–"
