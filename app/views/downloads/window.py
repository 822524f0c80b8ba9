"""The Downloads window: find on the hub above, the queue below."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PySide6.QtCore import QByteArray, QSettings, Qt, Signal, Slot
from PySide6.QtGui import QCloseEvent
from PySide6.QtWidgets import QDialog, QMainWindow, QSplitter, QWidget

from app.core.errors import ErrorKind, WeftError
from app.core.library import ModelEntry
from app.hub.files import Listing, RemoteFile
from app.hub.reference import parse_reference
from app.store.downloads import Download
from app.viewmodels.downloads import Downloads
from app.viewmodels.fitting import Fitting
from app.viewmodels.hub_queries import HubQueries
from app.viewmodels.units import readable_bytes
from app.views.dialogs import ConfirmDialog, open_locally
from app.views.downloads.finder import Finder
from app.views.downloads.queue import QueuePanel
from app.views.icons import window_icon
from app.views.widgets import action, column

MINIMUM = (860, 560)


class DownloadsWindow(QMainWindow):
    """A window of its own, opened from the rail. Closing it ends nothing: the queue runs on.

    Args:
        judge: where a model fits. endpoint: of the hub in use. state: where geometry is remembered.

    Signals:
        settings_wanted: the token or the hub's address must be set.
    """

    settings_wanted = Signal()

    def __init__(
        self,
        downloads: Downloads,
        queries: HubQueries,
        *,
        judge: Callable[[ModelEntry], Fitting],
        endpoint: Callable[[], str],
        state: QSettings,
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(parent)
        self.setWindowFlag(Qt.WindowType.Window)
        self.setWindowTitle("Downloads – Weft")
        self.setWindowIcon(window_icon())
        self.setMinimumSize(*MINIMUM)
        self._downloads = downloads
        self._queries = queries
        self._endpoint = endpoint
        self._state = state
        self.dialog: QDialog | None = None
        self.finder = Finder(queries, judge=judge, endpoint=endpoint, folder=downloads.folder)
        self.queue = QueuePanel(downloads)
        self._splitter = QSplitter(Qt.Orientation.Vertical)
        self._splitter.addWidget(self.finder)
        self._splitter.addWidget(self.queue)
        self._splitter.setHandleWidth(1)
        self._splitter.setChildrenCollapsible(False)
        self._splitter.setStretchFactor(0, 3)
        self._splitter.setStretchFactor(1, 2)
        self._splitter.setSizes([480, 280])
        body = QWidget()
        column(self._splitter, spacing=0, parent=body)
        self.setCentralWidget(body)
        self.finder.wanted.connect(self._add)
        self.finder.settings_wanted.connect(self.settings_wanted)
        self.queue.cancel_wanted.connect(self._ask_cancel)
        self.queue.folder_wanted.connect(self._open_folder)
        self.queue.settings_wanted.connect(self.settings_wanted)
        downloads.refused.connect(self.finder.show_error)
        downloads.added.connect(self._added)
        action(self, "Find", self.finder.focus, "Ctrl+F")
        action(self, "Close", self.close, "Ctrl+W")
        action(self, "Close", self.close, "Esc")
        self._restore()

    def open(self) -> None:
        """Show it, in front."""
        self.setWindowState(self.windowState() & ~Qt.WindowState.WindowMinimized)
        self.show()
        self.raise_()
        self.activateWindow()
        self.finder.focus()

    def take_link(self, link: str) -> None:
        """A `weft://` link: ask before anything is asked of the hub."""
        self.open()
        try:
            reference = parse_reference(link, self._endpoint())
        except WeftError as error:
            self.finder.show_error(error)
            return
        what = f" ({reference.file})" if reference.file else ""
        branch = f", branch {reference.revision}," if reference.revision else ""
        dialog = ConfirmDialog(
            f"Open {reference.repo}?",
            f"A link asks Weft to show {reference.repo}{branch} on the hub{what}.",
            "Show its files",
            lambda: self.finder.ask(reference),
            self,
            hint="Nothing is downloaded before you press Download.",
        )
        self._show(dialog)

    # Queue ------------------------------------------------------------------------------------------

    @Slot(object, object, bool)
    def _add(self, listing: Listing, files: tuple[RemoteFile, ...], copies: bool) -> None:
        self.finder.banner.hide()
        self._downloads.add(listing, files, copies=copies)

    @Slot(object)
    def _added(self, download: Download) -> None:
        self.queue.show_download(download.id)

    @Slot(list)
    def _ask_cancel(self, downloads: list[Download]) -> None:
        ids = [download.id for download in downloads]
        arrived = 0
        for download in downloads:
            line = self._downloads.row(download.id)
            arrived += line.done if line is not None else download.done
        if not arrived:
            self._downloads.cancel(ids, keep=False)
            return
        name = downloads[0].title if len(downloads) == 1 else f"{len(downloads)} downloads"
        dialog = ConfirmDialog(
            f"Cancel {name}?",
            f"{readable_bytes(arrived)} has arrived. Kept, it need not be fetched again when you download this another time.",
            "Delete what arrived",
            lambda: self._downloads.cancel(ids, keep=False),
            self,
            danger=True,
            hint="Files that are already complete stay in either case.",
            no="Go on downloading",
        )
        keep = dialog.add_button("Keep what arrived", lambda: self._downloads.cancel(ids, keep=True), kind="primary")
        keep.setFocus()
        self._show(dialog)

    @Slot(object)
    def _open_folder(self, download: Download) -> None:
        folder = Path(download.folder)
        if not open_locally(folder if folder.is_dir() else folder.parent):
            self.finder.show_error(
                WeftError(ErrorKind.NOT_FOUND, f"{folder} could not be opened.", "Open it in your file manager.")
            )

    def _show(self, dialog: QDialog) -> None:
        self.dialog = dialog
        dialog.finished.connect(self._dialog_closed)
        dialog.open()

    @Slot()
    def _dialog_closed(self) -> None:
        self.dialog = None

    # State ------------------------------------------------------------------------------------------

    def _restore(self) -> None:
        geometry, split = self._state.value("downloads/geometry"), self._state.value("downloads/split")
        if not (isinstance(geometry, QByteArray) and self.restoreGeometry(geometry)):
            self.resize(1120, 760)
        if isinstance(split, QByteArray):
            self._splitter.restoreState(split)

    def closeEvent(self, event: QCloseEvent) -> None:
        self._state.setValue("downloads/geometry", self.saveGeometry())
        self._state.setValue("downloads/split", self._splitter.saveState())
        self._queries.stop()
        super().closeEvent(event)
