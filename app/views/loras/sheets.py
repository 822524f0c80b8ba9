"""Small sheets of the LoRAs page: alpha that nobody recorded, a name, the model to convert for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from PySide6.QtCore import Qt, Slot
from PySide6.QtWidgets import QButtonGroup, QDoubleSpinBox, QFrame, QLineEdit, QRadioButton, QScrollArea, QWidget

from app.core.adapter_import import ImportResult
from app.core.errors import WeftError
from app.core.library import ModelEntry
from app.views.dialogs import Sheet
from app.views.option_fields import QuietCombo
from app.views.widgets import ElidedLabel, button, column, label, row, spaced

_MOST_ALPHA = 65_536.0


class AlphaRow(QWidget):
    """One adapter: the rank, twice the rank, or a value of one's own."""

    def __init__(self, result: ImportResult, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.source = result.source
        rank = max(1, result.rank)
        name = ElidedLabel(Path(result.source).name, mode=Qt.TextElideMode.ElideMiddle)
        name.setMinimumWidth(120)
        self._group = QButtonGroup(self)
        self._group.setExclusive(True)
        self.rank = self._choice(f"{rank} (the rank)", f"Alpha is the rank, {rank}: the change is taken as it is")
        self.twice = self._choice(f"{2 * rank} (2 × rank)", f"Alpha is twice the rank, {2 * rank}")
        self.own = self._choice("Own value", "Alpha is another number")
        self.value = spaced(QDoubleSpinBox())
        self.value.setRange(0.01, _MOST_ALPHA)
        self.value.setDecimals(2)
        self.value.setValue(rank)
        self.value.setAccessibleName(f"Alpha of {Path(result.source).name}, typed")
        self.value.setEnabled(False)
        self._rank = rank
        line = row(self.rank, self.twice, self.own, self.value, 1, spacing=12)
        made = column(name, spacing=4, parent=self)
        made.addLayout(line)
        self.rank.setChecked(True)
        self._group.buttonToggled.connect(self._toggled)

    def _choice(self, text: str, tip: str) -> QRadioButton:
        made = QRadioButton(text)
        made.setToolTip(tip)
        made.setAccessibleName(text)
        made.setAccessibleDescription(tip)
        self._group.addButton(made)
        return made

    @Slot()
    def _toggled(self, *_: object) -> None:
        self.value.setEnabled(self.own.isChecked())
        if self.own.isChecked():
            self.value.setFocus()
            self.value.selectAll()

    @property
    def alpha(self) -> float:
        if self.own.isChecked():
            return self.value.value()
        return float(self._rank if self.rank.isChecked() else 2 * self._rank)


class AlphaSheet(Sheet):
    """Asks for alpha, of one adapter or of several at once. `give` gets it by source."""

    def __init__(
        self, asked: Sequence[ImportResult], give: Callable[[dict[str, float]], object], parent: QWidget | None = None
    ) -> None:
        one = len(asked) == 1
        heading = "What is its alpha?" if one else f"What is the alpha of these {len(asked)} adapters?"
        text = (
            "The file does not record it. Alpha divided by the rank is how strongly an adapter acts; most are trained with "
            "the rank or twice the rank. A wrong value can be corrected with the adapter's weight."
        )
        super().__init__(parent, "info", "accent", heading, [(text, "muted")])
        self._give = give
        self.rows = [AlphaRow(result) for result in asked]
        inside = QWidget()
        made = column(*self.rows, spacing=12, parent=inside)
        made.addStretch(1)
        if len(asked) > 3:
            scroll = QScrollArea()
            scroll.setWidgetResizable(True)
            scroll.setFrameShape(QFrame.Shape.NoFrame)
            scroll.setWidget(inside)
            scroll.setMinimumHeight(240)
            self.body.addWidget(scroll, 1)
        else:
            self.body.addWidget(inside)
        self.add_close("Leave out")
        add = self.add_button("Add", self._add, kind="primary")
        add.setDefault(True)
        add.setFocus()

    def _add(self) -> None:
        self._give({each.source: each.alpha for each in self.rows})


class NameSheet(Sheet):
    """Asks for a name. What is wrong with it is said at the field, before the button.

    Args:
        check: why a name cannot be taken, "" when it can. take: gets the name; its WeftError is shown at the field.
        warn: a sentence that does not keep the name from being taken, such as that something is replaced.
    """

    def __init__(
        self,
        heading: str,
        text: str,
        yes: str,
        take: Callable[[str], object],
        *,
        name: str = "",
        check: Callable[[str], str] = lambda _: "",
        warn: Callable[[str], str] = lambda _: "",
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(parent, "edit", "accent", heading, [(text, "muted")])
        self._take, self._check, self._warn = take, check, warn
        self.field = QLineEdit(name)
        self.field.setAccessibleName("Name")
        self.field.setMaxLength(200)
        self.problem = label(tone="negative", wrap=True)
        self.body.addWidget(self.field)
        self.body.addWidget(self.problem)
        self.add_close("Cancel")
        self.yes = button(yes, self._accept, kind="primary")
        self.buttons.addWidget(self.yes)
        self.yes.setDefault(True)
        self.field.textChanged.connect(self._look)
        self._look()
        self.field.setFocus()
        self.field.selectAll()

    @Slot()
    def _look(self) -> None:
        name = self.field.text().strip()
        why = self._check(name) if name else ""
        self.problem.setText(why or (self._warn(name) if name else ""))
        self.yes.setEnabled(bool(name) and not why)

    def _accept(self) -> None:
        try:
            self._take(self.field.text().strip())
        except WeftError as error:
            self.problem.setText(str(error))
            return
        self.accept()


class ConvertSheet(Sheet):
    """For which model, and under which name.

    Args:
        models: those that the adapter fits, the best first.
        check: why the name cannot be taken, "" when it can. convert: starts it; its WeftError is shown here.
    """

    def __init__(
        self,
        heading: str,
        text: str,
        models: Sequence[ModelEntry],
        name: str,
        check: Callable[[str], str],
        convert: Callable[[ModelEntry, str], object],
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(parent, "export", "accent", heading, [(text, "muted")])
        self._check, self._convert, self._models = check, convert, list(models)
        self.model = QuietCombo()
        self.model.setAccessibleName("Model")
        for each in models:
            self.model.addItem(each.name)
        self.field = QLineEdit(name)
        self.field.setAccessibleName("Name of the new adapter")
        self.problem = label(tone="negative", wrap=True)
        for title_, widget in (("For the model", self.model), ("Name", self.field)):
            named = label(title_)
            named.setBuddy(widget)
            self.body.addWidget(named)
            self.body.addWidget(widget)
        self.body.addWidget(self.problem)
        self.add_close("Cancel")
        self.yes = button("Convert", self._accept, kind="primary")
        self.yes.setDefault(True)
        self.buttons.addWidget(self.yes)
        self.field.textChanged.connect(self._look)
        self._look()

    @Slot()
    def _look(self) -> None:
        why = self._check(self.field.text().strip())
        self.problem.setText(why)
        self.yes.setEnabled(not why and bool(self._models))

    def _accept(self) -> None:
        try:
            self._convert(self._models[self.model.currentIndex()], self.field.text().strip())
        except WeftError as error:
            self.problem.setText(str(error))
            return
        self.accept()
