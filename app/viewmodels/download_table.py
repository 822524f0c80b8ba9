"""The queue as a table. Figures change a few times a second, rows rarely: each costs only what it must."""

from __future__ import annotations

from PySide6.QtCore import QAbstractTableModel, QModelIndex, QObject, QPersistentModelIndex, Qt, Slot

from app.store.downloads import DownloadState
from app.viewmodels.downloads import Downloads, Row
from app.viewmodels.units import readable_bytes, readable_seconds, readable_when

Index = QModelIndex | QPersistentModelIndex
NAME, PROGRESS, SPEED, LEFT = range(4)
DownloadRole = Qt.ItemDataRole.UserRole
STATE_WORDS = {
    DownloadState.QUEUED: ("Waiting", "clock", "muted"),
    DownloadState.RUNNING: ("Downloading", "download", "accent"),
    DownloadState.PAUSED: ("Paused", "pause", "muted"),
    DownloadState.DONE: ("Done", "done", "positive"),
    DownloadState.FAILED: ("Failed", "error", "negative"),
}


class DownloadTable(QAbstractTableModel):
    """All downloads, in the order of the queue."""

    HEADERS = ("Download", "Progress", "Speed", "Time left")

    def __init__(self, downloads: Downloads, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._downloads = downloads
        self.rows: list[Row] = list(downloads.rows)
        downloads.changed.connect(self.refresh)
        downloads.progressed.connect(self._progressed)

    @Slot()
    def refresh(self) -> None:
        """Take over the rows; the selection keeps to its downloads, also when these move."""
        rows = self._downloads.rows
        if [id(row) for row in rows] == [id(row) for row in self.rows]:
            if rows:
                self.dataChanged.emit(self.index(0, 0), self.index(len(rows) - 1, LEFT))
            return
        self.layoutAboutToBeChanged.emit()
        old, before = self.rows, self.persistentIndexList()
        self.rows = list(rows)
        places = {id(row): place for place, row in enumerate(self.rows)}
        after = []
        for index in before:
            place = places.get(id(old[index.row()]))
            after.append(QModelIndex() if place is None else self.createIndex(place, index.column()))
        self.changePersistentIndexList(before, after)
        self.layoutChanged.emit()

    @Slot()
    def _progressed(self) -> None:
        for place, row in enumerate(self.rows):
            if row.worker is not None or row.waits:
                self.dataChanged.emit(self.index(place, NAME), self.index(place, LEFT))

    def rowCount(self, parent: Index = QModelIndex()) -> int:
        return 0 if parent.isValid() else len(self.rows)

    def columnCount(self, parent: Index = QModelIndex()) -> int:
        return 0 if parent.isValid() else len(self.HEADERS)

    def headerData(self, section: int, orientation: Qt.Orientation, role: int = Qt.ItemDataRole.DisplayRole) -> object:
        if orientation == Qt.Orientation.Horizontal:
            if role == Qt.ItemDataRole.DisplayRole:
                return self.HEADERS[section]
            if role == Qt.ItemDataRole.TextAlignmentRole:
                return int(Qt.AlignmentFlag.AlignLeft | Qt.AlignmentFlag.AlignVCenter)
        return None

    def data(self, index: Index, role: int = Qt.ItemDataRole.DisplayRole) -> object:
        row, column = self.rows[index.row()], index.column()
        if role == Qt.ItemDataRole.DisplayRole:
            return text_of(row, column)
        if role == Qt.ItemDataRole.AccessibleTextRole:
            if column == NAME:  # the state is an icon, the file at work a second line
                return ", ".join(
                    part for part in (text_of(row, NAME), STATE_WORDS[row.state][0], file_text(row)) if part
                )
            return text_of(row, column)
        if role == Qt.ItemDataRole.ToolTipRole:
            download = row.download
            if column == PROGRESS and download.message:
                return f"{download.message} {download.hint}".strip()
            return f"{download.title}\n{download.folder}"
        return row if role == DownloadRole else None


def text_of(row: Row, column: int) -> str:
    """A cell in words."""
    if column == NAME:
        return row.download.title
    if column == PROGRESS:
        return progress_text(row)
    if row.worker is None:
        return ""
    if column == SPEED:
        return f"{readable_bytes(row.speed.now)}/s" if row.speed.now >= 1 else "–"
    left = row.left
    return readable_seconds(left) if left is not None else "–"


def file_text(row: Row) -> str:
    """The file at work and how far it is, `model-00002-of-00004.safetensors · 1.2 GB of 4.9 GB`; "" where there is one alone."""
    news = row.news
    if news is None or news.files_total < 2 or not news.file or row.state is not DownloadState.RUNNING:
        return ""
    return f"{news.file.rpartition('/')[2]} · {readable_bytes(news.file_done)} of {readable_bytes(news.file_total)}"


def progress_text(row: Row) -> str:
    """`1.2 GB of 4.1 GB`, what it waits for, or how it ended."""
    download, news = row.download, row.news
    size = f"{readable_bytes(row.done)} of {readable_bytes(download.total)}"
    if row.state is DownloadState.DONE:
        kept = f" · {download.message}" if download.message else ""
        return f"{readable_bytes(download.total)}, verified, {readable_when(download.ended).lower()}{kept}"
    if row.state is DownloadState.FAILED:
        return download.message
    if row.wanted is not None or row.forget is not None:
        return f"Stopping · {size}"
    if row.state is DownloadState.PAUSED:
        return f"Paused · {size}"
    if row.waits:
        return f"{download.message} Tries again in {readable_seconds(row.waits)}"
    if row.state is DownloadState.QUEUED:
        return f"Waiting · {size}" if row.done else f"Waiting · {readable_bytes(download.total)}"
    if news is None:
        return f"Starting · {size}"
    if news.waiting:
        goes_on = f" Goes on in {readable_seconds(news.waiting_seconds)}." if news.waiting_seconds >= 1 else ""
        return f"{news.waiting}{goes_on}"
    files = (
        f" · file {min(news.files_done + 1, news.files_total)} of {news.files_total}" if news.files_total > 1 else ""
    )
    phase = "" if news.phase == "Downloading" else f"{news.phase} · "
    return f"{phase}{size}{files}"
