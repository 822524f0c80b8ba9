"""Settings, New chats begin with: a sampling preset and a system prompt."""

from __future__ import annotations

from PySide6.QtCore import QTimer, Slot
from PySide6.QtGui import QHideEvent, QShowEvent
from PySide6.QtWidgets import QPlainTextEdit, QWidget

from app.viewmodels.chat_presets import BUILT_IN, presets_in
from app.viewmodels.settings import SettingsView
from app.views.option_fields import QuietCombo
from app.views.widgets import column, label, row

SAVE_MS = 400  # after the last key
_STANDARD = next(iter(BUILT_IN))  # what "" in the settings means


class NewChatsSection(QWidget):
    """Two fields. Chats that have begun keep what they have."""

    def __init__(self, settings: SettingsView, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._settings = settings
        self.preset = QuietCombo()
        self.preset.setAccessibleName("Sampling preset of new chats")
        self.preset.setFixedWidth(240)
        self.preset.activated.connect(self._chosen)
        self.system = QPlainTextEdit(settings.now.system_prompt)
        self.system.setAccessibleName("System prompt of new chats")
        self.system.setPlaceholderText(
            "What the model is told before each conversation, for example who it is and how it shall answer."
        )
        self.system.setTabChangesFocus(True)
        self.system.setFixedHeight(96)
        self.system.textChanged.connect(self._typed)
        self._timer = QTimer(self)
        self._timer.setSingleShot(True)
        self._timer.setInterval(SAVE_MS)
        self._timer.timeout.connect(self.flush)
        caption = label("Sampling preset")
        caption.setBuddy(self.preset)
        caption.setMinimumWidth(160)
        above = label("System prompt")
        above.setBuddy(self.system)
        lines = column(spacing=8, parent=self)
        lines.addLayout(row(caption, self.preset, 1, spacing=16))
        lines.addWidget(above)
        lines.addWidget(self.system)
        help = (
            f"“{_STANDARD}” leaves what a model's maker recommends as it is. "
            "Presets of your own are made in a chat's panel. Chats that have begun keep theirs."
        )
        lines.addWidget(label(help, tone="muted", wrap=True))
        self._fill()

    def _fill(self) -> None:
        """The presets there are now; the chosen one stays shown even when somebody has deleted it."""
        chosen = self._settings.now.sampling or _STANDARD
        names = list(presets_in(self._settings.now))
        self.preset.clear()
        for name in names:
            self.preset.addItem(name, name)
        if chosen not in names:
            self.preset.addItem(f"{chosen} (deleted: as {_STANDARD})", chosen)
        self.preset.setCurrentIndex(self.preset.findData(chosen))

    @Slot(int)
    def _chosen(self, index: int) -> None:
        name = str(self.preset.itemData(index))
        if not self._settings.set("sampling", "" if name == _STANDARD else name):
            self._fill()

    @Slot()
    def _typed(self) -> None:
        self._timer.start()

    @Slot()
    def flush(self) -> None:
        """Save what is typed. What cannot be saved stays in the field."""
        self._timer.stop()
        self._settings.set("system_prompt", self.system.toPlainText())

    def showEvent(self, event: QShowEvent) -> None:
        super().showEvent(event)
        self._fill()
        if not self._timer.isActive() and self.system.toPlainText() != self._settings.now.system_prompt:
            self.system.blockSignals(True)
            self.system.setPlainText(self._settings.now.system_prompt)
            self.system.blockSignals(False)

    def hideEvent(self, event: QHideEvent) -> None:
        super().hideEvent(event)
        if self._timer.isActive():  # another page, or the window goes
            self.flush()
