"""What the hub answered, as tables: repositories found, and the files of one, in the choices that make sense."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

import msgspec
from PySide6.QtCore import QAbstractTableModel, QModelIndex, QObject, QPersistentModelIndex, Qt, Signal

from app.core.library import ModelEntry, ModelFormat
from app.hub.files import Listing, RemoteFile, SearchHit
from app.hub.selection import gguf_choices, missing_parts, repository_choice
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


class FileRow(msgspec.Struct, kw_only=True):
    """One line of a file list: a file, or files that are of use only together.

    Attributes:
        model: a GGUF model. usual: part of what "the repository" means. problem: why it is of no use as it is.
        here: bytes of it that lie on this machine already, and of these `in_place` where they would go.
        sees: it comes with a projector, so that the model can see images.
    """

    title: str
    files: tuple[RemoteFile, ...]
    quantization: str = ""
    fitting: Fitting | None = None
    model: bool = False
    usual: bool = False
    checked: bool = False
    here: int = 0
    in_place: int = 0
    sees: bool = False
    problem: str = ""

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)


FILE, QUANTIZATION, SIZE, FITS, NOTE = range(5)
RowRole = Qt.ItemDataRole.UserRole


class FileTable(QAbstractTableModel):
    """The files of a repository with check boxes: its GGUF models as whole choices first, then the rest by size.

    Args:
        judge: where a model of this size fits.

    Signals:
        chosen: another set of files is checked.
    """

    HEADERS = ("File", "Quantization", "Size", "Fits", "Note")
    chosen = Signal()

    def __init__(self, judge: Callable[[ModelEntry], Fitting], parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._judge = judge
        self.listing: Listing | None = None
        self.rows: list[FileRow] = []
        self.whole: Fitting | None = None
        self._folder = ""

    def set_listing(self, listing: Listing | None, file: str = "", folder: Path | None = None) -> None:
        """Show a repository.

        Args:
            file: is checked when a link named one, else what most people want. folder: where its files would go.
        """
        self.beginResetModel()
        self.listing = listing
        self.whole = None
        self._folder = f"{folder}{os.sep}" if folder is not None else ""
        self.rows = self._rows(listing) if listing is not None else []
        named = [row for row in self.rows if file and any(file == part.path for part in row.files)]
        for row in named or self._proposed():
            row.checked = True
        self.endResetModel()
        self.chosen.emit()

    def _rows(self, listing: Listing) -> list[FileRow]:
        choices = gguf_choices(listing.files)
        usual = {file.path for file in repository_choice(listing.files).files}
        rows: list[FileRow] = []
        covered: set[str] = set()
        for choice in choices:
            lost = missing_parts(choice)
            notes = f"{len(lost)} of its parts are missing on the hub" if lost else ""
            rows.append(
                FileRow(
                    title=choice.title,
                    files=choice.all_files,
                    quantization=choice.quantization,
                    fitting=self._judge(_entry(choice.title, choice.bytes, ModelFormat.GGUF)),
                    model=True,
                    sees=choice.projector is not None,
                    problem=notes,
                )
            )
            covered |= {file.path for file in choice.all_files}

        def place(file: RemoteFile) -> tuple[object, ...]:
            # The parts of a model in their own order, then what else is usual, the largest first.
            return (file.path not in usual, *((0, 0) if _is_weight(file.path) else (1, -file.size)), file.path)

        for file in sorted(listing.files, key=place):
            if file.path not in covered:
                rows.append(FileRow(title=file.path, files=(file,), usual=file.path in usual))
        weights = sum(f.size for f in listing.files if f.path in usual and _is_weight(f.path))
        if listing.kind == "model" and weights:
            self.whole = self._judge(_entry(listing.repo, weights, ModelFormat.SAFETENSORS))
        for row in rows:
            if listing.here:
                row.here = sum(file.size for file in row.files if file.path in listing.here)
                row.in_place = sum(file.size for file in row.files if self._is_in_place(file))
            if row.usual and _is_weight(row.title):
                row.fitting = self.whole  # the files of one model fit together or not at all
        return rows

    def _is_in_place(self, file: RemoteFile) -> bool:
        place = self.listing.here.get(file.path, "") if self.listing is not None else ""
        return bool(place and self._folder) and place.startswith(self._folder)

    def _proposed(self) -> list[FileRow]:
        """The repository's usual files; of several GGUF models the one that most people want and that fits."""
        models = [row for row in self.rows if row.model]
        if not models:
            return [row for row in self.rows if row.usual]
        fitting = [
            row for row in models if row.fitting is not None and row.fitting.tone == "positive" and not row.problem
        ]
        for wanted in ("Q4_K_M", "Q5_K_M", "Q4_K_S"):
            if found := [row for row in fitting if row.quantization == wanted]:
                return found[:1]
        return fitting[-1:] if len(models) > 1 else models

    def check(self, which: str) -> None:
        """Check `usual`, `all` or `none`."""
        usual = [row for row in self.rows if row.usual]
        proposed = usual if any(_is_weight(row.title) for row in usual) else self._proposed()
        for row in self.rows:
            row.checked = which == "all" or (which == "usual" and any(row is one for one in proposed))
        if self.rows:
            self.dataChanged.emit(self.index(0, 0), self.index(len(self.rows) - 1, 0))
        self.chosen.emit()

    @property
    def files(self) -> tuple[RemoteFile, ...]:
        """The checked files, each once."""
        found = {file.path: file for row in self.rows if row.checked for file in row.files}
        return tuple(found.values())

    @property
    def elsewhere(self) -> int:
        """Bytes of the checked files that lie on this machine already, but not where they would go."""
        here = self.listing.here if self.listing is not None else {}
        if not here:
            return 0
        return sum(file.size for file in self.files if file.path in here and not self._is_in_place(file))

    @property
    def in_place(self) -> int:
        """Bytes of the checked files that are downloaded already."""
        if self.listing is None or not self.listing.here:
            return 0
        return sum(file.size for file in self.files if self._is_in_place(file))

    @property
    def holds_weights(self) -> bool:
        """Whether there is anything in it to run."""
        return any(row.model or _is_weight(row.title) for row in self.rows)

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
        return row.problem or ", ".join(_notes(row))

    def setData(self, index: Index, value: object, role: int = Qt.ItemDataRole.EditRole) -> bool:
        if role != Qt.ItemDataRole.CheckStateRole or index.column() != FILE:
            return False
        self.rows[index.row()].checked = Qt.CheckState(value) == Qt.CheckState.Checked  # type: ignore[arg-type]
        self.dataChanged.emit(index, index)
        self.chosen.emit()
        return True


def _notes(row: FileRow) -> list[str]:
    """What is worth knowing of a line, the most important first: the rest may not find room."""
    notes = []
    if row.in_place >= row.bytes * 0.99 and row.in_place:
        notes.append("downloaded")
    elif row.here:
        notes.append("on this machine" if row.here >= row.bytes * 0.99 else "partly on this machine")
    if row.sees:
        notes.append("sees images")
    if len(row.files) > 1:
        notes.append(f"{len(row.files)} files")
    return notes


def _is_weight(path: str) -> bool:
    return path.lower().endswith((".safetensors", ".bin", ".pt", ".pth"))


def _entry(name: str, size: int, kind: ModelFormat) -> ModelEntry:
    """A model of which only the size is known."""
    return ModelEntry(id=name, name=name, path=name, root="", format=kind, bytes=size, weight_bytes=size)
