"""The Train page: the runs at the left; a new one, or the chosen one, beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PySide6.QtCore import QPoint, QSize, Qt, Signal, Slot
from PySide6.QtGui import QAction, QDragEnterEvent, QDropEvent, QKeySequence
from PySide6.QtWidgets import QAbstractItemView, QListWidget, QListWidgetItem, QMenu, QSplitter, QStackedWidget, QWidget

from app.core.errors import WeftError
from app.core.jobs import Job
from app.core.library import ModelEntry
from app.training.run_config import RunConfig
from app.viewmodels.jobs import STATE_WORDS
from app.viewmodels.model_table import ModelTable
from app.viewmodels.train_draft import DATA_SUFFIXES, TrainDraft
from app.viewmodels.train_files import RunFiles
from app.viewmodels.train_runs import TrainRuns
from app.viewmodels.units import readable_when
from app.views.icons import icon
from app.views.page import Notice, Page, PaletteCommand
from app.views.train.run_view import RunView
from app.views.train.setup import RUN_SUFFIX, TrainSetup
from app.views.widgets import button, column, label, local_paths, row, title

_JOB = Qt.ItemDataRole.UserRole


class TrainPage(Page):
    """Set up, watch, and look back.

    Signals:
        use_wanted(path): an adapter is to be put on the loaded model.
    """

    use_wanted = Signal(str)

    def __init__(
        self,
        draft: TrainDraft,
        runs: TrainRuns,
        *,
        make_table: Callable[[], ModelTable],
        run_files: RunFiles,
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(parent)
        self.setAcceptDrops(True)
        self._draft, self._runs = draft, runs
        self.setup = TrainSetup(draft, make_table=make_table, run_files=run_files)
        self.run = RunView(runs)
        self.stack = QStackedWidget()
        self.stack.addWidget(self.setup)
        self.stack.addWidget(self.run)
        self.list = QListWidget()
        self.list.setAccessibleName("Training runs")
        self.list.setSelectionMode(QAbstractItemView.SelectionMode.ExtendedSelection)
        self.list.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.list.setToolTip("Choose several to see their losses in one chart")
        self.list.setContextMenuPolicy(Qt.ContextMenuPolicy.CustomContextMenu)
        self.new = button("New run", self.new_run, kind="primary", icon_name="plus")
        side = QWidget()
        side.setMinimumWidth(180)
        side.setMaximumWidth(360)
        head = row(title("Runs", 0), 1, self.new)
        layout = column(parent=side, spacing=8, margins=(12, 12, 12, 12))
        layout.addLayout(head)
        self.none = label("Runs appear here, and stay: their curves, answers and settings.", tone="muted", wrap=True)
        layout.addWidget(self.none)
        layout.addWidget(self.list, 1)
        layout.addStretch(0)
        self._side = side
        splitter = QSplitter(Qt.Orientation.Horizontal)
        splitter.setHandleWidth(1)
        splitter.setChildrenCollapsible(False)
        splitter.addWidget(side)
        splitter.addWidget(self.stack)
        splitter.setStretchFactor(1, 1)
        splitter.setSizes([220, 980])
        column(splitter, parent=self)
        self.list.itemSelectionChanged.connect(self._selected)
        self.list.customContextMenuRequested.connect(self._menu)
        self.setup.started.connect(self.show_run)
        self.setup.failed.connect(self.failed)
        self.run.failed.connect(self.failed)
        self.run.again_wanted.connect(self._again)
        self.run.resumed.connect(self.show_run)
        self.run.use_wanted.connect(self.use_wanted)
        runs.changed.connect(self._fill)
        runs.ended.connect(self._fill)
        runs.trashed.connect(self._trashed)
        run_files.opened.connect(self._opened)
        run_files.written.connect(self._written)
        run_files.failed.connect(self.failed)
        remove = QAction("Remove from list", self.list)
        remove.setShortcut(QKeySequence.StandardKey.Delete)
        remove.setShortcutContext(Qt.ShortcutContext.WidgetShortcut)
        remove.triggered.connect(self._remove_chosen)
        self.list.addAction(remove)
        self._fill()

    # What the window asks ---------------------------------------------------------------------------

    def entered(self) -> None:
        (self.setup.base if self.stack.currentWidget() is self.setup else self.list).setFocus()

    def toggle_side(self) -> None:
        self._side.setVisible(self._side.isHidden())

    def commands(self) -> list[PaletteCommand]:
        return [PaletteCommand(title="New training run", group="Train", icon="train", run=self._come_new)]

    def accepts(self, paths: list[Path]) -> bool:
        return all(path.suffix.lower() in (*DATA_SUFFIXES, RUN_SUFFIX) for path in paths)

    def take(self, paths: list[Path]) -> None:
        self.page_wanted.emit("train")
        self.new_run()
        self.setup.take(paths)

    def train_on(self, entry: ModelEntry) -> None:
        """Begin a run on this model."""
        self.new_run()
        self._draft.set_model(entry)

    def dragEnterEvent(self, event: QDragEnterEvent) -> None:
        if local_paths(event.mimeData().urls()):
            event.acceptProposedAction()

    def dropEvent(self, event: QDropEvent) -> None:
        self.new_run()
        self.setup.take(local_paths(event.mimeData().urls()))
        event.acceptProposedAction()

    # Runs -------------------------------------------------------------------------------------------

    @Slot()
    def _fill(self, *_: object) -> None:
        chosen = [item.data(_JOB) for item in self.list.selectedItems()]
        jobs = self._runs.jobs()
        listed = [self.list.item(place).data(_JOB) for place in range(self.list.count())]
        if listed != [job.id for job in jobs]:
            self.list.blockSignals(True)
            self.list.clear()
            for job in jobs:
                item = QListWidgetItem()
                item.setData(_JOB, job.id)
                item.setSizeHint(QSize(0, 2 * self.list.fontMetrics().lineSpacing() + 10))
                self.list.addItem(item)
                item.setSelected(job.id in chosen)
            self.list.blockSignals(False)
        for place, job in enumerate(jobs):
            item = self.list.item(place)
            words, mark, tone = STATE_WORDS[job.state]
            item.setToolTip(job.title.removeprefix("Train "))
            item.setText(f"{job.title.removeprefix('Train ')}\n{words} · {readable_when(job.started or job.created)}")
            item.setIcon(icon(mark, tone))
        self.none.setVisible(not jobs)
        self.list.setVisible(bool(jobs))
        if self._showing_run and not self.list.selectedItems():
            self.new_run()

    @property
    def _showing_run(self) -> bool:
        return self.stack.currentWidget() is self.run

    def _jobs_chosen(self) -> list[Job]:
        chosen = {item.data(_JOB) for item in self.list.selectedItems()}
        return [job for job in self._runs.jobs() if job.id in chosen]

    @Slot()
    def _selected(self) -> None:
        jobs = self._jobs_chosen()
        if not jobs:
            return
        current = self.list.currentItem()
        first = next((job for job in jobs if current is not None and job.id == current.data(_JOB)), jobs[0])
        self.run.show_run(first, jobs)
        self.stack.setCurrentWidget(self.run)

    @Slot(int)
    def show_run(self, number: int) -> None:
        """Show one run."""
        self._fill()
        for place in range(self.list.count()):
            item = self.list.item(place)
            if item.data(_JOB) == number:
                self.list.clearSelection()
                self.list.setCurrentItem(item)
                item.setSelected(True)
        self.list.setFocus()  # not a button: a second Enter must not end what the first began

    @Slot()
    def new_run(self) -> None:
        """Show the set-up."""
        self.list.clearSelection()
        self.stack.setCurrentWidget(self.setup)

    def _come_new(self) -> None:
        self.page_wanted.emit("train")
        self.new_run()

    @Slot(object)
    def _again(self, job: Job) -> None:
        config = self._runs.config(job)
        if config is not None:
            self._draft.use_config(config)
            self.new_run()

    @Slot(QPoint)
    def _menu(self, where: QPoint) -> None:
        jobs = self._jobs_chosen()
        ended = [job for job in jobs if not self._runs.is_active(job)]
        if not ended:
            return
        menu = QMenu(self)
        menu.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        menu.addAction(icon("close"), "Remove from list", lambda: self._remove(ended))
        if any(self._runs.unfinished(job) is not None for job in ended):
            menu.addAction(
                icon("trash"),
                "Remove, and its checkpoints into the trash",
                lambda: self._remove(ended, checkpoints=True),
            )
        menu.popup(self.list.viewport().mapToGlobal(where))

    @Slot()
    def _remove_chosen(self) -> None:
        self._remove([job for job in self._jobs_chosen() if not self._runs.is_active(job)])

    def _remove(self, jobs: list[Job], *, checkpoints: bool = False) -> None:
        if not jobs:
            return
        for job in jobs:
            try:
                if checkpoints:
                    self._runs.trash_checkpoints(job)
                self._runs.remove(job)
            except WeftError as error:
                self.failed.emit(error)
        self.new_run()

    @Slot(str, object)
    def _trashed(self, name: str, error: WeftError | None) -> None:
        if error is not None:
            self.failed.emit(error)
        else:
            self._draft.changed.emit()  # its name is free again
            self.notice.emit(Notice(text=f"{name} is in the trash."))

    # Runs as files ----------------------------------------------------------------------------------

    @Slot(object, object, str)
    def _opened(self, config: RunConfig, model: ModelEntry | None, sentence: str) -> None:
        self._draft.use_config(config)
        if model is not None:
            self._draft.set_model(model)
        self.new_run()
        if sentence:
            self.notice.emit(Notice(text=f"The model of this run is not here: {sentence}", tone="warning"))

    @Slot(str)
    def _written(self, sentence: str) -> None:
        self.notice.emit(Notice(text=sentence, tone="positive"))
