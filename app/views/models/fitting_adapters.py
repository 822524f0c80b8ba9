"""The adapters of the library that fit a model, in its details."""

from __future__ import annotations

from collections.abc import Callable

from PySide6.QtCore import Qt, Signal, Slot
from PySide6.QtWidgets import QWidget

from app.core.library import AdapterEntry, ModelEntry
from app.viewmodels.background import Background
from app.views.widgets import Chip, ElidedLabel, Fold, button, column, label, row

SHOWN = 40  # of those that fit
Found = list[tuple[AdapterEntry, int, int]]


class FittingAdapters(Fold):
    """Asks when it is open.

    Args:
        read: those of the library that fit a model, as (adapter, modules matched, modules), the best first; reads files.

    Signals:
        adapter_wanted(AdapterEntry): show this one.
    """

    adapter_wanted = Signal(object)

    def __init__(self, read: Callable[[ModelEntry], Found] | None, parent: QWidget | None = None) -> None:
        listed = QWidget()
        super().__init__("Adapters that fit", listed, parent=parent)
        self._rows = column(spacing=0, parent=listed)
        self._read = read
        self._entry: ModelEntry | None = None
        self._listed = ""  # id of the model whose adapters are
        self._background = Background(self)
        self._background.done.connect(self._found)
        self.setVisible(read is not None)
        self.toggled.connect(self._look)

    def show_entry(self, entry: ModelEntry, *, other: bool) -> None:
        """Show those of this model. other: it is another one than before."""
        self._entry = entry
        if other:
            self._listed = ""
        self._look(self.header.isChecked())

    def close_reading(self) -> None:
        """End the reading thread."""
        self._background.close()

    @Slot(bool)
    def _look(self, opened: bool) -> None:
        entry, read = self._entry, self._read
        if not opened or entry is None or read is None or self._listed == entry.id:
            return
        self._listed = entry.id
        self._list("Looking…", [])
        self._background.skip_waiting()
        self._background.run(entry.id, lambda: read(entry))

    @Slot(object, object, object)
    def _found(self, key: object, result: object, error: object) -> None:
        if self._entry is not None and key == self._entry.id:
            found: Found = result if isinstance(result, list) else []
            self._list(str(error) if error is not None else "No adapter of the library fits.", found)

    def _list(self, otherwise: str, found: Found) -> None:
        while (item := self._rows.takeAt(0)) is not None:
            if (old := item.widget()) is not None:
                old.hide()
                old.deleteLater()
        for adapter, matched, total in found[:SHOWN]:
            self._rows.addWidget(self._row(adapter, matched, total))
        rest = len(found) - SHOWN
        if rest > 0 or not found:
            self._rows.addWidget(label(f"… and {rest:,} more" if found else otherwise, tone="muted", wrap=True))

    def _row(self, adapter: AdapterEntry, matched: int, total: int) -> QWidget:
        holder = QWidget()
        name = ElidedLabel(adapter.name, mode=Qt.TextElideMode.ElideMiddle)
        chip = Chip(f"{matched:,} of {total:,}", "positive" if matched == total else "warning")
        chip.setToolTip(f"{matched:,} of its {total:,} modules match")
        show = button("Show", lambda: self.adapter_wanted.emit(adapter), kind="link")
        show.setAccessibleName(f"Show {adapter.name} on the LoRAs page")
        row(name, chip, show, parent=holder).setStretch(0, 1)
        return holder
