"""Merges and exports that were killed: offered again when Weft starts, cleared away when nobody wants them any more."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

from PySide6.QtCore import QObject, Signal, Slot

from app.adapters.merge_leftovers import Leftover, find_leftovers, leftover_of, sweep
from app.core.errors import WeftError
from app.core.jobs import Job, JobState
from app.store.jobs import JobStore
from app.viewmodels.background import Background
from app.viewmodels.tasks import TaskQueue, parameters_of

TASKS = ("merge", "export_gguf", "quantize")
_MESSAGE = "It was killed while it ran."
log = logging.getLogger("weft")


class Leftovers(QObject):
    """Looks for staging folders.

    Args:
        roots: folders in which results lie, and those right below them; asked in a thread.

    Signals:
        found(list of Job): what can be gone on with is among the jobs now.
    """

    found = Signal(list)

    def __init__(
        self, store: JobStore, queue: TaskQueue, roots: Callable[[], Iterable[Path]], parent: QObject | None = None
    ) -> None:
        super().__init__(parent)
        self._store, self._queue, self._roots = store, queue, roots
        self._work = Background(self)
        self._work.done.connect(self._worked)
        queue.ended.connect(self._ended)

    def look(self) -> None:
        """At start: what is of no use goes, what no job knows of becomes one that can be started again."""
        self._work.run("look", self._looked)

    def _looked(self) -> list[Leftover]:
        lost = find_leftovers(self._roots())
        for left in lost:
            if left.useless:
                log.info("Clearing %s away (%d bytes): it can no longer be gone on with", left.folder, left.bytes)
                sweep(left)
        return [left for left in lost if left.complete and not left.useless and left.task in TASKS]

    @Slot(object)
    def forget(self, job: Job) -> None:
        """A job was taken off the list: what it has left goes too, unless another one would go on from it."""
        if job.task not in TASKS or job.state is JobState.DONE:
            return
        target = str(parameters_of(job).get("target") or "")
        if target and target not in self._known():
            self._work.run("forget", lambda: _forget(Path(target)))

    @Slot(object, object, object)
    def _ended(self, job: Job, _result: object, _error: object) -> None:
        """A cancelled job that had to be ended in the middle of something leaves as little as one that heard it."""
        if job.task not in TASKS or job.state is not JobState.CANCELLED:
            return
        target = str(parameters_of(job).get("target") or "")
        if target and target not in self._known(job.id):
            self._work.run("forget", lambda: _forget(Path(target)))

    def close(self) -> None:
        """Wait for what is under way."""
        self._work.close()

    def _known(self, without: int = 0) -> set[str]:
        """Targets of the jobs that run, wait, or may be started again."""
        jobs = [j for j in self._store.jobs() if j.task in TASKS and j.state is not JobState.DONE and j.id != without]
        return {str(parameters_of(job).get("target") or "") for job in jobs}

    @Slot(object, object, object)
    def _worked(self, key: object, result: object, _error: object) -> None:
        if key != "look" or not isinstance(result, list):
            return
        try:
            known = self._known()
            made = [self._adopt(left) for left in result if left.target not in known]
        except WeftError as error:
            log.warning("What was interrupted could not be listed: %s", error)
            return
        if made:
            self.found.emit(made)

    def _adopt(self, left: Leftover) -> Job:
        verb = {"merge": "Merge", "quantize": "Quantize"}.get(left.task, "Export")
        title = f"{verb} {Path(left.target).name}"
        return self._queue.adopt(left.task, title, left.parameters, environment=left.environment, message=_MESSAGE)


def _forget(target: Path) -> None:
    left = leftover_of(target)
    if left is not None:
        sweep(left)
