"""The library's adapters as a table, with how many models each fits."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

from PySide6.QtCore import QObject, Qt, QTimer, Slot

from app.core.library import AdapterEntry, AdapterFormat
from app.store.adapters import AdapterStore, FitCount
from app.store.database import Database
from app.store.library import LibraryStore
from app.viewmodels.background import Background
from app.viewmodels.library_table import BLOCK, Index, LibraryTable
from app.viewmodels.units import readable_bytes, short_path

# Title, key that the store sorts by ("" for what is not in the index), whether numbers stand at the right.
COLUMNS = (
    ("Name", "name", False),
    ("Base", "base", False),
    ("Kind", "kind", False),
    ("Rank", "rank", True),
    ("Alpha", "alpha", True),
    ("Targets", "targets", False),
    ("Size", "bytes", True),
    ("Fits", "", True),
    ("Run", "run", False),
    ("Where", "root", False),
)
NAME, BASE, KIND, RANK, ALPHA, TARGETS, SIZE, FITS, RUN, WHERE = range(len(COLUMNS))
RECOUNT_MS = 1500  # a scan tells of changes five times a second
FITS_MS = 60  # rows that are scrolled past are not counted

_FORMATS = {
    AdapterFormat.PEFT: "PEFT folder",
    AdapterFormat.SAFETENSORS: "safetensors file",
    AdapterFormat.TORCH_BIN: "PyTorch file",
    AdapterFormat.GGUF: "GGUF",
}


def adapter_format(entry: AdapterEntry) -> str:
    """`PEFT folder`, `GGUF`."""
    return _FORMATS[entry.format]


def base_name(recorded: str) -> str:
    """The last part of a recorded base: paths of other people's machines are long."""
    return recorded.rstrip("/\\").replace("\\", "/").rpartition("/")[2] if recorded.count("/") > 1 else recorded


def number_text(value: float) -> str:
    """16, 0.5; a dash for what is not known."""
    return f"{value:g}" if value > 0 else "–"


