"""What the hub answered, as tables: repositories found, and the files of one, in the choices that make sense."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

from PySide6.QtCore import QAbstractTableModel, QModelIndex, QObject, QPersistentModelIndex, Qt, QTimer, Signal, Slot

from app.core.library import ModelEntry
from app.hub.files import Listing, RemoteFile, SearchHit
from app.hub.pieces import PIECE, Pieces
from app.viewmodels.file_rows import FileRow, FileRows, notes_of
from app.viewmodels.fitting import Fitting
from app.viewmodels.units import readable_bytes, readable_count, readable_when

Index = QModelIndex | QPersistentModelIndex
_RIGHT = int(Qt.AlignmentFlag.AlignRight | Qt.AlignmentFlag.AlignVCenter)
_LEFT = int(Qt.AlignmentFlag.AlignLeft | Qt.AlignmentFlag.AlignVCenter)

HitRole = Qt.ItemDataRole.UserRole
REPO, KIND, DOWNLOADS, LIKES, UPDATED = range(5)


class ResultTable(QAbstractTableModel):
    """Repositories that a search found; sorted by any column, here, without asking again."""

    HEADERS = ("Repository", "Kind", "Downloads", "Likes", "Updated")

    def __init__(self, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self.hits: list[SearchHit] = []

    def set_hits(self, hits: Sequence[SearchHit]) -> None:
        self.beginResetModel()
        self.hits = list(hits)
        self.endResetModel()

    def sort(self, column: int, order: Qt.SortOrder = Qt.SortOrder.AscendingOrder) -> None:
        keys: dict[int, Callable[[SearchHit], object]] = {
            REPO: lambda hit: hit.repo.lower(),
            KIND: kind_of,
            DOWNLOADS: lambda hit: hit.downloads,
            LIKES: lambda hit: hit.likes,
            UPDATED: lambda hit: hit.modified,
        }
        if column in keys:
            self.layoutAboutToBeChanged.emit()
            self.hits.sort(key=keys[column], reverse=order == Qt.SortOrder.DescendingOrder)  # type: ignore[arg-type]
            self.layoutChanged.emit()

    def rowCount(self, parent: Index = QModelIndex()) -> int:
        return 0 if parent.isValid() else len(self.hits)

    def columnCount(self, parent: Index = QModelIndex()) -> int:
        return 0 if parent.isValid() else len(self.HEADERS)

    def headerData(self, section: int, orientation: Qt.Orientation, role: int = Qt.ItemDataRole.DisplayRole) -> object:
        if orientation == Qt.Orientation.Horizontal:
            if role == Qt.ItemDataRole.DisplayRole:
                return self.HEADERS[section]
            if role == Qt.ItemDataRole.TextAlignmentRole:
                return _RIGHT if section in (DOWNLOADS, LIKES) else _LEFT
        return None

    def data(self, index: Index, role: int = Qt.ItemDataRole.DisplayRole) -> object:
        hit, column = self.hits[index.row()], index.column()
        if role in (Qt.ItemDataRole.DisplayRole, Qt.ItemDataRole.AccessibleTextRole):
            return (
                hit.repo,
                kind_of(hit),
                readable_count(hit.downloads),
                readable_count(hit.likes),
                readable_when(_moment(hit.modified)),
            )[column]
        if role == Qt.ItemDataRole.TextAlignmentRole:
            return _RIGHT if column in (DOWNLOADS, LIKES) else _LEFT
        return hit if role == HitRole else None


def kind_of(hit: SearchHit) -> str:
    """GGUF, LoRA, safetensors: what a search result is, by the hub's tags; with the lock of gated ones."""
    tags = {tag.lower() for tag in hit.tags}
    words = [
        word
        for word, marks in (
            ("LoRA", {"lora", "peft", "adapter"}),
            ("GGUF", {"gguf"}),
            ("GPTQ", {"gptq"}),
            ("AWQ", {"awq"}),
            ("EXL2", {"exl2"}),
            ("safetensors", {"safetensors"}),
        )
        if marks & tags
    ]
    if len(words) > 1 and "safetensors" in words:
        words.remove("safetensors")
    return ", ".join([*words[:2], *(["gated"] if hit.gated else [])])


