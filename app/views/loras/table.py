"""The table of adapters; several can be selected, to combine them."""

from __future__ import annotations

from PySide6.QtWidgets import QAbstractItemView, QWidget

from app.viewmodels import adapter_table
from app.views.library.table import EntryCell, LibraryView

_WIDTHS = {1: 144, 2: 96, 3: 64, 4: 64, 5: 152, 6: 80, 7: 64, 8: 96, 9: 128}
_GIVES_WAY = (
    adapter_table.WHERE,
    adapter_table.RUN,
    adapter_table.TARGETS,
    adapter_table.ALPHA,
    adapter_table.SIZE,
    adapter_table.BASE,
)


class AdapterCell(EntryCell):
    """A dot stands before what is in the stack."""

    muted = frozenset({adapter_table.WHERE, adapter_table.RUN, adapter_table.BASE, adapter_table.TARGETS})
    middle = frozenset({adapter_table.NAME, adapter_table.BASE, adapter_table.WHERE})


class AdapterView(LibraryView):
    """Enter uses."""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__("Adapters", AdapterCell(), _WIDTHS, _GIVES_WAY, parent)
        self.setSelectionMode(QAbstractItemView.SelectionMode.ExtendedSelection)
