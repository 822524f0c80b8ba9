"""The Jobs page: what runs and what ran, with progress, log, cancel and retry."""

from __future__ import annotations

from PySide6.QtCore import QModelIndex, QPersistentModelIndex, QPoint, QRect, QRectF, QSize, Qt, QTimer, Slot
from PySide6.QtGui import QPainter
from PySide6.QtWidgets import (
    QAbstractItemView,
    QFrame,
    QHeaderView,
    QMenu,
    QSplitter,
    QStackedWidget,
    QStyle,
    QStyledItemDelegate,
    QStyleOptionViewItem,
    QTableView,
    QWidget,
)

from app.core.jobs import Job, JobState
from app.viewmodels.jobs import JOB, PROGRESS, STATE, STATE_WORDS, FractionRole, JobCenter, JobRole, JobTable
from app.views.icons import icon
from app.views.log_view import LogView
from app.views.page import Page
from app.views.theme import theme
from app.views.widgets import Banner, EmptyState, button, column, row, title

ROW = 44
CLOCK_MS = 1000


class _Delegate(QStyledItemDelegate):
    def sizeHint(self, option: QStyleOptionViewItem, index: QModelIndex | QPersistentModelIndex) -> QSize:
        return QSize(80, ROW)

    def paint(
        self, painter: QPainter, option: QStyleOptionViewItem, index: QModelIndex | QPersistentModelIndex
    ) -> None:
        look = theme()
        job: Job = index.data(JobRole)
        box: QRect = option.rect  # type: ignore[attr-defined]
        selected = bool(option.state & QStyle.StateFlag.State_Selected)  # type: ignore[attr-defined]
        painter.save()
        painter.setRenderHint(QPainter.RenderHint.Antialiasing)
        if selected:
            painter.fillRect(box, look.color("selection"))
        inner = box.adjusted(8, 0, -8, 0)
        color = "on_selection" if selected else "text"
        if index.column() == STATE:
            _, mark, tone = STATE_WORDS[job.state]
            icon(mark, tone).paint(painter, QRect(inner.x(), inner.y() + (ROW - 18) // 2, 18, 18))
            inner.adjust(26, 0, 0, 0)
        elif index.column() == PROGRESS and not job.state.ended:
            self._bar(painter, inner, index.data(FractionRole))
            inner.adjust(0, 0, 0, -12)
        elif index.column() != JOB and not selected:
            color = "muted"
        painter.setPen(look.color(color))
        text = painter.fontMetrics().elidedText(
            str(index.data() or "").replace("\n", " "), Qt.TextElideMode.ElideRight, inner.width()
        )
        painter.drawText(inner, Qt.AlignmentFlag.AlignVCenter | Qt.AlignmentFlag.AlignLeft, text)
        painter.restore()

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
        self.view = QTableView()
        self.view.setModel(self.table)
        self._set_up_view()
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

    def _set_up_view(self) -> None:
        view = self.view
        view.setAccessibleName("Jobs")
        view.setItemDelegate(_Delegate(view))
        view.setSelectionBehavior(QAbstractItemView.SelectionBehavior.SelectRows)
        view.setSelectionMode(QAbstractItemView.SelectionMode.SingleSelection)
        view.setShowGrid(False)
        view.setWordWrap(False)
        view.setTabKeyNavigation(False)
        view.setContextMenuPolicy(Qt.ContextMenuPolicy.CustomContextMenu)
        view.verticalHeader().hide()
        view.verticalHeader().setDefaultSectionSize(ROW)
        view.verticalHeader().setSectionResizeMode(QHeaderView.ResizeMode.Fixed)
        head = view.horizontalHeader()
        head.setHighlightSections(False)
        head.setSectionResizeMode(QHeaderView.ResizeMode.Interactive)
        head.setSectionResizeMode(PROGRESS, QHeaderView.ResizeMode.Stretch)
        for section, width in ((0, 272), (1, 120), (3, 128), (4, 80)):
            view.setColumnWidth(section, width)

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
