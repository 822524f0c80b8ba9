"""The panel of details at the right of a page of the library: name, path, chips, and below them whatever a page has to say."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from PySide6.QtCore import Qt, Signal
from PySide6.QtGui import QGuiApplication
from PySide6.QtWidgets import QFormLayout, QFrame, QLayout, QMenu, QScrollArea, QWidget

from app.core.library import AdapterEntry, ModelEntry
from app.views.widgets import Banner, Chip, ElidedLabel, breakable, column, icon_button, label, row, title

Entry = TypeVar("Entry", ModelEntry, AdapterEntry)


class DetailsPanel(QFrame, Generic[Entry]):
    """What is known of one entry, one part below the other.

    Args:
        make_menu: what can be done with the entry. width: the least that it takes, in pixels.

    Attributes:
        entry: that is shown, or None.

    Signals:
        closed: hide the panel.
    """

    closed = Signal()

    def __init__(self, make_menu: Callable[[Entry, QWidget], QMenu], width: int, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setObjectName("panel")
        self.setMinimumWidth(width)
        self.entry: Entry | None = None
        self._make_menu = make_menu
        self._title = title("")
        self._title.setWordWrap(True)
        self._path = ElidedLabel(mode=Qt.TextElideMode.ElideMiddle)
        self._path.setProperty("tone", "muted")
        self._chips = [Chip() for _ in range(3)]
        self._problem = Banner("negative")
        self._inside = QWidget()
        self._inside.setMinimumWidth(1)  # one long word may be cut, not all that stands at the right
        self._body = column(spacing=12, margins=(16, 16, 16, 16), parent=self._inside)
        self._add(self._top(), row(self._path, icon_button("copy", "Copy path", self._copy_path), spacing=4))
        self._add(row(*self._chips, 1, spacing=4), self._problem)
        self._scroll = QScrollArea()
        self._scroll.setWidgetResizable(True)
        self._scroll.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self._scroll.setWidget(self._inside)
        self._scroll.setFocusPolicy(Qt.FocusPolicy.NoFocus)
        column(self._scroll, spacing=0, parent=self)

    def _top(self) -> QLayout:
        self.more = icon_button("more", "More actions", self._open_menu)
        close = icon_button("close", "Hide details", self.closed.emit, shortcut="Ctrl+B")
        top = row(self._title, self.more, close, spacing=4)
        top.setStretch(0, 1)
        top.setAlignment(self.more, Qt.AlignmentFlag.AlignTop)
        top.setAlignment(close, Qt.AlignmentFlag.AlignTop)
        return top

    def _add(self, *parts: QWidget | QLayout) -> None:
        """Below what there is."""
        for part in parts:
            if isinstance(part, QWidget):
                self._body.addWidget(part)
            else:
                self._body.addLayout(part)

    @abstractmethod
    def show_entry(self, entry: Entry | None) -> None:
        """Show an entry; None: nothing."""

    def _show_head(self, entry: Entry | None) -> bool:
        """Show the name, the path and what is wrong. Returns whether it is another entry than the one before."""
        before, self.entry = self.entry, entry
        self._inside.setVisible(entry is not None)
        if entry is None:
            return False
        self._title.setText(breakable(entry.name))
        self._title.setAccessibleName(entry.name)
        self._path.setText(entry.path)
        self._problem.setVisible(bool(entry.problem))
        self._problem.text.setText(entry.problem)
        other = before is None or before.id != entry.id
        if other:
            self._scroll.verticalScrollBar().setValue(0)
        return other

    def _copy_path(self) -> None:
        if self.entry is not None:
            QGuiApplication.clipboard().setText(self.entry.path)

    def _open_menu(self) -> None:
        if self.entry is not None:
            self._make_menu(self.entry, self).popup(self.more.mapToGlobal(self.more.rect().bottomLeft()))


class FactsForm(QWidget):
    """Names at the left, values at the right."""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._form = QFormLayout(self)
        self._form.setContentsMargins(4, 0, 0, 0)
        self._form.setHorizontalSpacing(16)
        self._form.setVerticalSpacing(4)
        self._form.setFieldGrowthPolicy(QFormLayout.FieldGrowthPolicy.AllNonFixedFieldsGrow)

    def show_lines(self, lines: Iterable[tuple[str, str]]) -> None:
        """Show these instead of what there was; what has no value is left out."""
        while self._form.rowCount():
            self._form.removeRow(0)
        for name, value in lines:
            if value:
                self._form.addRow(label(name, tone="muted"), label(value, wrap=True, selectable=True))
