"""The adapter stack as chips under the loadout bar: a switch and a weight each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PySide6.QtCore import QPoint, QSize, Qt, Signal, Slot
from PySide6.QtGui import QMouseEvent
from PySide6.QtWidgets import QCheckBox, QDoubleSpinBox, QFileDialog, QFrame, QMenu, QScrollArea, QSlider, QWidget

from app.viewmodels.adapter_stack import StackEntry, StackModel
from app.views.elided import ElidedCheckBox
from app.views.widgets import button, icon_button, row, spaced

_STEPS = 100  # of the slider for a weight of 1
_MOST = 100.0  # what may be typed
_WIDEST = 240  # pixels of a name


class WeightSlider(QSlider):
    """0 to 2; a double click is 1."""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(Qt.Orientation.Horizontal, parent)
        self.setRange(0, 2 * _STEPS)
        self.setPageStep(_STEPS // 10)
        self.setFixedWidth(96)

    def mouseDoubleClickEvent(self, event: QMouseEvent) -> None:
        self.setValue(_STEPS)
        event.accept()


class AdapterChip(QFrame):
    """One adapter.

    Signals:
        weighed(path, weight), switched(path, on), removed(path).
    """

    weighed = Signal(str, float)
    switched = Signal(str, bool)
    removed = Signal(str)

    def __init__(self, entry: StackEntry, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.path = entry.path
        self.setObjectName("adapter")
        self.switch = ElidedCheckBox(entry.name, most=_WIDEST)
        self.switch.setChecked(entry.on)
        self.switch.setAccessibleName(f"Adapter {entry.name}")
        self.switch.setToolTip(f"{entry.name}\n{entry.path}\nSwitch this adapter on or off")
        self.slider = WeightSlider()
        self.slider.setAccessibleName(f"Weight of {entry.name}")
        self.slider.setToolTip("Weight, 0 to 2; double-click for 1. Type other values beside it.")
        self.number = spaced(QDoubleSpinBox())
        self.number.setRange(-_MOST, _MOST)
        self.number.setSingleStep(0.05)
        self.number.setDecimals(2)
        self.number.setValue(entry.weight)
        self.number.setMaximumWidth(92)  # of "-100.00"; the style would take half as much again
        self.number.setAccessibleName(f"Weight of {entry.name}, typed")
        self.slider.setValue(round(entry.weight * _STEPS))
        self.close_button = icon_button("close", f"Take {entry.name} out of the stack", self._remove)
        self.close_button.setIconSize(QSize(16, 16))
        row(self.switch, self.slider, self.number, self.close_button, margins=(8, 2, 4, 2), spacing=8, parent=self)
        self.switch.toggled.connect(self._switch)
        # While it is dragged only the number follows: where a weight costs a merged copy, each step on the way would make one.
        self.slider.setTracking(False)
        self.slider.sliderMoved.connect(self._moving)
        self.slider.valueChanged.connect(self._slid)
        self.number.valueChanged.connect(self._typed)

    @Slot(bool)
    def _switch(self, on: bool) -> None:
        self.switched.emit(self.path, on)

    @Slot(int)
    def _moving(self, value: int) -> None:
        self.number.blockSignals(True)
        self.number.setValue(value / _STEPS)
        self.number.blockSignals(False)

    @Slot(int)
    def _slid(self, value: int) -> None:
        self._moving(value)
        self.weighed.emit(self.path, value / _STEPS)

    @Slot(float)
    def _typed(self, value: float) -> None:
        self.slider.blockSignals(True)  # a typed -3 must not come back as the slider's 0
        self.slider.setValue(round(value * _STEPS))
        self.slider.blockSignals(False)
        self.weighed.emit(self.path, value)

    def _remove(self) -> None:
        self.removed.emit(self.path)


class StackBar(QWidget):
    """The chips in a row, and the button that adds one.

    Args:
        fill_menu: adds more to that button's menu: saved stacks.
    """

    def __init__(
        self,
        model: StackModel,
        parent: QWidget | None = None,
        *,
        fill_menu: Callable[[QMenu, QWidget], object] | None = None,
    ) -> None:
        super().__init__(parent)
        self._model = model
        self._fill_menu = fill_menu
        self.chips: list[AdapterChip] = []
        self._inner = QWidget()
        self._row = row(margins=(0, 0, 0, 0), spacing=8, parent=self._inner)
        self._row.addStretch(1)
        area = QScrollArea()
        area.setWidgetResizable(True)
        area.setFrameShape(QFrame.Shape.NoFrame)
        area.setVerticalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        area.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAsNeeded)
        area.setWidget(self._inner)
        area.setFixedHeight(44)
        self.add_button = button("Add adapter", self.open_menu, kind="link", tip="Add a LoRA adapter to the stack")
        self.bake = QCheckBox("Bake in")
        self.bake.setToolTip(
            "Write the adapters into the loaded weights: the model's own speed, for more memory.\n"
            "Switched off, the base is back exactly."
        )
        self.bake.toggled.connect(model.set_baked)
        outer = row(area, self.bake, self.add_button, margins=(16, 2, 8, 2), spacing=8, parent=self)
        outer.setStretch(0, 1)
        model.changed.connect(self.rebuild)
        self.rebuild()

    @Slot()
    def rebuild(self) -> None:
        """Show the stack as it is."""
        for chip in self.chips:
            self._row.removeWidget(chip)
            chip.hide()
            chip.deleteLater()
        self.chips = []
        for place, entry in enumerate(self._model.entries):
            chip = AdapterChip(entry)
            chip.weighed.connect(self._model.set_weight)
            chip.switched.connect(self._model.set_on)
            chip.removed.connect(self._model.remove, Qt.ConnectionType.QueuedConnection)  # it deletes the chip
            self._row.insertWidget(place, chip)
            self.chips.append(chip)
        self.bake.setVisible(self._model.bakes and bool(self.chips))
        self.bake.blockSignals(True)
        self.bake.setChecked(self._model.baked)
        self.bake.blockSignals(False)
        self.setVisible(self._model.shown)

    def open_menu(self) -> QMenu:
        """Adapters of the library, and a file of one's own."""
        menu = QMenu(self)
        menu.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        menu.setToolTipsVisible(True)
        for entry in self._model.known()[:200]:
            added = menu.addAction(f"{entry.name}  ({entry.kind})".replace("&", "&&"))
            added.setToolTip(entry.path)
            added.triggered.connect(lambda _=False, entry=entry: self._model.add(Path(entry.path), entry.name))
        menu.addSeparator()
        menu.addAction("Choose a folder …", self._choose_folder)
        menu.addAction("Choose a file …", self._choose_file)
        if self._fill_menu is not None:
            menu.addSeparator()
            self._fill_menu(menu, self)
        menu.popup(self.add_button.mapToGlobal(QPoint(0, self.add_button.height())))
        return menu

    def _choose_folder(self) -> None:
        folder = QFileDialog.getExistingDirectory(self, "Choose an adapter's folder")
        if folder:
            self._model.add(Path(folder))

    def _choose_file(self) -> None:
        file, _ = QFileDialog.getOpenFileName(
            self, "Choose an adapter", "", "Adapters (*.safetensors *.gguf *.bin *.pt)"
        )
        if file:
            self._model.add(Path(file))
