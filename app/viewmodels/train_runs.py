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
from app.store.runs import RunStore
from app.training.card import read_record
from app.training.run_config import RunConfig, TrainNews, TrainResult
from app.viewmodels.background import Background
from app.viewmodels.jobs import Pace
from app.viewmodels.tasks import TaskQueue, parameters_of
from app.viewmodels.train_state import RunState

SHOWN = 200
REFRESH_MS = 200
SAVE_MS = 15_000  # between writes of what a run said into the store
_SUFFIX = ".training"


class TrainRuns(QObject):
    """The runs, newest first.

    Args:
        histories: keeps what runs said, for later; None keeps nothing.

    Signals:
        changed: the list did. updated(job id): a run said something. ended(job id): a run ended.
        trashed(str, WeftError or None): a run's checkpoints went into the trash, or could not.
    """

    changed = Signal()
    updated = Signal(int)
    ended = Signal(int)
    trashed = Signal(str, object)

    def __init__(
        self, store: JobStore, queue: TaskQueue, histories: RunStore | None = None, parent: QObject | None = None
    ) -> None:
        super().__init__(parent)
        self._store, self._queue, self._histories = store, queue, histories
        self._listed: list[Job] | None = None
        self._background = Background(self)
        self._background.done.connect(self._moved)
        self._saver = QTimer(self)
        self._saver.setInterval(SAVE_MS)
        self._saver.timeout.connect(self._save_running)
        self._states: dict[int, RunState] = {}
        self._paces: dict[int, Pace] = {}
        self._touched: set[int] = set()
        self._timer = QTimer(self)
        self._timer.setSingleShot(True)
        self._timer.setInterval(REFRESH_MS)
        self._timer.timeout.connect(self._tell)
        queue.changed.connect(self._queue_changed)
        queue.progressed.connect(self._progressed)
        queue.metric.connect(self._metric)
        queue.news.connect(self._news)
        queue.warned.connect(self._warned)
        queue.ended.connect(self._ended)

    def jobs(self) -> list[Job]:
        """The training jobs of the store."""
        if self._listed is None:
            self._listed = [job for job in self._store.jobs(SHOWN) if job.task == "train"]
        return self._listed

    @Slot()
    def _queue_changed(self) -> None:
        self._listed = None
        self.changed.emit()

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
            if self.is_active(job):
                self._begin(job)
            else:
                self._states[job.id] = self._read_back(job)
        return self._states[job.id]

    def _read_back(self, job: Job) -> RunState:
        state = RunState(job, self)
        history = self._histories.load(job.id) if self._histories is not None else None
        folder = self.folder(job)
        if history is not None:
            state.take(history)
        elif folder is not None and (record := read_record(folder)) is not None:
            for step, loss in enumerate(record.losses, 1):
                state.add(step, {"loss": loss})
            for step, loss in record.held_out_losses:
                state.add(int(step), {"held_out_loss": loss})
            state.notes = list(record.notes)
            state.ended = record.ended
        state.unsaved = False
        return state

    @Slot()
    def _save_running(self) -> None:
        for number, state in list(self._states.items()):
            if state.unsaved:
                self._save(number, state)
        if not any(self._queue.is_running(number) for number in self._states):
            self._saver.stop()

    def _save(self, number: int, state: RunState) -> None:
        state.unsaved = False
        histories = self._histories
        if histories is not None:
            history = state.history()  # a copy: the thread must not see it grow
            self._background.run("save", lambda: histories.save(number, history))

    def close(self) -> None:
        """For the window's end: what was said is kept."""
        self._save_running()
        self._background.finish()

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
        self._begin(made)
        return made

    def unfinished(self, job: Job) -> Path | None:
        """The folder of checkpoints of a run that made no adapter; None when there is none, or a later run is at work in it."""
        folder = self.folder(job)
        if folder is None or not folder.with_name(folder.name + _SUFFIX).is_dir():
            return None
        if any(self.is_active(other) and self.folder(other) == folder for other in self.jobs()):
            return None
        return folder.with_name(folder.name + _SUFFIX)

    def trash_checkpoints(self, job: Job) -> None:
        """Move an unfinished run's checkpoints to the trash; `trashed` follows."""
        folder = self.unfinished(job)
        if folder is not None:
            from app.viewmodels.model_files import trash_files

            self._background.run(folder.name, lambda: trash_files([folder]))

    @Slot(object, object, object)
    def _moved(self, key: object, _undo: object, error: WeftError | None) -> None:
        if key != "save":
            self.trashed.emit(str(key), error)
            self.changed.emit()

    def remove(self, job: Job) -> None:
        """Take an ended run off the list. Its adapter stays."""
        self._store.remove(job.id)
        self._states.pop(job.id, None)
        self._queue_changed()

    # What runs say --------------------------------------------------------------------------------

    def _mine(self, number: int) -> RunState | None:
        if number not in self._states:
            try:
                job = self._store.get(number)
            except WeftError:
                return None
            if job.task != "train":
                return None
            self._begin(job)
        if not self._saver.isActive():
            self._saver.start()
        return self._states[number]

    def _begin(self, job: Job) -> None:
        """A new run's state; where it goes on from an earlier one in the same folder, its curves do too."""
        state = RunState(job, self)
        folder = self.folder(job)
        before = next(
            (old for old in self.jobs() if old.id < job.id and folder is not None and self.folder(old) == folder), None
        )
        if before is not None:
            state.take(msgspec.structs.replace(self.state(before).history(), notes=(), ended=""))
        self._states[job.id] = state

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
            if state.progress is None:  # it has begun
                self._queue_changed()
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
            state.samples = [*(said for said in state.samples if said[0] < news.step), (news.step, news.samples)]
            state.unsaved = True
        elif news.kind == "state":
            state.paused, state.stopping = news.text == "paused", news.text == "stopping"
            self._paces.setdefault(number, Pace()).hold(state.paused)
        elif news.kind in ("note", "split", "estimate"):
            state.note(news.text)
        self._touch(number)

    @Slot(int, str)
    def _warned(self, number: int, sentence: str) -> None:
        state = self._mine(number)
        if state is not None and state.note(sentence):
            self._touch(number)

    @Slot(object, object, object)
    def _ended(self, job: Job, result: dict[str, Any] | None, error: WeftError | None) -> None:
        if job.task != "train":
            return
        state = self._mine(job.id)
        if state is None:
            return
        self._listed = None
        state.job, state.error, state.result = job, error, result
        state.paused = state.stopping = False
        if result is not None:
            found = msgspec.convert(result, TrainResult)
            state.ended = found.ended
            for note in found.notes:
                state.note(note)
            for step, loss in found.held_out_losses:  # what was said while nobody listened
                if not state.metrics.get("held_out_loss") or step > state.metrics["held_out_loss"].points[-1][0]:
                    state.add(int(step), {"held_out_loss": loss})
        self._save(job.id, state)
        self.ended.emit(job.id)
        self._touch(job.id)
