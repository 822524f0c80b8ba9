"""What stands in a chat that has no message yet."""

from __future__ import annotations

from PySide6.QtCore import Qt, Signal
from PySide6.QtWidgets import QGridLayout, QPushButton, QWidget

from app.views.widgets import IconLabel, button, column, label, row, title

STARTER_QUESTIONS = (
    "What is Weft?",
    "How do I download a model?",
    "How do I add a LoRA?",
    "How do I change the temperature?",
)


class Welcome(QWidget):
    """A sentence, and questions to begin with where the model has answers to them.

    Signals:
        asked: a question to send.
    """

    asked = Signal(str)

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._head = title("", 2)
        self._sentence = label("", tone="muted", wrap=True)
        self._sentence.setAlignment(Qt.AlignmentFlag.AlignHCenter)
        self._sentence.setMaximumWidth(440)
        self._questions = QWidget()
        grid = QGridLayout(self._questions)
        grid.setContentsMargins(0, 8, 0, 0)
        grid.setSpacing(8)
        self.buttons: list[QPushButton] = []
        for index, question in enumerate(STARTER_QUESTIONS):
            made = button(question)
            made.setMinimumWidth(220)
            made.setMinimumHeight(40)
            made.setProperty("question", question)
            made.clicked.connect(self._clicked)
            self.buttons.append(made)
            grid.addWidget(made, index // 2, index % 2)
        layout = column(parent=self, spacing=12, margins=(16, 16, 16, 16))
        layout.addStretch(3)
        for widget in (IconLabel("chat", 40, "control"), self._head):
            layout.addWidget(widget, 0, Qt.AlignmentFlag.AlignHCenter)
        # In a row of its own: an alignment flag would take the label's height for another width.
        line = row(1, self._sentence, 1)
        line.setStretch(1, 100)
        layout.addLayout(line)
        layout.addWidget(self._questions, 0, Qt.AlignmentFlag.AlignHCenter)
        layout.addStretch(4)

    def _clicked(self) -> None:
        sender = self.sender()
        assert sender is not None
        self.asked.emit(str(sender.property("question")))

    def set_model(self, name: str, *, starter: bool, can_ask: bool) -> None:
        """What can be asked depends on the model; "" for none."""
        if starter:
            self._head.setText("Ask the starter model")
            self._sentence.setText(
                "It is tiny and only knows Weft itself.\nDownload a larger model to talk about anything."
            )
        elif name:
            self._head.setText("A new chat")
            self._sentence.setText(f"Write to {name} below.\nWhat you write stays on this computer.")
        else:
            self._head.setText("A new chat")
            self._sentence.setText("Choose a model above, then write below.\nWhat you write stays on this computer.")
        self._questions.setVisible(starter)
        for made in self.buttons:
            made.setEnabled(can_ask)
