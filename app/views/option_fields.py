"""One row of an options form: title, control, help, what is wrong with the value, and the way back to the default."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from PySide6.QtCore import QSize, Qt, Signal
from PySide6.QtGui import QFont, QPainter, QPaintEvent, QValidator, QWheelEvent
from PySide6.QtWidgets import (
    QAbstractSpinBox,
    QCheckBox,
    QComboBox,
    QDoubleSpinBox,
    QHBoxLayout,
    QLineEdit,
    QPlainTextEdit,
    QSizePolicy,
    QWidget,
)

from app.core.options import OptionField, OptionValue, accepts
from app.views.theme import set_property, theme
from app.views.widgets import column, icon_button, label, row

CONTROL_WIDTH = 168
# Text boxes are wider; the row then puts its control below the title.
_FAR = 1e15
_DECIMALS = 14  # an optimizer's epsilon is 1e-8, a gentle learning rate 5e-7


class NumberBox(QDoubleSpinBox):
    """A spin box for any int or float. It takes what is typed, in range or not: the row says what is wrong.

    The wheel only turns it while it has the focus, so that scrolling a form changes nothing.
    """

    def __init__(self, field: OptionField, parent: QWidget | None = None) -> None:
        self._whole = field.kind == "int"
        super().__init__(parent)
        self._low = -_FAR if field.minimum is None else field.minimum
        self._high = _FAR if field.maximum is None else field.maximum
        self._unit = f" {field.unit}" if field.unit else ""
        self._automatic = False
        self.setDecimals(0 if self._whole else _DECIMALS)
        self.setRange(-_FAR, _FAR)
        self.setKeyboardTracking(True)
        self.setCorrectionMode(QAbstractSpinBox.CorrectionMode.CorrectToPreviousValue)
        self.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
        self.setSuffix(self._unit)
        self.lineEdit().setTextMargins(6, 0, 0, 0)  # a style sheet's padding does not reach the text here
        span = self._high - self._low
        if self._whole and span > 256:
            self.setStepType(QAbstractSpinBox.StepType.AdaptiveDecimalStepType)
        else:
            self.setSingleStep(1 if self._whole else 0.05 if span <= 5 else 0.5)

    def number(self) -> int | float:
        return int(self.value()) if self._whole else _rounded(self.value())

    def set_automatic(self, automatic: bool) -> None:
        """Show "Auto" instead of the number."""
        self._automatic = automatic
        self.setSuffix("" if automatic else self._unit)
        self.setValue(self.value())

    def textFromValue(self, value: float) -> str:
        if self._automatic:
            return "Auto"
        return f"{value:.0f}" if self._whole else f"{_rounded(value):.15g}"

    def valueFromText(self, text: str) -> float:
        # A decimal point is read in every language; a comma too, where the numbers have one.
        try:
            return float(text.removesuffix(self.suffix()).strip().replace(",", "."))
        except ValueError:
            return self.value()

    def validate(self, text: str, position: int) -> tuple[QValidator.State, str, int]:
        if self._automatic:
            return QValidator.State.Acceptable, text, position
        body = text.removesuffix(self.suffix()).strip().replace(",", ".")
        try:
            float(body)
        except ValueError:
            partial = body in ("", "-", "+", ".", "-.") or body.lower().endswith(("e", "e-", "e+"))
            state = QValidator.State.Intermediate if partial else QValidator.State.Invalid
            return state, text, position
        if self._whole and not body.lstrip("+-").isdigit():
            return QValidator.State.Invalid, text, position
        return QValidator.State.Acceptable, text, position

    def stepBy(self, steps: int) -> None:
        super().stepBy(steps)
        self.setValue(min(max(self.value(), self._low), self._high))

    def wheelEvent(self, event: QWheelEvent) -> None:
        if self.hasFocus():
            super().wheelEvent(event)
        else:
            event.ignore()


class QuietCombo(QComboBox):
    """A combo box that the wheel turns only while it has the focus, and that long entries do not widen."""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
        self.setSizeAdjustPolicy(QComboBox.SizeAdjustPolicy.AdjustToMinimumContentsLengthWithIcon)
        self.setMinimumContentsLength(8)

    def wheelEvent(self, event: QWheelEvent) -> None:
        if self.hasFocus():
            super().wheelEvent(event)
        else:
            event.ignore()


class FieldRow(QWidget):
    """One option.

    Args:
        field: what the option is.
        blocked: why it cannot be changed here (replaced, or not served by the loader); "" when it can.
        check: a further check of a value: a sentence saying what is wrong, or "".
    """

    changed = Signal(str)

    def __init__(
        self,
        field: OptionField,
        *,
        blocked: str = "",
        check: Callable[[OptionValue], str] | None = None,
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(parent)
        self.field = field
        self.blocked = blocked
        self._check = check
        self._setting = False
        self._title = label(field.title)
        self._title.setWordWrap(True)
        self._reset = icon_button("undo", f"Back to the default of {field.title.lower()}", self.reset)
        self._reset.setIconSize(QSize(14, 14))
        keep = self._reset.sizePolicy()
        keep.setRetainSizeWhenHidden(True)
        self._reset.setSizePolicy(keep)
        self.help = label(_help(field, blocked), tone="muted", wrap=True)
        self.problem = label(tone="negative", wrap=True)
        self.problem.hide()
        small = QFont(self.help.font())
        small.setPointSizeF(max(7.0, small.pointSizeF() * 0.92))
        self.help.setFont(small)
        self.problem.setFont(small)
        self.advice = label(tone="warning", wrap=True)
        self.advice.setFont(small)
        self.advice.hide()
        self.auto: QCheckBox | None = None
        self.control = self._make_control()
        self.control.setAccessibleName(field.title)
        self.control.setAccessibleDescription(field.help)
        self._tell_tip()
        self._title.setBuddy(self.control)
        self._arrange()
        self.setEnabled(True)
        for widget in (self.control, self.auto, self._title):
            if widget is not None and blocked:
                widget.setEnabled(False)
        self.set_value(field.default)

    # Building ---------------------------------------------------------------------------------------

    def _make_control(self) -> QWidget:
        field = self.field
        if field.kind in ("int", "float"):
            box = NumberBox(field)
            box.valueChanged.connect(self._touched)
            if field.optional:
                self.auto = QCheckBox("Auto")
                self.auto.setAccessibleName(f"{field.title}: automatic")
                self.auto.setToolTip(f"Automatic: {field.automatic}" if field.automatic else "Automatic")
                self.auto.toggled.connect(self._auto_toggled)
            return box
        if field.kind == "choice" or (field.kind == "bool" and field.optional):
            combo = QuietCombo()
            if field.optional:
                combo.addItem("Auto", None)
                if field.automatic:
                    combo.setItemData(0, f"Automatic: {field.automatic}", Qt.ItemDataRole.ToolTipRole)
            if field.kind == "bool":
                combo.addItem("On", True)
                combo.addItem("Off", False)
            for choice in field.choices:
                combo.addItem(choice, choice)
            combo.currentIndexChanged.connect(self._touched)
            return combo
        if field.kind == "bool":
            check = QCheckBox()
            check.toggled.connect(self._touched)
            return check
        placeholder = (
            f"Auto: {field.automatic}" if field.optional and field.automatic else "Auto" if field.optional else ""
        )
        if field.multiline:
            text = QPlainTextEdit()
            text.setPlaceholderText(placeholder)
            text.setTabChangesFocus(True)
            text.setFixedHeight(72)
            text.textChanged.connect(self._touched)
            return text
        line = QLineEdit()
        line.setPlaceholderText(placeholder)
        line.textEdited.connect(self._touched)
        return line

    def _arrange(self) -> None:
        top: QHBoxLayout = row(self._title, self._reset, spacing=4)
        top.setStretch(0, 1)
        wide = isinstance(self.control, QLineEdit | QPlainTextEdit)
        if self.auto is not None:
            top.addWidget(self.auto)
        outer = column(spacing=2, margins=(10, 4, 0, 4), parent=self)
        outer.addLayout(top)
        if wide:
            outer.addWidget(self.control)
        else:
            if not isinstance(self.control, QCheckBox):
                self.control.setFixedWidth(CONTROL_WIDTH if self.auto is None else CONTROL_WIDTH - 40)
            top.addWidget(self.control, 0, Qt.AlignmentFlag.AlignRight)
        for text in (self.problem, self.advice, self.help):
            outer.addWidget(text)
        self.setSizePolicy(QSizePolicy.Policy.Preferred, QSizePolicy.Policy.Maximum)

    # Values -----------------------------------------------------------------------------------------

    def set_default(self, value: OptionValue, origin: str = "") -> None:
        """Go back to this value from now on. The value that is shown stays.

        Args:
            origin: whose default it is, as in "the model's own"; "" is the program's.
        """
        self.field = msgspec.structs.replace(self.field, default=value)
        self._origin = origin
        self.help.setText(_help(self.field, self.blocked, self._told))
        back = (
            f"Back to {origin} {self.field.title.lower()}"
            if origin
            else f"Back to the default of {self.field.title.lower()}"
        )
        self._reset.setToolTip(back)
        self._reset.setAccessibleName(back)
        self._tell_tip()
        self._show_state()

    _origin = ""

    @property
    def _told(self) -> str:
        if not self._origin:
            return ""
        shown = " ".join(str(self.field.default).split())
        shown = shown if len(shown) <= 60 else shown[:59] + "\N{HORIZONTAL ELLIPSIS}"
        return f"{self._origin[:1].upper()}{self._origin[1:]}: {shown}."

    def _tell_tip(self) -> None:
        told = f"\n{self._told}" if self._origin else ""
        tip = f"{self.field.help}\n{accepts(self.field)}{told}\nName: {self.field.name}"
        self._title.setToolTip(tip)
        self.control.setToolTip(tip)

    def value(self) -> OptionValue:
        """What the control says now; may be out of range (see `complaint`)."""
        control = self.control
        if self.auto is not None and self.auto.isChecked():
            return None
        if isinstance(control, NumberBox):
            return control.number()
        if isinstance(control, QComboBox):
            return control.currentData()
        if isinstance(control, QCheckBox):
            return control.isChecked()
        text = control.toPlainText() if isinstance(control, QPlainTextEdit) else control.text()  # type: ignore[attr-defined]
        return None if self.field.optional and not text.strip() else text

    def suggest(self, value: OptionValue) -> None:
        """The number to begin with when Auto is switched off."""
        self._suggested = value

    _suggested: OptionValue = None

    def set_value(self, value: OptionValue) -> None:
        """Show a value without reporting it as a change."""
        self._setting = True
        control = self.control
        if self.auto is not None:
            self.auto.setChecked(value is None)
            control.setEnabled(value is not None and not self.blocked)
        if isinstance(control, NumberBox):
            control.set_automatic(value is None)
            control.setValue(float(value) if isinstance(value, int | float) else max(self.field.minimum or 0, 0))
        elif isinstance(control, QComboBox):
            place = control.findData(value)
            control.setCurrentIndex(max(place, 0))
        elif isinstance(control, QCheckBox):
            control.setChecked(bool(value))
        elif isinstance(control, QPlainTextEdit):
            control.setPlainText("" if value is None else str(value))
        elif isinstance(control, QLineEdit):
            control.setText("" if value is None else str(value))
        self._setting = False
        self._show_state()

    def reset(self) -> None:
        """Back to the default, and say so."""
        self.set_value(self.field.default)
        self.changed.emit(self.field.name)

    @property
    def is_changed(self) -> bool:
        return not self.blocked and self.value() != self.field.default

    def complaint(self) -> str:
        """What is wrong with the value, in a sentence; "" when nothing is."""
        value = self.value()
        if self.blocked or value is None:
            return ""
        if isinstance(value, int | float) and not isinstance(value, bool):
            low, high = self.field.minimum, self.field.maximum
            if (low is not None and value < low) or (high is not None and value > high):
                return f"{value:.15g} does not work. {accepts(self.field)}"
        return self._check(value) if self._check is not None else ""

    def advise(self, text: str) -> None:
        """Say what a value that is taken will bring; "" says nothing."""
        if text != self.advice.text():
            self.advice.setText(text)
            self._show_sentence()

    def _auto_toggled(self, automatic: bool) -> None:
        self.control.setEnabled(not automatic and not self.blocked)
        if isinstance(self.control, NumberBox) and not self._setting:
            self._setting = True
            self.control.set_automatic(automatic)
            if not automatic and isinstance(self._suggested, int | float):
                self.control.setValue(self._suggested)
            self._setting = False
        self._touched()

    def _touched(self, *_: object) -> None:
        if not self._setting:
            self._show_state()
            self.changed.emit(self.field.name)

    def _show_state(self) -> None:
        text = self.complaint()
        self.problem.setText(text)
        set_property(self.control, "invalid", bool(text))
        self._reset.setVisible(self.is_changed)
        self._show_sentence()
        self.update()

    def _show_sentence(self) -> None:
        """What is wrong stands in the help's place, and what to mind too: the rows below stay where they are."""
        if self.isVisible() and self.help.isVisible():
            for other in (self.problem, self.advice):
                other.setMinimumHeight(self.help.height())
        wrong, advice = bool(self.problem.text()), bool(self.advice.text())
        self.problem.setVisible(wrong)
        self.advice.setVisible(advice and not wrong)
        self.help.setVisible(not wrong and not advice)

    def paintEvent(self, event: QPaintEvent) -> None:
        # A bar at the left marks what differs from the default.
        if self.is_changed:
            painter = QPainter(self)
            painter.setRenderHint(QPainter.RenderHint.Antialiasing)
            painter.setPen(Qt.PenStyle.NoPen)
            painter.setBrush(theme().color("accent"))
            painter.drawRoundedRect(0, 8, 3, self.height() - 16, 1.5, 1.5)


def _rounded(value: float) -> float:
    """Without the digits that steps of 0.05 leave behind."""
    return float(f"{value:.12g}")


def _help(field: OptionField, blocked: str, told: str = "") -> str:
    if blocked:
        return blocked
    text = f"{field.help} {told}".strip()
    if field.optional and field.automatic:
        text += f" Auto: {field.automatic}."
    return text
