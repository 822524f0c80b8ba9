"""The lower half: the queue, what can be done about it, and its limits."""

from __future__ import annotations

from collections import Counter

from PySide6.QtCore import QItemSelection, QItemSelectionModel, QModelIndex, QPoint, Qt, QTimer, QUrl, Signal, Slot
from PySide6.QtGui import QDesktopServices
from PySide6.QtWidgets import QDoubleSpinBox, QFrame, QMenu, QProgressBar, QSpinBox, QStackedWidget, QWidget

from app.core.errors import ErrorKind
from app.store.downloads import Download, DownloadState
from app.viewmodels import download_table
from app.viewmodels.download_table import DownloadTable
from app.viewmodels.downloads import Downloads, Row
from app.viewmodels.units import readable_bytes, readable_seconds
from app.views.downloads.tables import QueueCell, Table
from app.views.widgets import Banner, ElidedLabel, EmptyState, button, column, icon_button, row, spaced, title

MB = 1_000_000
_WHOLE_ROW = QItemSelectionModel.SelectionFlag.ClearAndSelect | QItemSelectionModel.SelectionFlag.Rows


class QueuePanel(QWidget):
    """The queue.

    Signals:
        cancel_wanted(list of Download): ask whether to keep what has arrived.
        folder_wanted(Download): show its files. settings_wanted: the token or the hub's address must be set.
    """

    cancel_wanted = Signal(list)
    folder_wanted = Signal(object)
    settings_wanted = Signal()

    def __init__(self, downloads: Downloads, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._downloads = downloads
        self.table = DownloadTable(downloads, self)
        self.view = Table(
            "Downloads",
            QueueCell(),
            {download_table.PROGRESS: 400, download_table.SPEED: 96, download_table.LEFT: 96},
            (download_table.LEFT, download_table.SPEED),
            least=200,
        )
        self.view.setSelectionMode(Table.SelectionMode.ExtendedSelection)
        self.view.set_model(self.table)
        self._stack = QStackedWidget()
        self._stack.addWidget(self.view)
        self._stack.addWidget(
            EmptyState("clock", "The queue is empty", "What you download appears here and goes on after a restart.")
        )
        self.banner = self._make_banner()
        column(self._head(), self.banner, self._stack, spacing=0, parent=self).setStretch(2, 1)
        self.view.customContextMenuRequested.connect(self._menu)
        self.view.removed.connect(self._cancel)
        self.view.opened.connect(self._opened)
        self.view.selectionModel().selectionChanged.connect(self._selected)
        downloads.changed.connect(self.refresh)
        downloads.progressed.connect(self._show_total)
        self.refresh()

    def _head(self) -> QWidget:
        head = QFrame()
        head.setObjectName("bar")
        head.setFixedHeight(48)
        self.resume = icon_button("resume", "Resume or retry", self._resume)
        self.pause = icon_button("pause", "Pause", self._pause)
        self.up = icon_button("chevron-up", "Earlier in the queue", lambda: self._move(-1), shortcut="Alt+Up")
        self.down = icon_button("chevron-down", "Later in the queue", lambda: self._move(1), shortcut="Alt+Down")
        self.up.setShortcut("Alt+Up")
        self.down.setShortcut("Alt+Down")
        self.cancel = icon_button("close", "Cancel or remove", self._cancel, shortcut="Delete")
        self._total = ElidedLabel()
        self._total.setProperty("tone", "muted")
        self._bar = QProgressBar()
        self._bar.setTextVisible(False)
        self._bar.setRange(0, 1000)
        self._bar.setFixedWidth(96)
        self._bar.setAccessibleName("Progress of the whole queue")
        self.clear = button("Clear done", self._downloads.clear_done, kind="link", tip="Their files stay")
        self._make_limits()
        made = row(
            title("Queue", 0),
            self.resume,
            self.pause,
            self.up,
            self.down,
            self.cancel,
            self._total,
            self.clear,
            self._bar,
            self.at_once,
            self.rate,
            margins=(16, 0, 16, 0),
            spacing=4,
            parent=head,
        )
        made.setStretch(6, 1)
        made.insertSpacing(1, 8)
        made.insertSpacing(7, 8)
        made.insertSpacing(11, 8)
        return head

    def _make_limits(self) -> None:
        """How fast, and how many."""
        self.rate = QDoubleSpinBox()
        self.rate.setRange(0, 10_000)
        self.rate.setDecimals(1)
        self.rate.setSingleStep(1)
        self.rate.setSpecialValueText("No limit")
        self.rate.setSuffix(" MB/s")
        self.rate.setFixedWidth(120)
        self.rate.setAccessibleName("Limit on speed")
        self.rate.setToolTip("Limit on the speed of all downloads together; holds at once")
        self.rate.setKeyboardTracking(False)
        self.rate.valueChanged.connect(self._rate_chosen)
        self.at_once = QSpinBox()
        self.at_once.setRange(1, 8)
        self.at_once.setSuffix(" at once")
        self.at_once.setFixedWidth(104)
        self.at_once.setAccessibleName("Downloads at the same time")
        self.at_once.setToolTip("How many downloads run at the same time")
        self.at_once.setKeyboardTracking(False)
        self.at_once.valueChanged.connect(lambda count: self._downloads.set_limits(at_once=count))
        for box in (self.rate, self.at_once):
            box.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
            spaced(box)

    def _make_banner(self) -> Banner:
        """Why the selected download failed, with what helps."""
        banner = Banner("negative", slim=True)
        self._open_page = button("Open page", self._open_selected_page, kind="link", icon_name="open")
        self._open_settings = button("Settings", self.settings_wanted.emit, kind="link", icon_name="settings")
        self._retry = button("Retry", self._resume, kind="link", icon_name="reload")
        for made in (self._open_page, self._open_settings, self._retry):
            banner.add(made)
        banner.hide()
        return banner

    def show_download(self, download: int) -> None:
        """Select a download and bring it into view."""
        for place, line in enumerate(self.table.rows):
            if line.download.id == download:
                index = self.table.index(place, 0)
                # Not selectRow: that adds to the selection while Ctrl is down, as in Ctrl+Enter.
                self.view.selectionModel().setCurrentIndex(index, _WHOLE_ROW)
                self.view.scrollTo(index)

    # What is shown ----------------------------------------------------------------------------------

    @property
    def selected(self) -> list[Row]:
        model = self.view.selectionModel()
        return [self.table.rows[index.row()] for index in model.selectedRows()] if model is not None else []

    @property
    def _ids(self) -> list[int]:
        """The selected ones; all when nothing is selected."""
        chosen = self.selected
        return [line.download.id for line in chosen or self.table.rows]

    @Slot()
    def refresh(self) -> None:
        self._stack.setCurrentIndex(0 if self.table.rows else 1)
        for box, value in ((self.rate, self._downloads.rate / MB), (self.at_once, self._downloads.at_once)):
            if not box.hasFocus() and box.value() != value:
                box.blockSignals(True)
                box.setValue(value)  # type: ignore[arg-type]
                box.blockSignals(False)
        self._show_total()
        self._show_buttons()

    @Slot(QItemSelection, QItemSelection)
    def _selected(self, *_: object) -> None:
        self._show_buttons()

    def _show_buttons(self) -> None:
        chosen = self.selected or self.table.rows
        states = {line.state for line in chosen}
        self.resume.setEnabled(
            bool(states & {DownloadState.PAUSED, DownloadState.FAILED}) or any(line.waits for line in chosen)
        )
        self.pause.setEnabled(any(state.active for state in states))
        self.cancel.setEnabled(bool(self.selected))
        self._show_failure()
        self.up.setEnabled(bool(self.selected))
        self.down.setEnabled(bool(self.selected))

    def _show_failure(self) -> None:
        chosen = self.selected
        failed = chosen[0].download if len(chosen) == 1 and chosen[0].state is DownloadState.FAILED else None
        shown = failed is not None and self.banner.isHidden()
        self.banner.setVisible(failed is not None)
        if failed is not None:
            text = f"{failed.message} {failed.hint}".strip()
            self.banner.text.setText(text)
            self._open_page.setVisible(failed.page in text or failed.failure == ErrorKind.NOT_FOUND)
            self._open_settings.setVisible("Settings" in failed.hint)
        if shown:  # it takes room from the table: the download that it speaks of stays in view
            QTimer.singleShot(0, self._keep_in_view)

    @Slot()
    def _keep_in_view(self) -> None:
        if (index := self.view.currentIndex()).isValid():
            self.view.scrollTo(index)

    @Slot()
    def _open_selected_page(self) -> None:
        if self.selected:
            _open_page(self.selected[0].download)

    @Slot()
    def _show_total(self) -> None:
        queue = self._downloads
        active, fraction = queue.active, queue.fraction
        counts = Counter(line.state for line in queue.rows)
        self._bar.setVisible(fraction is not None)
        self.clear.setVisible(fraction is None and bool(counts[DownloadState.DONE]))
        failed = [f"{counts[DownloadState.FAILED]} failed"] if counts[DownloadState.FAILED] else []
        if fraction is None:
            words = ((DownloadState.PAUSED, "paused"), (DownloadState.DONE, "done"))
            self._total.setText(
                " · ".join([*failed, *(f"{counts[state]} {word}" for state, word in words if counts[state])])
            )
            return
        self._bar.setValue(round(fraction * 1000))
        total = sum(line.download.total for line in active)
        parts = [
            f"{len(active)} to go",
            f"{readable_bytes(sum(line.done for line in active))} of {readable_bytes(total)}",
        ]
        if queue.speed >= 1:
            parts.append(f"{readable_bytes(queue.speed)}/s")
        if queue.left is not None:
            parts.append(f"{readable_seconds(queue.left)} left")
        self._total.setText(" · ".join(parts + failed))

    # What is done -----------------------------------------------------------------------------------

    def _resume(self) -> None:
        self._downloads.resume(self._ids)

    def _pause(self) -> None:
        self._downloads.pause(self._ids)

    def _move(self, step: int) -> None:
        self._downloads.move([line.download.id for line in self.selected], step)

    def _cancel(self) -> None:
        chosen = [line.download for line in self.selected]
        complete = [download.id for download in chosen if download.state is DownloadState.DONE]
        if complete:
            self._downloads.cancel(complete, keep=True)
        if rest := [download for download in chosen if download.state is not DownloadState.DONE]:
            self.cancel_wanted.emit(rest)

    @Slot(float)
    def _rate_chosen(self, megabytes: float) -> None:
        self._downloads.set_limits(rate=round(megabytes * MB))

    @Slot(QModelIndex)
    def _opened(self, index: QModelIndex) -> None:
        line = self.table.rows[index.row()]
        if line.state is DownloadState.DONE:
            self.folder_wanted.emit(line.download)
        elif line.state.active and not line.waits:
            self._downloads.pause([line.download.id])
        else:
            self._downloads.resume([line.download.id])

    @Slot(QPoint)
    def _menu(self, where: QPoint) -> None:
        if not self.view.indexAt(where).isValid() or not self.selected:
            return
        menu = QMenu(self)
        menu.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        lines, first = self.selected, self.selected[0].download
        states = {line.state for line in lines}
        if any(state.active for state in states):
            menu.addAction("Pause", self._pause)
        if states & {DownloadState.PAUSED, DownloadState.FAILED} or any(line.waits for line in lines):
            menu.addAction("Retry" if DownloadState.FAILED in states else "Resume", self._resume)
        if not states <= {DownloadState.DONE}:
            menu.addAction("First in the queue", lambda: self._move(-len(self.table.rows)))
            menu.addAction("Last in the queue", lambda: self._move(len(self.table.rows)))
        menu.addSeparator()
        menu.addAction("Open folder", lambda: self.folder_wanted.emit(first))
        menu.addAction("Open the page on the hub", lambda: _open_page(first))
        menu.addSeparator()
        menu.addAction("Remove from the list" if states <= {DownloadState.DONE} else "Cancel…", self._cancel)
        if any(line.state is DownloadState.DONE for line in self.table.rows):
            menu.addAction("Remove all that are done", self._downloads.clear_done)
        menu.popup(self.view.viewport().mapToGlobal(where))


def _open_page(download: Download) -> None:
    QDesktopServices.openUrl(QUrl(download.page))