class AdapterTable(LibraryTable[AdapterEntry]):
    """Adapters of the library.

    How many models each fits is counted in a thread, for the rows in sight, and kept until the models change.
    """

    columns = COLUMNS

    def __init__(self, library: LibraryStore, database: Database, parent: QObject | None = None) -> None:
        super().__init__(library, parent)
        self._database = database
        self._fits: dict[str, FitCount | None] = {}
        self._wanted: OrderedDict[str, None] = OrderedDict()
        self._generation = 0
        self._stacked: frozenset[str] = frozenset()
        self._background = Background(self)
        self._background.done.connect(self._fits_counted)
        self._later = QTimer(self)
        self._later.setSingleShot(True)
        self._later.setInterval(FITS_MS)
        self._later.timeout.connect(self._count_fits)
        self._counting = False
        self._recount = QTimer(self)
        self._recount.setSingleShot(True)
        self._recount.setInterval(RECOUNT_MS)
        self._recount.timeout.connect(self._forget_fits)

    def close(self) -> None:
        """End the counting thread."""
        self._generation += 1
        self._later.stop()
        self._recount.stop()
        self._background.close()

    def library_changed(self) -> None:
        """Models or adapters came or went: what fits is counted anew soon (unchanged ones from what the store keeps)."""
        if not self._recount.isActive():
            self._recount.start()
        self.refresh()

    @Slot()
    def _forget_fits(self) -> None:
        self._generation += 1
        self._wanted.clear()
        self._fits.clear()
        self._touch_column(FITS)

    def set_stacked(self, paths: frozenset[str]) -> None:
        """These are in the stack of the loaded model."""
        if paths != self._stacked:
            self._stacked = paths
            self._touch_column(NAME)

    # Fitting ----------------------------------------------------------------------------------------

    def fits(self, entry: AdapterEntry) -> FitCount | None:
        """How many models it fits; None while that is being counted, or when it cannot be read."""
        if entry.id not in self._fits and not entry.problem:
            self._wanted[entry.id] = None
            self._wanted.move_to_end(entry.id)
            while len(self._wanted) > 2 * BLOCK:
                self._wanted.popitem(last=False)
            if not self._counting and not self._later.isActive():
                self._later.start()
        return self._fits.get(entry.id)

    @Slot()
    def _count_fits(self) -> None:
        if self._counting or not self._wanted:
            return
        ids, generation = list(self._wanted)[-BLOCK:], self._generation
        for key in ids:
            self._wanted.pop(key)
        self._counting = True
        self._background.run((generation, ids), lambda: self._counted_fits(ids, generation))

    def _counted_fits(self, ids: list[str], generation: int) -> dict[str, FitCount]:
        try:
            return AdapterStore(self._database).fit_counts(ids, lambda: generation != self._generation)
        finally:
            self._database.release()

    @Slot(object, object, object)
    def _fits_counted(self, key: object, result: object, _error: object) -> None:
        assert isinstance(key, tuple)
        generation, ids = key
        self._counting = False
        if generation == self._generation:
            found = result if isinstance(result, dict) else {}
            self._fits.update({each: found.get(each) for each in ids})
            places = {each: place for place, each in enumerate(self._ids)}
            for each in ids:
                if (place := places.get(each)) is not None:
                    self.dataChanged.emit(self.index(place, FITS), self.index(place, FITS))
        self._later.start()

    # What it says of its entries --------------------------------------------------------------------

    def headerData(self, section: int, orientation: Qt.Orientation, role: int = Qt.ItemDataRole.DisplayRole) -> object:
        if role == Qt.ItemDataRole.ToolTipRole and orientation == Qt.Orientation.Horizontal and section == FITS:
            return "How many models of the library it fits wholly"
        return super().headerData(section, orientation, role)

    def data(self, index: Index, role: int = Qt.ItemDataRole.DisplayRole) -> object:
        found = super().data(index, role)
        if role == Qt.ItemDataRole.AccessibleTextRole and index.column() == NAME:
            entry = self.entry(index.row())
            return f"{found}, in the stack" if entry is not None and self._marked(entry) else found
        return found

    def _found_ids(self, text: str, key: str, descending: bool) -> list[str]:
        return self._library.adapter_ids(text, sort=key, descending=descending)

    def _read(self, ids: list[str]) -> list[AdapterEntry]:
        return self._library.adapters_by_id(ids)

    def _count(self) -> int:
        return self._library.adapter_count()

    def _marked(self, entry: AdapterEntry) -> bool:
        return entry.path in self._stacked

    def _text_of(self, entry: AdapterEntry, column: int) -> str:
        match column:
            case 0:
                return entry.name
            case 1:
                return base_name(entry.base) or "–"
            case 2:
                return f"{entry.kind}, GGUF" if entry.format is AdapterFormat.GGUF else entry.kind
            case 3:
                return number_text(entry.rank)
            case 4:
                return "?" if entry.needs_alpha else number_text(entry.alpha)
            case 5:
                return ", ".join(entry.targets) or "–"
            case 6:
                return readable_bytes(entry.bytes)
            case 7:
                found = self.fits(entry)
                return "–" if found is None else f"{found.fits:,}"
            case 8:
                return entry.run or "–"
            case _:
                return short_path(entry.root or str(Path(entry.path).parent), self._home)

    def _tip_of(self, entry: AdapterEntry, column: int) -> str:
        if column == NAME and entry.problem:
            return f"{entry.path}\n{entry.problem}"
        if column in (NAME, WHERE):
            return entry.path
        if column == BASE:
            return entry.base
        if column == ALPHA and entry.needs_alpha:
            return "Nobody recorded alpha. Say it in the details before using the adapter."
        if column == TARGETS:
            return ", ".join(entry.targets)
        if column == KIND:
            return f"{entry.kind}, {adapter_format(entry)}"
        if column == SIZE:
            return f"{entry.bytes:,} bytes in {len(entry.files)} file{'s' if len(entry.files) != 1 else ''}"
        if column == FITS and (found := self.fits(entry)) is not None:
            models = "1 model" if found.models == 1 else f"{found.models:,} models"
            partly = f", {found.partly:,} more in part" if found.partly else ""
            return f"Fits {found.fits:,} of {models} wholly{partly}"
        return ""
