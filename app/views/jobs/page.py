"""The Jobs page: what runs and what ran, with progress, log, cancel and retry."""

from __future__ import annotations

from PySide6.QtCore import QModelIndex, QPoint, QRect, QRectF, Qt, QTimer, Slot
from PySide6.QtGui import QPainter
from PySide6.QtWidgets import QFrame, QMenu, QSplitter, QStackedWidget, QStyleOptionViewItem, QWidget

from app.core.jobs import Job, JobState
from app.viewmodels.jobs import JOB, PROGRESS, STATE, STATE_WORDS, FractionRole, JobCenter, JobRole, JobTable
from app.views.icons import icon
from app.views.log_view import LogView
from app.views.page import Page
from app.views.row_table import Index, RowCell, RowTable
from app.views.theme import theme
from app.views.widgets import Banner, EmptyState, button, column, row, title

CLOCK_MS = 1000


class _JobCell(RowCell):
    height = 44
    middle = frozenset({JOB})  # what is made of what: names begin alike and differ at their ends

    def role(self, index: Index) -> str:
        return "text" if index.column() in (STATE, JOB) else "muted"

    def before(self, painter: QPainter, option: QStyleOptionViewItem, index: Index, inner: QRect) -> QRect:
        job: Job = index.data(JobRole)
        if index.column() == STATE:
            _, mark, tone = STATE_WORDS[job.state]
            icon(mark, tone).paint(painter, QRect(inner.x(), inner.y() + (self.height - 18) // 2, 18, 18))
            return inner.adjusted(26, 0, 0, 0)
        if index.column() == PROGRESS and not job.state.ended:
            self._bar(painter, inner, index.data(FractionRole))
            return inner.adjusted(0, 0, 0, -12)
        return inner

    def _bar(self, painter: QPainter, inner: QRect, fraction: float | None) -> None:
        track = QRectF(inner.x(), inner.bottom() - 11, inner.width(), 4)
        painter.setPen(Qt.PenStyle.NoPen)
        painter.setBrush(theme().color("border"))
        painter.drawRoundedRect(track, 2, 2)
        if fraction is not None:
            painter.setBrush(theme().color("accent"))
            painter.drawRoundedRect(QRectF(track.x(), track.y(), max(4.0, track.width() * fraction), 4), 2, 2)


class JobsPage(Page):
    """All jobs, newest first; the selected one's log below."""

    def __init__(self, *, jobs: JobCenter, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._jobs = jobs
        self._selected = 0
        self.table = JobTable(jobs, self)
        self.view = RowTable("Jobs", _JobCell(), {0: 272, 1: 120, 3: 120, 4: 96}, stretch=PROGRESS, shares={JOB: 0.33})
        self.view.setSelectionMode(RowTable.SelectionMode.SingleSelection)
        self.view.set_model(self.table)
        self.log = LogView()
        self._problem = Banner("negative")
        self._problem.hide()
        self.cancel = button("Cancel", self._cancel)
        self.retry = button("Retry", self._retry, kind="primary")
        self.remove = button("Remove from list", self._remove)
        head = QFrame()
        head.setObjectName("pageHeader")
        head.setFixedHeight(56)
        row(title("Jobs"), 1, self.retry, self.cancel, self.remove, margins=(16, 0, 16, 0), parent=head)
        below = QWidget()
        self._below = column(self._problem, self.log, spacing=0, parent=below)
        splitter = QSplitter(Qt.Orientation.Vertical)
        splitter.addWidget(self.view)
        splitter.addWidget(below)
        splitter.setSizes([320, 400])
        splitter.setHandleWidth(1)
        splitter.setChildrenCollapsible(False)
        self._empty = EmptyState(
            "jobs",
            "No jobs yet",
            "Long work, such as installing an engine, appears here with its progress and its log.",
            None,
        )
        self._stack = QStackedWidget()
        self._stack.addWidget(splitter)
        self._stack.addWidget(self._empty)
        column(head, self._stack, spacing=0, parent=self)
        self._clock = QTimer(self)
        self._clock.setInterval(CLOCK_MS)
        self._clock.timeout.connect(self._tick)
        self.view.selectionModel().currentRowChanged.connect(self._row_changed)
        self.view.customContextMenuRequested.connect(self._context_menu)
        self.table.modelReset.connect(self._keep_selection)
        self.table.dataChanged.connect(self._show_selected)
        self._keep_selection()

    # What the window asks ---------------------------------------------------------------------------

    def entered(self) -> None:
        self.view.setFocus()

    def showEvent(self, event: object) -> None:
        self.table.refresh()
        self._clock.start()

    def hideEvent(self, event: object) -> None:
        self._clock.stop()

    def show_job(self, job: int) -> None:
        """Select a job."""
        for place, listed in enumerate(self.table.jobs):
            if listed.id == job:
                self.view.setCurrentIndex(self.table.index(place, 0))

    # Selection --------------------------------------------------------------------------------------

    @property
    def selected(self) -> Job | None:
        index = self.view.currentIndex()
        return index.data(JobRole) if index.isValid() else None

    @Slot()
    def _tick(self) -> None:
        if self._jobs.busy:
            self.table.refresh()

    @Slot(QModelIndex, QModelIndex)
    def _row_changed(self, current: QModelIndex, _before: QModelIndex) -> None:
        job = current.data(JobRole) if current.isValid() else None
        self._selected = job.id if isinstance(job, Job) else 0
        self._show_selected()

    @Slot()
    def _keep_selection(self) -> None:
        self._stack.setCurrentIndex(0 if self.table.jobs else 1)
        places = [place for place, job in enumerate(self.table.jobs) if job.id == self._selected]
        if self.table.jobs:
            self.view.setCurrentIndex(self.table.index(places[0] if places else 0, 0))
        self._show_selected()

    @Slot()
    def _show_selected(self) -> None:
        job = self.selected
        self.cancel.setVisible(job is not None and self._jobs.can_cancel(job))
        self.retry.setVisible(job is not None and self._jobs.can_retry(job))
        self.remove.setVisible(job is not None and job.state.ended)
        self.log.show_log(self._jobs.log_path(job) if job is not None else None)
        bad = job is not None and job.state in (JobState.FAILED, JobState.CRASHED)
        self._problem.setVisible(bad)
        if bad and job is not None:
            self._problem.set_tone("negative" if job.state is JobState.FAILED else "warning")
            self._problem.text.setText(f"{job.message} {job.hint}".strip())

    # Actions ----------------------------------------------------------------------------------------

    @Slot(QPoint)
    def _context_menu(self, where: QPoint) -> None:
        index = self.view.indexAt(where)
        if not index.isValid():
            return
        self.view.setCurrentIndex(index)
        menu = QMenu(self)
        menu.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        for made, run in ((self.retry, self._retry), (self.cancel, self._cancel), (self.remove, self._remove)):
            if made.isVisibleTo(self):
                menu.addAction(made.text(), run)
        if not menu.isEmpty():
            menu.popup(self.view.viewport().mapToGlobal(where))

    def _cancel(self) -> None:
        if self.selected is not None:
            self._jobs.cancel(self.selected)

    def _retry(self) -> None:
        job = self.selected
        if job is not None:
            self._selected = 0  # the new job, which will stand first
            self._jobs.retry(job)

    def _remove(self) -> None:
        if self.selected is not None:
            self._jobs.remove(self.selected)
