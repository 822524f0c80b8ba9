"""What the model will see: examples with trained tokens coloured and masked ones grey, and what became of the rows."""

from __future__ import annotations

from PySide6.QtCore import Qt, Slot
from PySide6.QtGui import QFont, QTextCharFormat, QTextCursor
from PySide6.QtWidgets import QFrame, QPlainTextEdit, QTableWidget, QTableWidgetItem, QTabWidget, QWidget

from app.training.data_config import BadRow, DataReport, PreviewExample
from app.viewmodels.train_draft import TrainDraft
from app.views.theme import theme
from app.views.widgets import Banner, EmptyState, column, icon_button, label, row, title

_LONGEST_NOTES = 6


class PreviewPane(QFrame):
    """The right half of a run's set-up."""

    def __init__(self, draft: TrainDraft, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setObjectName("panel")
        self._draft = draft
        self._shown: tuple[PreviewExample, ...] | None = None
        self.summary = label(wrap=True, tone="muted")
        self.again = icon_button("reload", "Read the data again", draft.preview_again)
        self.text = QPlainTextEdit()
        self.text.setReadOnly(True)
        self.text.setUndoRedoEnabled(False)
        self.text.document().setDocumentMargin(8)
        self.text.setAccessibleName("Examples as the model sees them")
        self.text.setAccessibleDescription("Trained tokens are coloured, masked ones grey")
        self.text.setTabChangesFocus(True)
        self.bad = QTableWidget(0, 3)
        self.bad.setHorizontalHeaderLabels(["File", "Line", "Why it is left out"])
        self.bad.setAccessibleName("Rows that are left out")
        self.bad.verticalHeader().hide()
        self.bad.setEditTriggers(QTableWidget.EditTrigger.NoEditTriggers)
        self.bad.horizontalHeader().setStretchLastSection(True)
        self.tabs = QTabWidget()
        self.tabs.addTab(self.text, "Examples")
        self.tabs.addTab(self.bad, "Left out")
        self.note = Banner("negative", slim=True)
        self.empty = EmptyState(
            "train",
            "See what is trained",
            "Choose a model and drop your examples: JSON, JSONL, CSV, Parquet or text. They are shown here as the model will see them.",
        )
        self.empty.sentence.setFixedWidth(260)
        head = row(title("What the model sees", 0), 1, self.again, margins=(16, 8, 8, 0))
        self._body = QWidget()
        column(self.summary, self._key(), self.tabs, spacing=8, margins=(16, 0, 16, 12), parent=self._body)
        layout = column(parent=self, spacing=4)
        layout.addLayout(head)
        layout.addWidget(self.note)
        layout.addWidget(self._body, 1)
        layout.addWidget(self.empty, 1)
        draft.previewed.connect(self.show_preview)
        theme().changed.connect(self._recolour)
        self.show_preview()

    @Slot()
    def _recolour(self) -> None:
        self._shown = None
        self.show_preview()

    def _key(self) -> QWidget:
        key = QWidget()
        trained = label("trained")
        trained.setProperty("chip", "positive")
        masked = label("read, not trained", tone="muted")
        row(trained, masked, 1, spacing=12, parent=key)
        return key

    @Slot()
    def show_preview(self) -> None:
        """Show the draft's preview as it is now."""
        draft = self._draft
        asked = draft.model is not None and bool(draft.files)
        self.empty.setVisible(not asked)
        self._body.setVisible(asked)
        self.again.setVisible(asked)
        error = draft.preview_error
        self.note.setVisible(asked and error is not None)
        self.note.text.setText(str(error) if error is not None else "")
        if not asked:
            return
        if draft.previewing:
            self.summary.setText("Reading the data…")
            return
        if draft.result is None:
            self.summary.setText("")
            self.text.clear()
            self._shown = None
            self.bad.setRowCount(0)
            return
        self.summary.setText(summary(draft.result.report))
        self._show_examples(draft.result.examples)
        self._show_bad(draft.result.report.bad_rows, draft.result.report.bad)

    def _show_examples(self, examples: tuple[PreviewExample, ...]) -> None:
        if examples == self._shown:
            return  # the rest of the rows has been read meanwhile: whoever reads the first ones goes on
        self._shown = examples
        look = theme()
        heading, trained, masked = QTextCharFormat(), QTextCharFormat(), QTextCharFormat()
        heading.setForeground(look.color("link"))
        heading.setFontWeight(QFont.Weight.DemiBold)
        trained.setForeground(look.color("positive"))
        masked.setForeground(look.color("muted"))
        self.text.clear()
        cursor = QTextCursor(self.text.document())
        cursor.beginEditBlock()
        for place, example in enumerate(examples):
            if place:
                cursor.insertText("\n\n", masked)
            cursor.insertText(_heading(example) + "\n", heading)
            for span in example.spans:
                cursor.insertText(span.text, trained if span.trained else masked)
            if example.cut:
                cursor.insertText(" …", masked)
        cursor.endEditBlock()
        self.text.verticalScrollBar().setValue(0)

    def _show_bad(self, rows: list[BadRow], count: int) -> None:
        self.tabs.setTabText(1, f"Left out ({count:,})" if count else "Left out")
        self.bad.setRowCount(len(rows))
        for place, bad in enumerate(rows):
            for section, text in enumerate((bad.file.rpartition("/")[2], f"{bad.line:,}", bad.reason)):
                item = QTableWidgetItem(text)
                item.setToolTip(text if section else bad.file)
                item.setTextAlignment(Qt.AlignmentFlag.AlignLeft | Qt.AlignmentFlag.AlignVCenter)
                self.bad.setItem(place, section, item)


def _heading(example: PreviewExample) -> str:
    parts = [f"#{example.number + 1}", f"line {example.line:,}"]
    parts += [example.part] if example.part else []
    parts.append(f"{example.trained_tokens:,} of {example.tokens:,} tokens trained")
    parts += ["held out"] if example.held_out else []
    return " · ".join(parts)


def summary(report: DataReport) -> str:
    """What became of the rows, in sentences."""
    kinds = sorted({file.format.replace("_", "/") for file in report.files if file.format})
    first = f"{report.kept:,} of {report.rows:,} rows used"
    first += " so far, the rest is being read" if report.partial else ""
    lines = [f"{first}, as {' and '.join(kinds)}." if kinds else f"{first}."]
    counts = [
        (report.bad, "left out"),
        (report.duplicates, "duplicates"),
        (report.too_long, "too long"),
        (report.held_out, "held out"),
    ]
    told = ", ".join(f"{count:,} {what}" for count, what in counts if count)
    lines.append(
        f"{report.examples:,} examples, {report.tokens:,} tokens, {report.trained_tokens:,} of them trained"
        + (f"; {told}." if told else ".")
    )
    if report.template:
        lines.append(f"Chat template: {report.template}.")
    lines += [file.problem for file in report.files if file.problem]
    lines += report.notes[:_LONGEST_NOTES]
    return "\n".join(lines)
