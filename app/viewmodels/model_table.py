"""The library's models as a table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PySide6.QtCore import QObject, Qt

from app.core.library import ModelEntry, ModelFormat
from app.store.library import LibraryStore
from app.viewmodels.fitting import Fitting
from app.viewmodels.library_table import FittingRole, Index, LibraryTable
from app.viewmodels.units import readable_bytes, readable_count, readable_tokens, readable_when, short_path

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


class ModelTable(LibraryTable[ModelEntry]):
    """Models of the library.

    Args:
        fitting: where a model fits, for the rows in sight only.
        loaded: id of the model that is loaded, or "".
    """

    columns = COLUMNS

    def __init__(
        self,
        library: LibraryStore,
        *,
        fitting: Callable[[ModelEntry], Fitting] | None = None,
        loaded: Callable[[], str] = lambda: "",
        parent: QObject | None = None,
    ) -> None:
        super().__init__(library, parent)
        self._fitting = fitting
        self._loaded = loaded
        self._fits: dict[str, Fitting] = {}

    def refresh(self) -> None:
        self._fits.clear()
        super().refresh()

    def machine_changed(self) -> None:
        """Free memory moved: judge the rows in sight anew."""
        self._fits.clear()
        self._touch_column(FITS)

    def loaded_changed(self) -> None:
        self._touch_column(NAME)

    def fitting(self, entry: ModelEntry) -> Fitting | None:
        if self._fitting is None:
            return None
        if entry.id not in self._fits:
            self._fits[entry.id] = self._fitting(entry)
        return self._fits[entry.id]

    def data(self, index: Index, role: int = Qt.ItemDataRole.DisplayRole) -> object:
        if role == FittingRole:
            entry = self.entry(index.row())
            return self.fitting(entry) if entry is not None else None
        return super().data(index, role)

    def _found_ids(self, text: str, key: str, descending: bool) -> list[str]:
        return self._library.model_ids(text, sort=key, descending=descending)

    def _read(self, ids: list[str]) -> list[ModelEntry]:
        return self._library.models_by_id(ids)

    def _count(self) -> int:
        return self._library.count()

    def _marked(self, entry: ModelEntry) -> bool:
        return entry.id == self._loaded()

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
