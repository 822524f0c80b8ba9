"""A popup in which a column's stack is put together: each adapter of the library with a switch and a weight."""

from __future__ import annotations

from pathlib import Path

from PySide6.QtCore import QPoint, Qt, Signal, Slot
from PySide6.QtWidgets import QDoubleSpinBox, QFrame, QLineEdit, QScrollArea, QWidget

from app.core.library import AdapterEntry
from app.core.stack import AdapterStack, StackedAdapter
from app.views.elided import ElidedCheckBox
from app.views.widgets import button, column, cut_corners, label, row, spaced

WIDTH, HEIGHT = 400, 380
_SHOWN = 80  # adapters that are listed; the filter finds the others


class _Line(QWidget):
    """One adapter."""

    changed = Signal()

    def __init__(self, path: str, name: str, weight: float, on: bool, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.path, self.name = path, name
        self.switch = ElidedCheckBox(name, fills=True)
        self.switch.setToolTip(f"{name}\n{path}")
        self.switch.setAccessibleName(f"Adapter {name}")
        self.switch.setChecked(on)
        self.weight = spaced(QDoubleSpinBox())
        self.weight.setRange(-100, 100)
        self.weight.setSingleStep(0.05)
        self.weight.setDecimals(2 if round(weight, 2) == weight else 4)  # what is shown is what will be on
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
        self._on = on
        self._known = {**names, **entries}
        self._made: dict[str, _Line] = {}
        self.empty = label("There is no adapter in the library yet. Drop one on the window.", tone="muted", wrap=True)
        self.empty.setVisible(not self._known)
        self._list.addWidget(self.empty)
        self._list.addStretch(1)
        area = QScrollArea()
        area.setWidgetResizable(True)
        area.setFrameShape(QFrame.Shape.NoFrame)
        area.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        area.setWidget(inner)
        inner.setAutoFillBackground(False)
        area.viewport().setAutoFillBackground(False)
        head = row(self.field, self.base)
        head.setStretch(0, 1)
        layout = column(parent=self, margins=(12, 12, 12, 12))
        layout.addLayout(head)
        layout.addWidget(area, 1)
        cut_corners(self)
        self._filter("")

    def _line(self, path: str) -> _Line:
        """Lines are made as they are wanted: a library may have ten thousand adapters."""
        weight = self._on[path].weight if path in self._on else 1.0
        line = _Line(path, self._known[path], weight or 1.0, path in self._on and bool(weight))
        line.changed.connect(self._tell)
        self.lines.append(line)
        self._made[path] = line
        return line

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
        fitting = [path for path, name in self._known.items() if all(word in name.casefold() for word in words)]
        listed = set(fitting[:_SHOWN])
        shown = {*listed, *self._on, *(line.path for line in self.lines if line.switch.isChecked())}
        for path in [path for path in self._known if path in shown and path not in self._made]:
            self._list.insertWidget(len(self._made), self._line(path))
        for line in self.lines:
            line.setVisible(line.path in listed or line.switch.isChecked())

    @Slot()
    def _tell(self) -> None:
        self.changed.emit(self.stack)

    def _clear(self) -> None:
        for line in self.lines:
            line.switch.setChecked(False)
        self.close()
