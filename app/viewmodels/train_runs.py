"""All training runs: what runs now, what waits, and what there was, from the store and from the adapters' own records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
from PySide6.QtCore import QObject, QTimer, Signal, Slot

from app.core.errors import WeftError
from app.core.jobs import Job, Progress
from app.store.jobs import JobStore
from app.training.card import read_record
from app.training.run_config import RunConfig, TrainNews, TrainResult
from app.viewmodels.jobs import Pace
from app.viewmodels.tasks import TaskQueue, parameters_of
from app.viewmodels.train_draft import RunState

SHOWN = 200
REFRESH_MS = 200


class TrainRuns(QObject):
    """The runs, newest first.

    Signals:
        changed: the list did. updated(job id): a run said something. ended(job id): a run ended.
    """

    changed = Signal()
    updated = Signal(int)
    ended = Signal(int)

    def __init__(self, store: JobStore, queue: TaskQueue, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._store, self._queue = store, queue
        self._states: dict[int, RunState] = {}
        self._paces: dict[int, Pace] = {}
        self._touched: set[int] = set()
        self._timer = QTimer(self)
        self._timer.setSingleShot(True)
        self._timer.setInterval(REFRESH_MS)
        self._timer.timeout.connect(self._tell)
        queue.changed.connect(self.changed)
        queue.progressed.connect(self._progressed)
        queue.metric.connect(self._metric)
        queue.news.connect(self._news)
        queue.warned.connect(self._warned)
        queue.ended.connect(self._ended)

    def jobs(self) -> list[Job]:
        """The training jobs of the store."""
        return [job for job in self._store.jobs(SHOWN) if job.task == "train"]

    def is_active(self, job: Job) -> bool:
        return self._queue.is_active(job.id)

    def is_running(self, job: Job) -> bool:
        return self._queue.is_running(job.id)

    def config(self, job: Job) -> RunConfig | None:
        """The settings of a run."""
        try:
            return msgspec.convert(parameters_of(job).get("config"), RunConfig)
        except msgspec.ValidationError:
            return None

    def folder(self, job: Job) -> Path | None:
        """Where its adapter is, or will be."""
        config = self.config(job)
        return Path(config.output.dir) if config is not None and config.output.dir else None

    def state(self, job: Job) -> RunState:
        """What is known of a run: live, or read back from its record."""
        if job.id not in self._states:
            self._states[job.id] = self._read_back(job)
        return self._states[job.id]

    def _read_back(self, job: Job) -> RunState:
        state = RunState(job, self)
        folder = self.folder(job)
        if folder is None:
            return state
        record = read_record(folder) or read_record(folder.with_name(folder.name + ".training"))
        if record is not None:
            for step, loss in enumerate(record.losses, 1):
                state.add(step, {"loss": loss})
            for step, loss in record.held_out_losses:
                state.add(int(step), {"held_out_loss": loss})
            state.notes = list(record.notes)
        return state

    def seconds_left(self, job: Job) -> float | None:
        """As the run itself says, else from its pace."""
        state = self.state(job)
        told = state.latest("seconds_left")
        if told is not None and self.is_running(job):
            return told
        pace = self._paces.get(job.id)
        return pace.left(state.progress) if pace is not None and state.progress is not None else None

    # Acts -----------------------------------------------------------------------------------------

    def tell(self, job: Job, action: str) -> None:
        """`pause`, `resume`, `stop`, `checkpoint` or `sample`."""
        self._queue.adjust(job.id, {"action": action})

    def cancel(self, job: Job) -> None:
        """End it; its checkpoints stay, so that it can go on later."""
        self._queue.cancel(job.id)

    def resume(self, job: Job) -> Job:
        """Go on from the last checkpoint, as a new job. Raises WeftError."""
        made = self._queue.retry(job.id)
        old = self._states.get(job.id)
        if old is not None:  # the charts go on from what was drawn
            state = RunState(made, self)
            state.metrics = {name: dict(points) for name, points in old.metrics.items()}
            state.samples = list(old.samples)
            self._states[made.id] = state
        return made

    def remove(self, job: Job) -> None:
        """Take an ended run off the list. Its adapter stays."""
        self._store.remove(job.id)
        self._states.pop(job.id, None)
        self.changed.emit()

    # What runs say --------------------------------------------------------------------------------

    def _mine(self, number: int) -> RunState | None:
        if number not in self._states:
            try:
                job = self._store.get(number)
            except WeftError:
                return None
            if job.task != "train":
                return None
            self._states[number] = RunState(job, self)
        return self._states[number]

    def _touch(self, number: int) -> None:
        self._touched.add(number)
        if not self._timer.isActive():
            self._timer.start()

    @Slot()
    def _tell(self) -> None:
        touched, self._touched = self._touched, set()
        for number in touched:
            self.updated.emit(number)

    @Slot(int, object)
    def _progressed(self, number: int, progress: Progress) -> None:
        state = self._mine(number)
        if state is not None:
            state.progress = progress
            if progress.phase == "Training":
                self._paces.setdefault(number, Pace()).add(progress)
            self._touch(number)

    @Slot(int, int, object)
    def _metric(self, number: int, step: int, values: dict[str, float]) -> None:
        state = self._mine(number)
        if state is not None:
            state.add(step, values)
            self._touch(number)

    @Slot(int, str)
    def _news(self, number: int, text: str) -> None:
        state = self._mine(number)
        if state is None:
            return
        try:
            news = msgspec.json.decode(text, type=TrainNews)
        except (msgspec.MsgspecError, json.JSONDecodeError):
            return
        if news.kind == "samples":
            state.samples.append((news.step, news.samples))
        elif news.kind == "state":
            state.paused = news.text == "paused"
        elif news.kind in ("note", "split", "estimate") and news.text and news.text not in state.notes:
            state.notes.append(news.text)
        self._touch(number)

    @Slot(int, str)
    def _warned(self, number: int, sentence: str) -> None:
        state = self._mine(number)
        if state is not None and sentence not in state.notes:
            state.notes.append(sentence)
            self._touch(number)

    @Slot(object, object, object)
    def _ended(self, job: Job, result: dict[str, Any] | None, error: WeftError | None) -> None:
        if job.task != "train":
            return
        state = self._mine(job.id)
        if state is None:
            return
        state.job, state.error, state.result, state.paused = job, error, result, False
        if result is not None:
            found = msgspec.convert(result, TrainResult)
            state.notes += [note for note in found.notes if note not in state.notes]
            for step, loss in found.held_out_losses:
                state.add(int(step), {"held_out_loss": loss})
        self.ended.emit(job.id)
        self._touch(job.id)
