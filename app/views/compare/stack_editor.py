"""A popup in which a column's stack is put together: each adapter of the library with a switch and a weight."""

from __future__ import annotations

from pathlib import Path

from PySide6.QtCore import QPoint, Qt, Signal, Slot
from PySide6.QtWidgets import QCheckBox, QDoubleSpinBox, QFrame, QLineEdit, QScrollArea, QWidget

from app.core.library import AdapterEntry
from app.core.stack import AdapterStack, StackedAdapter
from app.views.widgets import button, column, cut_corners, label, row

WIDTH, HEIGHT = 400, 380
_SHOWN = 200  # adapters that are listed; the filter finds the others


class _Line(QWidget):
    """One adapter."""

    changed = Signal()

    def __init__(self, path: str, name: str, weight: float, on: bool, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.path, self.name = path, name
        self.switch = QCheckBox(name.replace("&", "&&"))
        self.switch.setToolTip(path)
        self.switch.setAccessibleName(f"Adapter {name}")
        self.switch.setChecked(on)
        self.weight = QDoubleSpinBox()
        self.weight.setRange(-100, 100)
        self.weight.setSingleStep(0.05)
        self.weight.setDecimals(3)  # as the command line's and the combining sheet's
        self.weight.setValue(weight)
        self.weight.setEnabled(on)
        self.weight.setAccessibleName(f"Weight of {name}")
        layout = row(self.switch, self.weight, margins=(0, 2, 0, 2), parent=self)
        layout.setStretch(0, 1)
        self.switch.toggled.connect(self.weight.setEnabled)
        self.switch.toggled.connect(self._changed)
        self.weight.valueChanged.connect(self._changed)

    @Slot()
    def _changed(self, *_: object) -> None:
        self.changed.emit()


class StackEditor(QFrame):
    """The popup.

    Signals:
        changed(AdapterStack): as it is now, after each change.
    """

    changed = Signal(object)

    def __init__(self, known: list[AdapterEntry], stack: AdapterStack, parent: QWidget | None = None) -> None:
        super().__init__(parent, Qt.WindowType.Popup)
        self.setObjectName("popup")
        self.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        self.setFixedSize(WIDTH, HEIGHT)
        self.setAccessibleName("Adapters of this column")
        self.field = QLineEdit()
        self.field.setPlaceholderText("Filter adapters")
        self.field.setAccessibleName("Filter adapters")
        self.field.textChanged.connect(self._filter)
        self.base = button("Base model", self._clear, kind="link", tip="No adapters")
        self.lines: list[_Line] = []
        inner = QWidget()
        self._list = column(parent=inner, spacing=0, margins=(0, 0, 8, 0))
        on = {adapter.path: adapter for adapter in stack.adapters}
        entries = {entry.path: entry.name for entry in known}
        names = {adapter.path: adapter.name or Path(adapter.path).name for adapter in stack.adapters}
        for path, name in {**names, **entries}.items():
            weight = on[path].weight if path in on else 1.0
            line = _Line(path, name, weight or 1.0, path in on and bool(weight))
            line.changed.connect(self._tell)
            self.lines.append(line)
            self._list.addWidget(line)
        self.empty = label("There is no adapter in the library yet. Drop one on the window.", tone="muted", wrap=True)
        self.empty.setVisible(not self.lines)
        self._list.addWidget(self.empty)
        self._list.addStretch(1)
        area = QScrollArea()
        area.setWidgetResizable(True)
        area.setFrameShape(QFrame.Shape.NoFrame)
        area.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        area.setWidget(inner)
        head = row(self.field, self.base)
        head.setStretch(0, 1)
        layout = column(parent=self, margins=(12, 12, 12, 12))
        layout.addLayout(head)
        layout.addWidget(area, 1)
        cut_corners(self)
        self._filter("")

    def open_below(self, anchor: QWidget) -> None:
        """Show it under a button, on the screen as far as it fits."""
        place = anchor.mapToGlobal(QPoint(0, anchor.height() + 4))
        screen = anchor.screen().availableGeometry()
        place.setX(max(screen.left(), min(place.x(), screen.right() - WIDTH)))
        place.setY(max(screen.top(), min(place.y(), screen.bottom() - HEIGHT)))
        self.move(place)
        self.show()
        self.field.setFocus()

    @property
    def stack(self) -> AdapterStack:
        """As it is now."""
        return AdapterStack(
            adapters=tuple(
                StackedAdapter(path=line.path, name=line.name, weight=line.weight.value())
                for line in self.lines
                if line.switch.isChecked()
            )
        )

    @Slot(str)
    def _filter(self, text: str) -> None:
        words = text.casefold().split()
        shown = 0
        for line in self.lines:
            fits = all(word in line.name.casefold() for word in words) and shown < _SHOWN
            line.setVisible(fits or line.switch.isChecked())
            shown += fits

    @Slot()
    def _tell(self) -> None:
        self.changed.emit(self.stack)

    def _clear(self) -> None:
        for line in self.lines:
            line.switch.setChecked(False)
        self.close()
