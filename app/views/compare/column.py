"""One column: its stack, its answer as it streams, what it took, and the verdict."""

from __future__ import annotations

from collections.abc import Sequence

from PySide6.QtCore import Signal, Slot
from PySide6.QtGui import QGuiApplication, QTextCharFormat, QTextCursor
from PySide6.QtWidgets import QFrame, QPlainTextEdit, QTextEdit, QWidget

from app.viewmodels.compare import Column
from app.views.elided import ElidedLink
from app.views.theme import set_property, theme
from app.views.widgets import ElidedLabel, button, column, icon_button, row

_MARKS = 2_000  # highlighted places at most


class CompareColumn(QFrame):
    """One column.

    Signals:
        stack_wanted: its stack is to be changed. closed: it is to go. preferred: this answer is the better one.
    """

    stack_wanted = Signal()
    closed = Signal()
    preferred = Signal()

    def __init__(self, place: int, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setObjectName("card")
        self.setMinimumWidth(200)
        self.place = place
        self.stack = ElidedLink()
        self.stack.setAutoDefault(False)
        self.stack.clicked.connect(self.stack_wanted)
        self.stack.setAccessibleName(f"Adapters of column {place + 1}")
        self.close_button = icon_button("close", f"Take column {place + 1} away", self.closed.emit)
        self.text = QPlainTextEdit()
        self.text.setObjectName("answer")
        self.text.setReadOnly(True)
        self.text.setPlaceholderText("Choose adapters above, then ask all columns below.")
        self.text.setUndoRedoEnabled(False)
        self.text.setFrameShape(QFrame.Shape.NoFrame)
        self.text.setAccessibleName(f"Answer of column {place + 1}")
        self.text.setTabChangesFocus(True)
        self.text.document().setDocumentMargin(8)
        self.facts = ElidedLabel()
        self.facts.setProperty("tone", "muted")
        self.copy = icon_button("copy", "Copy this answer", self._copy)
        self.better = button("This one is better", self.preferred.emit, tip="Keep it as an example for training")
        head = row(self.stack, 1, self.close_button, margins=(8, 4, 4, 4))
        facts = row(self.facts, margins=(12, 4, 8, 0))
        foot = row(self.better, 1, self.copy, margins=(8, 4, 8, 8))
        layout = column(parent=self, spacing=0, margins=(2, 2, 2, 2))
        layout.addLayout(head)
        layout.addWidget(self.text, 1)
        layout.addLayout(facts)
        layout.addLayout(foot)

    def show_column(self, shown: Column, *, closable: bool, running: bool, can_prefer: bool) -> None:
        """Show everything but the text."""
        self.stack.set_full(shown.title)
        self.stack.setToolTip(f"{shown.title}\nChoose this column's adapters")
        self.stack.setEnabled(not running)
        self.close_button.setVisible(closable)
        self.close_button.setEnabled(not running)
        self.facts.setText(_facts(shown, running))
        self.copy.setEnabled(bool(shown.text))
        self.better.setVisible(bool(shown.text) and not running)
        self.better.setEnabled(can_prefer)
        self.better.setText("Better" if shown.chosen else "This one is better")
        set_property(self, "chosen", shown.chosen)

    def set_text(self, text: str) -> None:
        """Replace the whole answer."""
        self.text.setPlainText(text)

    def append(self, text: str) -> None:
        """Add to the answer; the view follows unless somebody has scrolled up."""
        bar = self.text.verticalScrollBar()
        follows = bar.value() >= bar.maximum() - 4
        cursor = QTextCursor(self.text.document())
        cursor.movePosition(QTextCursor.MoveOperation.End)
        cursor.insertText(text)
        if follows:
            bar.setValue(bar.maximum())

    def mark(self, places: Sequence[tuple[int, int]]) -> None:
        """Highlight ranges of the answer."""
        style = QTextCharFormat()
        style.setBackground(theme().color("selection"))
        style.setForeground(theme().color("on_selection"))
        marks: list[QTextEdit.ExtraSelection] = []
        plain = self.text.toPlainText() if places else ""
        for first, end in places[:_MARKS]:
            cursor = QTextCursor(self.text.document())
            # Qt counts UTF-16 units; characters beyond the first plane take two.
            cursor.setPosition(_units(plain, first))
            cursor.setPosition(_units(plain, end), QTextCursor.MoveMode.KeepAnchor)
            mark = QTextEdit.ExtraSelection()
            mark.cursor, mark.format = cursor, style  # type: ignore[attr-defined]
            marks.append(mark)
        self.text.setExtraSelections(marks)

    @Slot()
    def _copy(self) -> None:
        QGuiApplication.clipboard().setText(self.text.toPlainText())


def _units(text: str, place: int) -> int:
    return len(text[:place].encode("utf-16-le")) // 2


def _facts(shown: Column, running: bool) -> str:
    now = shown.statistics
    if now is None:
        return f"{shown.tokens} tokens" if shown.tokens else "Waiting" if running else ""
    speed = f" · {now.tokens / now.seconds:.1f} tokens/s" if now.seconds > 0 else ""
    ends = {"stop": "", "length": " · cut at the limit", "cancelled": " · stopped"}[now.finish_reason]
    return f"{now.tokens} tokens{speed}{ends}"
