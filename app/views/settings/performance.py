"""Settings, Performance: what was measured on this machine, and measuring it again."""

from __future__ import annotations

from PySide6.QtCore import Slot
from PySide6.QtWidgets import QWidget

from app.viewmodels.settings import SettingsView
from app.views.widgets import button, column, label, row


class PerformanceSection(QWidget):
    """One sentence and one button. The next load measures whatever is missing."""

    def __init__(self, settings: SettingsView, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._settings = settings
        self.text = label("", wrap=True)
        self.again = button("Measure again", self._forget, icon_name="reload")
        self.again.setAccessibleName("Measure again how many threads are fastest")
        help = "A measurement on a busy machine can choose badly. Options of a model go before it."
        column(self.text, label(help, tone="muted", wrap=True), spacing=8, parent=self).addLayout(row(self.again, 1))
        settings.changed.connect(self._changed)
        self.show_now()

    @Slot()
    def show_now(self) -> None:
        found = self._settings.measured_threads()
        if found:
            threads = " or ".join(dict.fromkeys(f"{number} thread{'s' * (number != 1)}" for number in found))
            self.text.setText(
                f"Measured on this machine: models that the processor runs decode fastest with {threads}."
            )
        else:
            self.text.setText("How many threads are fastest here is measured when a GGUF model is next loaded.")
        self.again.setEnabled(bool(found))

    @Slot(str)
    def _changed(self, name: str) -> None:
        if name == "calibration":
            self.show_now()

    @Slot()
    def _forget(self) -> None:
        self._settings.measure_again()
