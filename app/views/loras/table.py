"""The table of adapters: as that of models, with its own columns; several can be selected, to combine them."""

from __future__ import annotations

from PySide6.QtWidgets import QAbstractItemView, QWidget

from app.viewmodels import adapter_table
from app.views.models.table import ModelView, RowDelegate


class AdapterDelegate(RowDelegate):
    """A dot stands before what is in the stack."""

    muted = (adapter_table.WHERE, adapter_table.RUN, adapter_table.BASE, adapter_table.TARGETS)
    middle = (adapter_table.NAME, adapter_table.BASE, adapter_table.WHERE)
    fits = -1


class AdapterView(ModelView):
    """Enter uses, F2 renames, Delete moves to the trash: the page connects these."""

    widths = {1: 144, 2: 96, 3: 64, 4: 64, 5: 152, 6: 80, 7: 64, 8: 96, 9: 128}
    gives_way = (
        adapter_table.WHERE,
        adapter_table.RUN,
        adapter_table.TARGETS,
        adapter_table.ALPHA,
        adapter_table.SIZE,
        adapter_table.BASE,
    )

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setAccessibleName("Adapters")
        self.setItemDelegate(AdapterDelegate(self))
        self.setSelectionMode(QAbstractItemView.SelectionMode.ExtendedSelection)