def _moment(iso: str) -> float:
    try:
        return datetime.fromisoformat(iso).timestamp()
    except ValueError:
        return 0.0


FILE, QUANTIZATION, SIZE, FITS, NOTE = range(5)
RowRole = Qt.ItemDataRole.UserRole


class FileTable(QAbstractTableModel):
    """The files of a repository with check boxes, in the lines of `FileRows`.

    Args:
        judge: where a model of this size fits.

    Signals:
        ready: the lines of the listing are there. chosen: another set of files is checked.
    """

    HEADERS = ("File", "Quantization", "Size", "Fits", "Note")
    ready = Signal()
    chosen = Signal()

    def __init__(self, judge: Callable[[ModelEntry], Fitting], parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._judge = judge
        self.listing: Listing | None = None
        self._lines: FileRows | None = None
        self._work: Pieces[None] | None = None
        self._forget_choice()
        self._timer = QTimer(self)
        self._timer.setInterval(0)
        self._timer.timeout.connect(self._go_on)

    def set_listing(self, listing: Listing | None, file: str = "", folder: Path | None = None) -> None:
        """Show a repository: at once, or, where it holds thousands of files, a little later; `ready` tells.

        Args:
            file: is checked when a link named one, else what most people want. folder: where its files would go.
        """
        self._timer.stop()
        self.beginResetModel()
        self.listing = listing
        self._lines = FileRows(listing, folder, self._judge) if listing is not None else None
        self._work = self._arrange(self._lines, file) if self._lines is not None else None
        self._forget_choice()
        self.endResetModel()
        self.chosen.emit()
        self._go_on()
        if self.busy:
            self._timer.start()

    @property
    def busy(self) -> bool:
        """Whether the lines are still being put in order; there are none until then."""
        return self._work is not None

    @Slot()
    def _go_on(self) -> None:
        """Do one piece of what is left; the window comes between two of them."""
        if self._work is None or next(self._work, self) is None:
            return
        self._timer.stop()
        self.beginResetModel()
        self._work = None
        self.endResetModel()
        self.ready.emit()
        self.chosen.emit()

    def _arrange(self, lines: FileRows, file: str) -> Pieces[None]:
        yield from lines.work()
        named = [row for row in lines.rows if any(file == part.path for part in row.files)] if file else []
        for number, row in enumerate(named or lines.proposed(), 1):
            self._check(row, True)
            if not number % PIECE:
                yield

    def _forget_choice(self) -> None:
        self._checked = self._seeing = self._bytes = self._here = self._in_place = 0

    @property
    def rows(self) -> list[FileRow]:
        return self._lines.rows if self._lines is not None and not self.busy else []

    @property
    def whole(self) -> Fitting | None:
        """Where the repository's usual weights fit together."""
        return self._lines.whole if self._lines is not None else None

    @property
    def holds_weights(self) -> bool:
        """Whether there is anything in it to run."""
        return self._lines is not None and self._lines.holds_weights

    def check(self, which: str) -> None:
        """Check `usual`, `all` or `none`."""
        if self._lines is None or self.busy:
            return
        for row in self.rows:
            row.checked = False
        chosen = self._lines.named(which)
        for row in chosen:
            row.checked = True
        self._checked = len(chosen)
        self._seeing = sum(row.sees for row in chosen)
        self._bytes = sum(row.bytes for row in chosen)
        self._here = sum(row.here for row in chosen)
        self._in_place = sum(row.in_place for row in chosen)
        if self.rows:
            self.dataChanged.emit(self.index(0, 0), self.index(len(self.rows) - 1, 0))
        self.chosen.emit()

    # What is checked: sums are kept, since to add up a hundred thousand files takes longer than a click may ------------

    def _check(self, row: FileRow, checked: bool) -> None:
        if row.checked != checked:
            row.checked = checked
            step = 1 if checked else -1
            self._checked += step
            self._seeing += step * row.sees
            self._bytes += step * row.bytes
            self._here += step * row.here
            self._in_place += step * row.in_place

    def _without_twice(self, total: int, part: int) -> int:
        """The projector goes with every model, and is counted once. `part`: what of it is in such a total."""
        return total - max(0, self._seeing - 1) * part

    @property
    def any_chosen(self) -> bool:
        return self._checked > 0 and not self.busy

    @property
    def bytes(self) -> int:
        """Of the checked files, each counted once."""
        projector = self._lines.projector if self._lines is not None else None
        return self._without_twice(self._bytes, projector.size if projector is not None else 0)

    @property
    def in_place(self) -> int:
        """Bytes of the checked files that are downloaded already."""
        return self._without_twice(
            self._in_place, self._lines.bytes_in_place(self._lines.projector) if self._lines else 0
        )

    @property
    def elsewhere(self) -> int:
        """Bytes of the checked files that lie on this machine already, but not where they would go."""
        here = self._without_twice(self._here, self._lines.bytes_here(self._lines.projector) if self._lines else 0)
        return here - self.in_place

    @property
    def files(self) -> tuple[RemoteFile, ...]:
        """The checked files, each once."""
        found = {file.path: file for row in self.rows if row.checked for file in row.files}
        return tuple(found.values())

    # Qt's questions ---------------------------------------------------------------------------------

    def rowCount(self, parent: Index = QModelIndex()) -> int:
        return 0 if parent.isValid() else len(self.rows)

    def columnCount(self, parent: Index = QModelIndex()) -> int:
        return 0 if parent.isValid() else len(self.HEADERS)

    def headerData(self, section: int, orientation: Qt.Orientation, role: int = Qt.ItemDataRole.DisplayRole) -> object:
        if orientation == Qt.Orientation.Horizontal:
            if role == Qt.ItemDataRole.DisplayRole:
                return self.HEADERS[section]
            if role == Qt.ItemDataRole.TextAlignmentRole:
                return _RIGHT if section == SIZE else _LEFT
        return None

    def flags(self, index: Index) -> Qt.ItemFlag:
        flags = Qt.ItemFlag.ItemIsEnabled | Qt.ItemFlag.ItemIsSelectable
        return flags | Qt.ItemFlag.ItemIsUserCheckable if index.column() == FILE else flags

    def data(self, index: Index, role: int = Qt.ItemDataRole.DisplayRole) -> object:
        row, column = self.rows[index.row()], index.column()
        if role in (Qt.ItemDataRole.DisplayRole, Qt.ItemDataRole.AccessibleTextRole):
            return self._text(row, column)
        if role == Qt.ItemDataRole.CheckStateRole and column == FILE:
            return Qt.CheckState.Checked if row.checked else Qt.CheckState.Unchecked
        if role == Qt.ItemDataRole.TextAlignmentRole:
            return _RIGHT if column == SIZE else _LEFT
        if role == Qt.ItemDataRole.ToolTipRole:
            if column == FITS and row.fitting is not None:
                return f"Judged by size alone.\n{row.fitting.numbers}"
            return "\n".join(file.path for file in row.files) if len(row.files) > 1 else row.problem or row.title
        return row if role == RowRole else None

    def _text(self, row: FileRow, column: int) -> str:
        if column == FILE:
            return row.title
        if column == QUANTIZATION:
            return row.quantization
        if column == SIZE:
            return readable_bytes(row.bytes)
        if column == FITS:
            return row.fitting.word if row.fitting is not None else ""
        return row.problem or ", ".join(notes_of(row))

    def setData(self, index: Index, value: object, role: int = Qt.ItemDataRole.EditRole) -> bool:
        if role != Qt.ItemDataRole.CheckStateRole or index.column() != FILE:
            return False
        self._check(self.rows[index.row()], Qt.CheckState(value) == Qt.CheckState.Checked)  # type: ignore[arg-type]
        self.dataChanged.emit(index, index)
        self.chosen.emit()
        return True
