"""One run: its curves as they grow, figures, sample answers, notes, log; pause, stop, resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PySide6.QtCore import QTimer, Signal, Slot
from PySide6.QtGui import QTextCharFormat, QTextCursor
from PySide6.QtWidgets import QGridLayout, QPlainTextEdit, QProgressBar, QTabWidget, QWidget

from app.core.errors import WeftError
from app.core.jobs import Job, JobState
from app.viewmodels.jobs import STATE_WORDS
from app.viewmodels.train_runs import TrainRuns
from app.viewmodels.train_state import RunState
from app.viewmodels.units import readable_seconds
from app.views.dialogs import reveal
from app.views.log_view import LogView
from app.views.theme import theme, title_font
from app.views.train.chart import Chart, Series, readable
from app.views.widgets import Banner, Chip, ElidedLabel, button, column, label, row

TURN_MS = 25
_SMALL = 240  # points of a small chart's series
_ENDINGS = {
    "stopped": "Stopped by you; the adapter is what it had learnt by then.",
    "early": "Ended early: the held-out loss no longer fell.",
    "nan": "The loss became NaN: the adapter is the last good checkpoint. A lower learning rate helps.",
}


class RunView(QWidget):
    """A run, running or ended.

    Signals:
        failed(WeftError). again_wanted(job): its settings are wanted for a new run. resumed(job id): it goes on as this job.
        use_wanted(path): its adapter is to be put on.
    """

    failed = Signal(object)
    again_wanted = Signal(object)
    resumed = Signal(int)
    use_wanted = Signal(str)

    def __init__(self, runs: TrainRuns, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._runs = runs
        self.job: Job | None = None
        self._overlaid: list[Job] = []
        self._samples_shown = (-1, -1)
        self.name = ElidedLabel()
        self.name.setFont(title_font(self.name))
        self.chip = Chip()
        self.state = ElidedLabel()
        self.state.setProperty("tone", "muted")
        self.bar = QProgressBar()
        self.bar.setTextVisible(False)
        self.bar.setAccessibleName("Progress of the run")
        self.figures = label(tone="muted", wrap=True)
        self.note = Banner("info")
        self._build_buttons()
        self.loss = Chart("Loss")
        self.rate = Chart("Learning rate", most=_SMALL)
        self.norm = Chart("Gradient norm", most=_SMALL)
        self.speed = Chart("Tokens per second", most=_SMALL)
        # While it runs, one chart after the other: all four at once would hold the window for longer than a frame.
        self._due: list[Callable[[], None]] = []
        self._turn = QTimer(self)
        self._turn.setInterval(TURN_MS)
        self._turn.timeout.connect(self._show_next)
        charts = QWidget()
        grid = QGridLayout(charts)
        grid.setContentsMargins(0, 8, 0, 0)
        grid.setSpacing(8)
        grid.addWidget(self.loss, 0, 0, 1, 3)
        for place, chart in enumerate((self.rate, self.norm, self.speed)):
            grid.addWidget(chart, 1, place)
        grid.setRowStretch(0, 3)
        grid.setRowStretch(1, 2)
        self.samples = QPlainTextEdit()
        self.samples.setReadOnly(True)
        self.samples.setAccessibleName("Sample answers")
        self.samples.setPlaceholderText("Questions under Training, Watching are answered here at each checkpoint.")
        self.samples.setTabChangesFocus(True)
        self.log = LogView()
        self.tabs = QTabWidget()
        self.tabs.addTab(charts, "Curves")
        self.tabs.addTab(self.samples, "Sample answers")
        self.tabs.addTab(self.log, "Log")
        head = row(self.name, self.chip, self.state, self._buttons, spacing=12)
        head.setStretch(0, 2)
        head.setStretch(2, 1)
        layout = column(parent=self, spacing=8, margins=(16, 12, 16, 12))
        layout.addLayout(head)
        layout.addWidget(self.bar)
        layout.addWidget(self.figures)
        layout.addWidget(self.note)
        layout.addWidget(self.tabs, 1)
        runs.updated.connect(self._updated)
        runs.ended.connect(self._updated)
        runs.changed.connect(self.show_state)
        theme().changed.connect(self._recolour)

    def _build_buttons(self) -> None:
        self._buttons = QWidget()
        self.pause = button("Pause", self._pause)
        self.stop = button("Stop and keep", self._stop, tip="End the run now; the adapter is what it has learnt so far")
        self.cancel = button(
            "Cancel", self._cancel, tip="End the run; its checkpoints stay, so that it can go on later"
        )
        self.resume = button("Resume", self._resume, kind="primary")
        self.again = button("New run from this", self._again)
        self.use = button("Use it", self._use, kind="primary", tip="Put the adapter on the loaded model")
        self.folder = button("Show in folder", self._reveal, kind="link")
        row(self.folder, self.again, self.pause, self.stop, self.cancel, self.resume, self.use, parent=self._buttons)

    # Showing ----------------------------------------------------------------------------------------

    def show_run(self, job: Job, overlaid: list[Job]) -> None:
        """Show a run, and others' losses in the same chart."""
        if self.job is None or job.id != self.job.id:
            self._samples_shown = (-1, -1)
        self.job, self._overlaid = job, [other for other in overlaid if other.id != job.id]
        self.log.show_log(Path(job.log) if job.log else None)
        self.show_state()
        self._show_curves()

    @Slot(int)
    def _updated(self, number: int) -> None:
        if self.job is not None and number == self.job.id:
            self.show_state()
            self._due = [self._show_loss, self._show_rate, self._show_norm, self._show_speed]
        elif any(job.id == number for job in self._overlaid):
            self._due = [self._show_loss]
        if self._due and not self._turn.isActive():
            self._turn.start()

    @Slot()
    def _recolour(self) -> None:
        self._samples_shown = (-1, -1)
        self.show_state()

    @Slot()
    def show_state(self) -> None:
        """Everything but the curves."""
        if self.job is None:
            return
        found = next((job for job in self._runs.jobs() if job.id == self.job.id), None)
        self.job = found or self.job
        job, state = self.job, self._runs.state(self.job)
        running, active = self._runs.is_running(job), self._runs.is_active(job)
        self.name.setText(job.title.removeprefix("Train "))
        self.name.setToolTip(self.name.text())
        tone = {"positive": "positive", "negative": "negative", "warning": "warning"}.get(
            STATE_WORDS[job.state][2], "plain"
        )
        self.chip.set("Paused" if state.paused else STATE_WORDS[job.state][0], "warning" if state.paused else tone)
        phase = state.progress.phase if running and state.progress is not None else ""
        self.state.setText(phase)
        fraction = state.progress.fraction if state.progress is not None else None
        self.bar.setVisible(active)
        self.bar.setRange(0, 0 if running and fraction is None else 1000)
        self.bar.setValue(round(1000 * (fraction or 0)))
        self.figures.setText(self._figures(state, running))
        text, kind = self._words(job, state)
        self.note.setVisible(bool(text))
        self.note.text.setText(text)
        self.note.set_tone(kind)
        self._show_buttons(job, running, active, state)
        self._show_samples(state)

    def _show_buttons(self, job: Job, running: bool, active: bool, state: RunState) -> None:
        folder = self._runs.folder(job)
        made = folder is not None and folder.is_dir()
        unfinished = self._runs.unfinished(job) is not None
        self.pause.setVisible(running)
        self.pause.setText("Go on" if state.paused else "Pause")
        self.stop.setVisible(running)
        self.stop.setEnabled(not state.stopping)
        self.cancel.setVisible(active)
        self.resume.setVisible(not active and not made and (unfinished or job.state is not JobState.DONE))
        self.again.setVisible(not active)
        self.use.setVisible(not active and made)
        self.folder.setVisible(made and not active)

    def _figures(self, state: RunState, running: bool) -> str:
        parts: list[str] = []
        progress = state.progress
        if running and progress is not None and progress.total:
            parts.append(f"{progress.done:,.0f} of {progress.total:,.0f} {progress.unit}")
        for name, words in (
            ("loss", "loss {}"),
            ("held_out_loss", "held out {}"),
            ("learning_rate", "learning rate {}"),
        ):
            value = state.latest(name)
            if value is not None:
                parts.append(words.format(readable(value)))
        speed = state.latest("tokens_per_second")
        if speed:
            parts.append(f"{speed:,.0f} tokens/s")
        if running and self.job is not None:
            left = self._runs.seconds_left(self.job)
            if left is not None:
                parts.append(f"{readable_seconds(left)} left")
        return " · ".join(parts)

    def _words(self, job: Job, state: RunState) -> tuple[str, str]:
        if job.state in (JobState.FAILED, JobState.CRASHED):
            return f"{job.message} {job.hint}".strip(), "negative" if job.state is JobState.FAILED else "warning"
        if job.state is JobState.CANCELLED:
            if self._runs.unfinished(job) is None:
                return "Cancelled before its first checkpoint: Resume begins anew with the same settings.", "info"
            return "Cancelled. Its checkpoints are kept: Resume goes on from the last one.", "info"
        ending = _ENDINGS.get(state.ended, "")
        return " ".join([part for part in (ending, *state.notes[-3:]) if part]), "warning" if ending else "info"

    @Slot()
    def _show_next(self) -> None:
        if self._due:
            self._due.pop(0)()
        if not self._due:
            self._turn.stop()

    def _show_curves(self) -> None:
        for show in (self._show_loss, self._show_rate, self._show_norm, self._show_speed):
            show()

    def _show_loss(self) -> None:
        if self.job is None:
            return
        state = self._runs.state(self.job)
        series = [
            Series("train", state.series("loss")),
            Series("held out", state.series("held_out_loss"), dashed=True, dots=True),
        ]
        for number, other in enumerate(self._overlaid[:7], 1):
            name, theirs = other.title.removeprefix("Train "), self._runs.state(other)
            series.append(Series(name, theirs.series("loss"), group=number))
            held = theirs.series("held_out_loss")
            if held:
                series.append(Series(f"{name}, held out", held, dashed=True, dots=True, group=number))
        self.loss.set_series(series)

    def _show_rate(self) -> None:
        self._show_one(self.rate, "learning rate", "learning_rate")

    def _show_norm(self) -> None:
        self._show_one(self.norm, "gradient norm", "grad_norm")

    def _show_speed(self) -> None:
        self._show_one(self.speed, "tokens/s", "tokens_per_second")

    def _show_one(self, chart: Chart, title: str, metric: str) -> None:
        if self.job is not None:
            chart.set_series([Series(title, self._runs.state(self.job).series(metric))])

    def _show_samples(self, state: RunState) -> None:
        newest = state.samples[-1][0] if state.samples else -1
        shown = (len(state.samples), newest)
        if shown == self._samples_shown:
            return
        self._samples_shown = shown
        look = theme()
        heading, question, answer = QTextCharFormat(), QTextCharFormat(), QTextCharFormat()
        heading.setForeground(look.color("link"))
        question.setForeground(look.color("muted"))
        answer.setForeground(look.color("text"))
        self.samples.clear()
        cursor = QTextCursor(self.samples.document())
        for step, pairs in reversed(state.samples):
            cursor.insertText(f"Step {step:,}\n", heading)
            for asked, said in pairs:
                cursor.insertText(f"{asked}\n", question)
                cursor.insertText(f"{said}\n\n", answer)
        self.samples.verticalScrollBar().setValue(0)
        self.tabs.setTabText(1, f"Sample answers ({len(state.samples)})" if state.samples else "Sample answers")

    # Acts -------------------------------------------------------------------------------------------

    def _pause(self) -> None:
        if self.job is not None:
            self._runs.tell(self.job, "resume" if self._runs.state(self.job).paused else "pause")

    def _stop(self) -> None:
        if self.job is not None:
            self._runs.tell(self.job, "stop")
            self.stop.setEnabled(False)

    def _cancel(self) -> None:
        if self.job is not None:
            self._runs.cancel(self.job)

    def _resume(self) -> None:
        if self.job is None:
            return
        try:
            made = self._runs.resume(self.job)
        except WeftError as error:
            self.failed.emit(error)
            return
        self.resumed.emit(made.id)

    def _again(self) -> None:
        if self.job is not None:
            self.again_wanted.emit(self.job)

    def _use(self) -> None:
        folder = self._runs.folder(self.job) if self.job is not None else None
        if folder is not None:
            self.use_wanted.emit(str(folder))

    def _reveal(self) -> None:
        folder = self._runs.folder(self.job) if self.job is not None else None
        if folder is not None:
            reveal(folder / "adapter_config.json")
