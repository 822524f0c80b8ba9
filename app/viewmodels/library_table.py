"""A table of what the library holds: ids and a cache of the rows in sight; SQL sorts and filters."""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from pathlib import Path
from typing import Generic, TypeVar

from PySide6.QtCore import QAbstractTableModel, QModelIndex, QObject, QPersistentModelIndex, Qt, Signal

from app.core.library import AdapterEntry, ModelEntry
from app.store.library import LibraryStore

Index = QModelIndex | QPersistentModelIndex
Entry = TypeVar("Entry", ModelEntry, AdapterEntry)

NAME = 0
BLOCK = 64  # rows that are read at once
KEPT = 1024

EntryRole = Qt.ItemDataRole.UserRole
FittingRole = Qt.ItemDataRole.UserRole + 1
MarkedRole = Qt.ItemDataRole.UserRole + 2  # loaded, or in the stack


class LibraryTable(QAbstractTableModel, Generic[Entry]):
    """Entries of the library; the first column is the name. What is marked abstract is a table's own.

    Attributes:
        columns: title, key that the store sorts by ("" for what is not in the index), whether numbers stand at the right.
        can_rename: names can be edited in place.

    Signals:
        counted(shown, in all). renamed(entry, what was typed).
    """

    counted = Signal(int, int)
    renamed = Signal(object, str)
    columns: tuple[tuple[str, str, bool], ...]

    def __init__(self, library: LibraryStore, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._library = library
        self._home = str(Path.home())
        self._ids: list[str] = []
        self._rows: OrderedDict[str, Entry] = OrderedDict()
        self._text = ""
        self._sort = (NAME, False)
        self.total = 0
        self.can_rename = False

    # What a table says of its entries ---------------------------------------------------------------

    @abstractmethod
    def _found_ids(self, text: str, key: str, descending: bool) -> list[str]:
        """Ids of what has all words of `text`, in the order of `key`."""

    @abstractmethod
    def _read(self, ids: list[str]) -> list[Entry]:
        """The entries with these ids."""

    @abstractmethod
    def _count(self) -> int:
        """How many there are in all."""

    @abstractmethod
    def _marked(self, entry: Entry) -> bool:
        """Whether a dot stands before its name."""

    @abstractmethod
    def _text_of(self, entry: Entry, column: int) -> str:
        """What a cell says."""

    @abstractmethod
    def _tip_of(self, entry: Entry, column: int) -> str:
        """What a cell says when the pointer rests on it."""

    # What it shows ----------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Ask the store again: the library, the filter or the order changed."""
        column, descending = self._sort
        ids = self._found_ids(self._text, self.columns[column][1], descending)
        self.total = len(ids) if not self._text else self._count()
        self._rows.clear()
        if ids == self._ids:
            if ids:
                self.dataChanged.emit(self.index(0, 0), self.index(len(ids) - 1, len(self.columns) - 1))
        else:
            self.beginResetModel()
            self._ids = ids
            self.endResetModel()
        self.counted.emit(len(ids), self.total)

    def set_filter(self, text: str) -> None:
        if text != self._text:
            self._text = text
            self.refresh()

    @property
    def filter(self) -> str:
        return self._text

    def _touch_column(self, column: int) -> None:
        if self._ids:
            self.dataChanged.emit(self.index(0, column), self.index(len(self._ids) - 1, column))

    def entry(self, row: int) -> Entry | None:
        """The entry of a row; None when it went away since the list was made."""
        if not 0 <= row < len(self._ids):
            return None
        wanted = self._ids[row]
        if wanted not in self._rows:
            start = row - row % BLOCK
            for found in self._read(self._ids[start : start + BLOCK]):
                self._rows[found.id] = found
            while len(self._rows) > KEPT:
                self._rows.popitem(last=False)
        return self._rows.get(wanted)

    def row_of(self, entry: str) -> int:
        """The row of an id, -1 when it is not shown."""
        return self._ids.index(entry) if entry in self._ids else -1

    # Qt's questions ---------------------------------------------------------------------------------

    def rowCount(self, parent: Index = QModelIndex()) -> int:
        return 0 if parent.isValid() else len(self._ids)

    def columnCount(self, parent: Index = QModelIndex()) -> int:
        return 0 if parent.isValid() else len(self.columns)

    def headerData(self, section: int, orientation: Qt.Orientation, role: int = Qt.ItemDataRole.DisplayRole) -> object:
        if orientation == Qt.Orientation.Horizontal:
            if role == Qt.ItemDataRole.DisplayRole:
                return self.columns[section][0]
            if role == Qt.ItemDataRole.TextAlignmentRole:
                return self._alignment(section)
        return None

    def data(self, index: Index, role: int = Qt.ItemDataRole.DisplayRole) -> object:
        entry = self.entry(index.row())
        if entry is None:
            return None
        column = index.column()
        if role == Qt.ItemDataRole.DisplayRole:
            return self._text_of(entry, column)
        if role == Qt.ItemDataRole.EditRole:
            return entry.name
        if role == EntryRole:
            return entry
        if role == Qt.ItemDataRole.TextAlignmentRole:
            return self._alignment(column)
        if role == Qt.ItemDataRole.ToolTipRole:
            return self._tip_of(entry, column)
        if role == MarkedRole:
            return self._marked(entry)
        if role == Qt.ItemDataRole.AccessibleTextRole:
            return f"{self.columns[column][0]}: {self._text_of(entry, column)}"
        return None

    def _alignment(self, column: int) -> int:
        side = Qt.AlignmentFlag.AlignRight if self.columns[column][2] else Qt.AlignmentFlag.AlignLeft
        return int(side | Qt.AlignmentFlag.AlignVCenter)

    def flags(self, index: Index) -> Qt.ItemFlag:
        editable = self.can_rename and index.column() == NAME
        return super().flags(index) | (Qt.ItemFlag.ItemIsEditable if editable else Qt.ItemFlag.NoItemFlags)

    def setData(self, index: Index, value: object, role: int = Qt.ItemDataRole.EditRole) -> bool:
        """A name was typed: `renamed` tells, and whoever hears it changes it."""
        entry = self.entry(index.row())
        if role != Qt.ItemDataRole.EditRole or entry is None or not self.can_rename:
            return False
        self.renamed.emit(entry, " ".join(str(value).split()))
        return True

    def sort(self, column: int, order: Qt.SortOrder = Qt.SortOrder.AscendingOrder) -> None:
        wanted = (column, order == Qt.SortOrder.DescendingOrder)
        if self.columns[column][1] and wanted != self._sort:
            self._sort = wanted
            self.refresh()
