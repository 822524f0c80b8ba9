"""Jobs: they outlive the window, so that after a restart each is there with what to do next."""

from __future__ import annotations

import os
import time
from functools import cached_property
from typing import Any

import msgspec

from app.core.errors import ErrorKind, WeftError
from app.core.jobs import Job, JobState, Progress
from app.store.database import Database

_COLUMNS = "id, task, title, resource, state, parameters, progress, message, hint, log, created, started, ended"
_CHANGEABLE = frozenset(
    {"title", "resource", "state", "parameters", "progress", "message", "hint", "log", "started", "ended"}
)


class JobStore:
    """All jobs. Every method may be called from any thread, and raises WeftError as `Database.execute` does."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @cached_property
    def _process(self) -> tuple[int, float]:
        """Who writes: this process, and when it began."""
        return os.getpid(), _process_start(os.getpid()) or 0.0

    def create(self, task: str, title: str, resource: str = "cpu", parameters: str = "{}", log: str = "") -> Job:
        """A new job, QUEUED, that belongs to this process."""
        row = self._database.execute(
            "INSERT INTO jobs (task, title, resource, parameters, log, created, owner, owner_started)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (task, title, resource, parameters, log, time.time(), *self._process),
        ).lastrowid
        assert row is not None
        return self.get(row)

    def update(self, job: int, **fields: object) -> Job:
        """Change fields of a job. `started` and `ended` follow from the state unless given.

        Raises:
            WeftError: NOT_FOUND.
            TypeError: for a field that a job does not have or that never changes.
        """
        unknown = fields.keys() - _CHANGEABLE
        if unknown:
            raise TypeError(f"a job's {', '.join(sorted(unknown))} cannot be set")
        state = fields.get("state")
        if isinstance(state, JobState):
            if state.ended:
                fields.setdefault("ended", time.time())
            elif state is not JobState.QUEUED:
                before = self.get(job)
                if not before.started:
                    fields.setdefault("started", time.time())
        values = {name: _encoded(value) for name, value in fields.items()}
        if values:
            assignments = ", ".join(f"{name} = ?" for name in values)
            self._database.execute(f"UPDATE jobs SET {assignments} WHERE id = ?", (*values.values(), job))
        return self.get(job)

    def get(self, job: int) -> Job:
        """One job. Raises WeftError NOT_FOUND."""
        row = self._database.row(f"SELECT {_COLUMNS} FROM jobs WHERE id = ?", (job,))
        if row is None:
            raise WeftError(ErrorKind.NOT_FOUND, f"There is no job {job}.", "It may have been removed from the list.")
        return _job(row)

    def jobs(self, limit: int | None = None, *, state: JobState | None = None) -> list[Job]:
        """The jobs, the latest first."""
        where, parameters = ("", ()) if state is None else (" WHERE state = ?", (state.value,))
        rows = self._database.rows(
            f"SELECT {_COLUMNS} FROM jobs{where} ORDER BY id DESC LIMIT ?",
            (*parameters, -1 if limit is None else limit),
        )
        return [_job(row) for row in rows]

    def remove(self, job: int) -> None:
        """Take an ended job off the list. Its log and its result stay on disk.

        Raises:
            WeftError: BUSY while it is queued or running; NOT_FOUND.
        """
        if not self.get(job).state.ended:
            raise WeftError(ErrorKind.BUSY, f"Job {job} has not ended.", "Cancel it first.")
        self._database.execute("DELETE FROM jobs WHERE id = ?", (job,))

    def release(self) -> None:
        """Close this thread's connection; a thread that ends calls it last."""
        self._database.release()

    def mark_interrupted(self) -> list[Job]:
        """At start: jobs whose process is gone without ending them become CRASHED. Returns these."""
        open_states = tuple(state.value for state in JobState if not state.ended)
        rows = self._database.rows(
            f"SELECT id, state, owner, owner_started FROM jobs WHERE state IN ({', '.join('?' * len(open_states))})",
            open_states,
        )
        marked: list[Job] = []
        for job, state, owner, owner_started in rows:
            start = _process_start(owner)
            if start is not None and abs(start - owner_started) < 1.0:
                continue  # a command line or another window still runs it
            begun = state != JobState.QUEUED.value
            marked.append(
                self.update(
                    job,
                    state=JobState.CRASHED,
                    message="Weft was closed or killed while this ran."
                    if begun
                    else "Weft was closed before this began.",
                    hint="Start it again: what was already complete is used."
                    if begun
                    else "Start it again; nothing was done yet.",
                )
            )
        return marked


def _process_start(process: int) -> float | None:
    """When a process began, in seconds since the epoch; None when there is none of that id."""
    import psutil  # the window's first paint does not wait for it

    try:
        return psutil.Process(process).create_time()
    except (psutil.NoSuchProcess, ValueError):
        return None
    except psutil.AccessDenied:
        return 0.0


def _encoded(value: object) -> object:
    if isinstance(value, Progress):
        return msgspec.json.encode(value).decode()
    return value.value if isinstance(value, JobState) else value


def _job(row: Any) -> Job:
    key, task, title, resource, state, parameters, progress, message, hint, log, created, started, ended = row
    return Job(
        id=key,
        task=task,
        title=title,
        resource=resource,
        state=JobState(state),
        parameters=parameters,
        progress=None if progress is None else msgspec.json.decode(progress, type=Progress),
        message=message,
        hint=hint,
        log=log,
        created=created,
        started=started,
        ended=ended,
    )
