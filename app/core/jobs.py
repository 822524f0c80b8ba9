"""Job, JobState and Progress: long work as the store, the window and the command line see it."""

from __future__ import annotations

from enum import StrEnum

import msgspec


class JobState(StrEnum):
    """A job goes QUEUED, STARTING, RUNNING, then ends in one of the other states."""

    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    CRASHED = "crashed"

    @property
    def ended(self) -> bool:
        return self not in (JobState.QUEUED, JobState.STARTING, JobState.RUNNING)


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a piece of work is.

    Attributes:
        phase: what is being done, in words ("Reading the prompt", "Compiling llama.cpp").
        done, total: in `unit`; total 0 means unknown.
        unit: "tokens", "bytes", "tensors", "steps", or "".
    """

    phase: str
    done: float = 0.0
    total: float = 0.0
    unit: str = ""

    @property
    def fraction(self) -> float | None:
        """0 to 1, or None while the total is unknown."""
        return min(1.0, self.done / self.total) if self.total > 0 else None


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One run of a task.

    Attributes:
        id: row number in the store.
        task: the task's name (`install_environment`, `download`, `train`, …).
        title: what a person sees.
        resource: what it contends for (`cpu`, `gpu:0`, `network`): one at a time runs on each.
        parameters: JSON, as the task takes them.
        message, hint: how it ended, when it failed.
        log: path of its log file.
        created, started, ended: seconds since the epoch, 0 when not yet.
    """

    id: int
    task: str
    title: str
    resource: str = "cpu"
    state: JobState = JobState.QUEUED
    parameters: str = "{}"
    progress: Progress | None = None
    message: str = ""
    hint: str = ""
    log: str = ""
    created: float = 0.0
    started: float = 0.0
    ended: float = 0.0
