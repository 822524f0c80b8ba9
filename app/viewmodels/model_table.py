"""The library's models as a table: ids and a cache of the rows in sight; SQL sorts and filters."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from PySide6.QtCore import QAbstractTableModel, QModelIndex, QObject, QPersistentModelIndex, Qt, Signal

from app.core.library import ModelEntry, ModelFormat
from app.store.library import LibraryStore
from app.viewmodels.fitting import Fitting
from app.viewmodels.units import readable_bytes, readable_count, readable_tokens, readable_when, short_path

Index = QModelIndex | QPersistentModelIndex

# Title, key that the store sorts by, whether numbers stand at the right. "Fits" sorts by size, which decides it.
COLUMNS = (
    ("Name", "name", False),
    ("Format", "format", False),
    ("Architecture", "architecture", False),
    ("Parameters", "parameters", True),
    ("Size", "bytes", True),
    ("Context", "context", True),
    ("Fits", "bytes", False),
    ("Where", "root", False),
    ("Last used", "last_used", False),
)
NAME, FORMAT, ARCHITECTURE, PARAMETERS, SIZE, CONTEXT, FITS, WHERE, LAST_USED = range(len(COLUMNS))
BLOCK = 64
KEPT = 1024

EntryRole = Qt.ItemDataRole.UserRole
FittingRole = Qt.ItemDataRole.UserRole + 1
LoadedRole = Qt.ItemDataRole.UserRole + 2

_FORMATS = {
    ModelFormat.SAFETENSORS: "safetensors",
    ModelFormat.TORCH_BIN: "PyTorch .bin",
    ModelFormat.GGUF: "GGUF",
    ModelFormat.GPTQ: "GPTQ",
    ModelFormat.AWQ: "AWQ",
    ModelFormat.EXL2: "EXL2",
    ModelFormat.EXL3: "EXL3",
    ModelFormat.HQQ: "HQQ",
    ModelFormat.BITSANDBYTES: "bitsandbytes",
    ModelFormat.OTHER: "other",
}


def format_title(entry: ModelEntry) -> str:
    """`GGUF · Q4_K_M`."""
    name = _FORMATS[entry.format]
    return f"{name} · {entry.quantization}" if entry.quantization else name


class ModelTable(QAbstractTableModel):
    """Models of the library.

    Args:
        fitting: where a model fits, for the rows in sight only.
        loaded: id of the model that is loaded, or "".

    Attributes:
        can_rename: names can be edited in place.

    Signals:
        counted(shown, in all). renamed(ModelEntry, what was typed).
    """

    counted = Signal(int, int)
    renamed = Signal(object, str)

    def __init__(
        self,
        library: LibraryStore,
        *,
        fitting: Callable[[ModelEntry], Fitting] | None = None,
        loaded: Callable[[], str] = lambda: "",
        parent: QObject | None = None,
    ) -> None:
        super().__init__(parent)
        self._library = library
        self._fitting = fitting
        self._loaded = loaded
        self._home = str(Path.home())
        self._ids: list[str] = []
        self._rows: OrderedDict[str, ModelEntry] = OrderedDict()
        self._fits: dict[str, Fitting] = {}
        self._text = ""
        self._sort = (NAME, False)
        self.total = 0
        self.can_rename = False

    # What it shows ----------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Ask the store again: the library, the filter or the order changed."""
        column, descending = self._sort
        ids = self._library.model_ids(self._text, COLUMNS[column][1], descending)
        self.total = len(ids) if not self._text else self._library.count()
        self._rows.clear()
        self._fits.clear()
        if ids == self._ids:
            if ids:
                self.dataChanged.emit(self.index(0, 0), self.index(len(ids) - 1, len(COLUMNS) - 1))
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

    def machine_changed(self) -> None:
        """Free memory moved: judge the rows in sight anew."""
        self._fits.clear()
        self._touch_column(FITS)

    def loaded_changed(self) -> None:
        self._touch_column(NAME)

    def _touch_column(self, column: int) -> None:
        if self._ids:
            self.dataChanged.emit(self.index(0, column), self.index(len(self._ids) - 1, column))

    def entry(self, row: int) -> ModelEntry | None:
        """The model of a row; None when it went away since the list was made."""
        if not 0 <= row < len(self._ids):
            return None
        model = self._ids[row]
        if model not in self._rows:
            start = row - row % BLOCK
            for found in self._library.models_by_id(self._ids[start : start + BLOCK]):
                self._rows[found.id] = found
            while len(self._rows) > KEPT:
                self._rows.popitem(last=False)
        return self._rows.get(model)

    def row_of(self, model: str) -> int:
        """The row of a model, -1 when it is not shown."""
        return self._ids.index(model) if model in self._ids else -1

    def fitting(self, entry: ModelEntry) -> Fitting | None:
        if self._fitting is None:
            return None
        if entry.id not in self._fits:
            self._fits[entry.id] = self._fitting(entry)
        return self._fits[entry.id]

    # Qt's questions ---------------------------------------------------------------------------------

    def rowCount(self, parent: Index = QModelIndex()) -> int:
        return 0 if parent.isValid() else len(self._ids)

    def columnCount(self, parent: Index = QModelIndex()) -> int:
        return 0 if parent.isValid() else len(COLUMNS)

    def headerData(self, section: int, orientation: Qt.Orientation, role: int = Qt.ItemDataRole.DisplayRole) -> object:
        if orientation == Qt.Orientation.Horizontal:
            if role == Qt.ItemDataRole.DisplayRole:
                return COLUMNS[section][0]
            if role == Qt.ItemDataRole.TextAlignmentRole:
                side = Qt.AlignmentFlag.AlignRight if COLUMNS[section][2] else Qt.AlignmentFlag.AlignLeft
                return int(side | Qt.AlignmentFlag.AlignVCenter)
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
            side = Qt.AlignmentFlag.AlignRight if COLUMNS[column][2] else Qt.AlignmentFlag.AlignLeft
            return int(side | Qt.AlignmentFlag.AlignVCenter)
        if role == Qt.ItemDataRole.ToolTipRole:
            return self._tip_of(entry, column)
        if role == FittingRole:
            return self.fitting(entry)
        if role == LoadedRole:
            return entry.id == self._loaded()
        if role == Qt.ItemDataRole.AccessibleTextRole:
            return f"{COLUMNS[column][0]}: {self._text_of(entry, column)}"
        return None

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
        if wanted != self._sort:
            self._sort = wanted
            self.refresh()

    def _text_of(self, entry: ModelEntry, column: int) -> str:
        match column:
            case 0:
                return entry.name
            case 1:
                return format_title(entry)
            case 2:
                return entry.model_type or entry.architecture or "–"
            case 3:
                return readable_count(entry.parameters)
            case 4:
                return readable_bytes(entry.bytes)
            case 5:
                return readable_tokens(entry.shape.context)
            case 6:
                found = self.fitting(entry)
                return found.word if found is not None else "–"
            case 7:
                return short_path(entry.root or str(Path(entry.path).parent), self._home)
            case _:
                return readable_when(entry.last_used)

    def _tip_of(self, entry: ModelEntry, column: int) -> str:
        if column == NAME and entry.problem:
            return f"{entry.path}\n{entry.problem}"
        if column in (NAME, WHERE):
            return entry.path
        if column == FITS:
            found = self.fitting(entry)
            return found.numbers if found is not None else ""
        if column == ARCHITECTURE:
            return entry.architecture
        if column == PARAMETERS and entry.parameters:
            return f"{entry.parameters:,} weights"
        if column == SIZE:
            return f"{entry.bytes:,} bytes in {len(entry.files)} file{'s' if len(entry.files) != 1 else ''}"
        return ""
