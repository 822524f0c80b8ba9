"""The table of models."""

from __future__ import annotations

from PySide6.QtWidgets import QWidget

from app.viewmodels import model_table
from app.views.library.table import EntryCell, LibraryView

# Wished widths; the name takes the rest. Columns go in the order of _GIVES_WAY until the name has its minimum.
_WIDTHS = {1: 136, 2: 104, 3: 88, 4: 72, 5: 72, 6: 88, 7: 144, 8: 104}
_GIVES_WAY = (
    model_table.WHERE,
    model_table.ARCHITECTURE,
    model_table.LAST_USED,
    model_table.CONTEXT,
    model_table.PARAMETERS,
    model_table.FORMAT,
)


class ModelCell(EntryCell):
    """A dot stands before what is loaded."""

    muted = frozenset({model_table.WHERE, model_table.LAST_USED, model_table.ARCHITECTURE})
    middle = frozenset({model_table.NAME, model_table.WHERE})
    fits = model_table.FITS


class ModelView(LibraryView):
    """Enter loads."""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__("Models", ModelCell(), _WIDTHS, _GIVES_WAY, parent)
