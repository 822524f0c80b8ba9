"""A thread that installs one engine environment, as a job that outlives the window in the store."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import TextIO

import msgspec
from PySide6.QtCore import QObject, QThread, Signal

from app.core.errors import ErrorKind, WeftError
from app.core.jobs import Job, JobState, Progress
from app.engine.environments import Environments
from app.store.jobs import JobStore

TASK = "install_environment"
_STORED_EVERY = 1.0  # seconds between writes of the progress into the store


class EnvironmentWorker(QThread):
    """Installs (or repairs) one environment. `start()` it after connecting; it ends when the installation does.

    Attributes:
        name: of the environment. job: the row in the store, as it was when this was made.

    Signals:
        progress(Progress); log(a line of what uv says); finished_well(); failed(WeftError, CANCELLED included).
        Exactly one of the last two comes, before QThread's own `finished`.
    """

    progress = Signal(object)
    log = Signal(str)
    finished_well = Signal()
    failed = Signal(object)

    def __init__(
        self, environments: Environments, name: str, jobs: JobStore, *, repair: bool = False, parent: QObject | None = None
    ) -> None:
        super().__init__(parent)
        self.setObjectName(f"environment {name}")
        self.name = name
        self._environments = environments
        self._jobs = jobs
        self._repair = repair
        self._cancel = threading.Event()
        self._stored = 0.0
        spec = environments.spec(name)
        self.job: Job = jobs.create(
            TASK,
            f"{'Repair' if repair else 'Install'} {spec.title}",
            resource="cpu" if any(layer.compiles for layer in spec.layers) else "network",
            parameters=msgspec.json.encode({"name": name, "repair": repair}).decode(),
            log=str(environments.log_path(name)),
        )

    def cancel(self) -> None:
        """Stop within a second, with everything that was started; what is complete is kept. From any thread."""
        self._cancel.set()

    def run(self) -> None:
        """The thread's own work; call `start()`, not this."""
        try:
            error = self._install()
        finally:
            self._jobs.release()
        if error is None:
            self.finished_well.emit()
        else:
            self.failed.emit(error)

    def _install(self) -> WeftError | None:
        error: WeftError | None = None
        try:
            self._jobs.update(self.job.id, state=JobState.RUNNING)
            self._environments.root.mkdir(parents=True, exist_ok=True)
            with self._environments.log_path(self.name).open("a", encoding="utf-8") as file:
                log = _Log(file, self.log.emit)
                self._environments.install(self.name, self._report, log, self._cancel.is_set, repair=self._repair)
        except WeftError as failure:
            error = failure
        except OSError as failure:
            error = WeftError(
                ErrorKind.PERMISSION, f"{failure.filename}: {failure.strerror}", "Check that the folder can be written, then retry."
            )
        except Exception as failure:  # noqa: BLE001  a defect of ours must reach the window, not end a thread in silence
            error = WeftError(ErrorKind.INTERNAL, f"The installation failed: {failure!r}", "Please report this, with its log.")
        with contextlib.suppress(WeftError):  # a full disk fails the installation and this; the signal still says so
            self._record(error)
        return error

    def _record(self, error: WeftError | None) -> None:
        if error is None:
            self._jobs.update(self.job.id, state=JobState.DONE, progress=Progress(phase="Installed", done=1, total=1))
        else:
            state = JobState.CANCELLED if error.kind is ErrorKind.CANCELLED else JobState.FAILED
            self._jobs.update(self.job.id, state=state, message=error.message, hint=error.hint)

    def _report(self, progress: Progress) -> None:
        self.progress.emit(progress)
        now = time.monotonic()
        if now - self._stored >= _STORED_EVERY:
            self._stored = now
            self._jobs.update(self.job.id, progress=progress)


class _Log:
    """Writes to the log file and hands on every whole line."""

    def __init__(self, file: TextIO, line: Callable[[str], None]) -> None:
        self._file = file
        self._line = line
        self._rest = ""

    def write(self, text: str, /) -> int:
        """Write text; whole lines are handed on."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._line(line)
        return self._file.write(text)

    def flush(self) -> None:
        """Flush the file."""
        self._file.flush()
