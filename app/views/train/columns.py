"""Which column of the data is what: recognised, and changeable; asked for where it is not recognised."""

from __future__ import annotations

from PySide6.QtWidgets import QComboBox, QFormLayout, QWidget

from app.training.data_config import FIELDS, FileReport
from app.viewmodels.train_draft import TrainDraft
from app.views.option_fields import QuietCombo
from app.views.widgets import label

_NONE = "–"
_TITLES = {
    "alpaca": "Instructions (instruction, output)",
    "sharegpt": "Conversations (from, value)",
    "messages": "Messages (role, content)",
    "prompt_completion": "Prompts and completions",
    "text": "Plain text",
    "preference": "Preferences (chosen, rejected)",
}


class ColumnsForm(QWidget):
    """A row for each field of the data's format."""

    def __init__(self, draft: TrainDraft, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._draft = draft
        self._form = QFormLayout(self)
        self._form.setContentsMargins(0, 0, 0, 0)
        self._form.setFieldGrowthPolicy(QFormLayout.FieldGrowthPolicy.AllNonFixedFieldsGrow)
        self._shown: object = None
        self.combos: dict[str, QComboBox] = {}
        self.format: QComboBox | None = None

    def show_columns(self) -> None:
        """Show the first file that has columns, unrecognised ones before others."""
        result = self._draft.result
        files = [file for file in result.report.files if file.columns] if result is not None else []
        first = next((file for file in files if not file.format), files[0] if files else None)
        asked = str(self._draft.values["data"].get("format", "auto"))
        now = None if first is None else (first.format, first.columns, sorted(first.mapping.items()), asked)
        if now == self._shown:
            return
        self._shown = now
        while self._form.rowCount():
            self._form.removeRow(0)
        self.combos, self.format = {}, None
        self.setVisible(first is not None)
        if first is not None:
            self._build(first, asked)

    def _build(self, file: FileReport, asked: str) -> None:
        if not file.format:
            self.format = QuietCombo()
            self.format.setAccessibleName("Format of the data")
            self.format.addItem("Choose what the rows are…", "auto")
            for name, text in _TITLES.items():
                self.format.addItem(text, name)
            self.format.setCurrentIndex(max(0, self.format.findData(asked)))
            self.format.activated.connect(self._format_chosen)
            self._form.addRow(label("Format", tone="muted"), self.format)
        kind = file.format or (asked if asked != "auto" else "")
        needed, optional = FIELDS.get(kind, ((), ()))
        for field in (*needed, *optional):
            column = file.mapping.get(field) or self._draft.mapping.get(field, "")
            combo = QuietCombo()
            combo.setAccessibleName(f"Column of {field}")
            if field not in needed or column not in file.columns:
                combo.addItem(_NONE, "")
            for name in file.columns:
                combo.addItem(name, name)
            combo.setCurrentIndex(max(0, combo.findData(column)))
            combo.activated.connect(lambda _i, field=field, combo=combo: self._map(field, str(combo.currentData())))
            self.combos[field] = combo
            self._form.addRow(label(field, tone="muted"), combo)

    def _format_chosen(self) -> None:
        if self.format is not None:
            chosen = str(self.format.currentData())
            data = {name: value for name, value in self._draft.values["data"].items() if name != "format"}
            self._draft.set_values("data", {**data, "format": chosen} if chosen != "auto" else data)

    def _map(self, field: str, column: str) -> None:
        self._draft.set_mapping({**self._draft.mapping, field: column})
