"""What training runs said, for their curves and answers after a restart, whatever becomes of their adapters."""

from __future__ import annotations

import msgspec

from app.store.database import Database


class RunHistory(msgspec.Struct, frozen=True, kw_only=True):
    """One run as it was watched.

    Attributes:
        curves: metric -> points (step, value) in order of step. samples: (step, ((question, answer), …)).
        notes: sentences. ended: how it ended, "" while it has not. seconds: that it took, 0 when not known.
    """

    curves: dict[str, tuple[tuple[float, float], ...]] = {}
    samples: tuple[tuple[int, tuple[tuple[str, str], ...]], ...] = ()
    notes: tuple[str, ...] = ()
    ended: str = ""
    seconds: float = 0.0


class RunStore:
    """Histories by job. Every method may be called from any thread, and raises WeftError as `Database.execute` does."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def save(self, job: int, history: RunHistory) -> None:
        """Keep a job's history in place of what was kept of it. A job that was removed meanwhile is left alone."""
        self._database.execute(
            "INSERT INTO runs (job, history) SELECT id, ? FROM jobs WHERE id = ?"
            " ON CONFLICT (job) DO UPDATE SET history = excluded.history",
            (msgspec.json.encode(history), job),
        )

    def load(self, job: int) -> RunHistory | None:
        """A job's history; None when there is none that can be read."""
        row = self._database.row("SELECT history FROM runs WHERE job = ?", (job,))
        try:
            return None if row is None else msgspec.json.decode(row[0], type=RunHistory)
        except msgspec.MsgspecError:
            return None  # of another version: the run's own record is read instead
