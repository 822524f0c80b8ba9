"""What GPTQ, AWQ and HQQ ask: how many bits, weights that share a scale, and the text that tells what matters."""

from __future__ import annotations

from pathlib import Path

import msgspec
from PySide6.QtCore import Qt, Slot
from PySide6.QtWidgets import QCheckBox, QFileDialog, QFormLayout, QWidget

from app.core.quantize_plan import BITS, CALIBRATED, GROUPS
from app.viewmodels.export import ExportDraft
from app.viewmodels.export_choices import bits_of, group_of
from app.views.option_fields import QuietCombo
from app.views.widgets import ElidedLabel, button, label, row

_OURS = "One of ours, 40 kB; one like what it will read loses less"


class CalibrationFields(QWidget):
    """Writes into the draft as things change."""

    def __init__(self, draft: ExportDraft, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._draft = draft
        self._method = ""
        self.bits, self.group = QuietCombo(), QuietCombo()
        self.bits.setAccessibleName("Bits of a weight")
        self.group.setAccessibleName("Weights that share a scale")
        self.order = QCheckBox("Columns in the order of their importance: less loss, slower to run")
        self.text = ElidedLabel(_OURS, Qt.TextElideMode.ElideMiddle)
        self.choose = button("Choose a text…", self._choose)
        self.choose.setAccessibleName("Choose a text to calibrate on")
        self.clear = button("Ours", self._clear, kind="link")
        self._texts = row(self.text, self.choose, self.clear)
        self._texts.setStretch(0, 1)
        self._form = QFormLayout(self)
        self._form.setContentsMargins(0, 0, 0, 0)
        self._form.setHorizontalSpacing(16)
        self._form.setVerticalSpacing(8)
        self._form.addRow(label("Size", tone="muted"), row(self.bits, self.group, 1))
        self._form.addRow(label("Text", tone="muted"), self._texts)
        self._form.addRow(self.order)
        self.bits.currentIndexChanged.connect(self._bits)
        self.group.currentIndexChanged.connect(self._group)
        self.order.toggled.connect(self._order)

    @Slot()
    def show_state(self) -> None:
        """Show what the draft holds."""
        draft, options = self._draft, self._draft.options
        if not draft.method:
            return
        if draft.method != self._method:
            self._method = draft.method
            self._fill(self.bits, [(f"{n} bits", n) for n in BITS[draft.method]])
            self._fill(self.group, [(f"Groups of {n}", n) for n in GROUPS[draft.method]])
        group = group_of(draft.format, options, draft.entry)
        for shown, value in ((self.bits, bits_of(draft.format, options, draft.entry)), (self.group, group)):
            shown.blockSignals(True)
            shown.setCurrentIndex(max(0, shown.findData(value)))
            shown.blockSignals(False)
        self.bits.setEnabled(self.bits.count() > 1)
        self._form.setRowVisible(self.order, draft.method == "gptq")
        self._form.setRowVisible(self._texts, draft.method in CALIBRATED)
        self.order.setChecked(options.desc_act)
        self.text.setText(Path(options.calibration).name if options.calibration else _OURS)
        self.clear.setVisible(bool(options.calibration))

    @staticmethod
    def _fill(combo: QuietCombo, items: list[tuple[str, int]]) -> None:
        combo.blockSignals(True)
        combo.clear()
        for text, value in items:
            combo.addItem(text, value)
        combo.blockSignals(False)

    def _set(self, **options: object) -> None:
        self._draft.set_options(msgspec.structs.replace(self._draft.options, **options))

    @Slot(int)
    def _bits(self, _index: int) -> None:
        self._set(bits=self.bits.currentData())

    @Slot(int)
    def _group(self, _index: int) -> None:
        self._set(group_size=self.group.currentData())

    @Slot(bool)
    def _order(self, on: bool) -> None:
        if on != self._draft.options.desc_act:
            self._set(desc_act=on)

    def _choose(self) -> None:
        chosen, _ = QFileDialog.getOpenFileName(self, "Text to calibrate on", "", "Texts (*.txt *.md);;All files (*)")
        if chosen:
            self._set(calibration=chosen)

    def _clear(self) -> None:
        self._set(calibration="")
