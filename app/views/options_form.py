"""A form for any options struct, generated from `core.options.describe`: loader options and sampling alike."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import msgspec
from PySide6.QtCore import Signal
from PySide6.QtWidgets import QVBoxLayout, QWidget

from app.core.options import OptionField, OptionValue, describe
from app.views.option_fields import FieldRow
from app.views.theme import title_font
from app.views.widgets import Fold, column, label

Check = Callable[[OptionValue], str]


class OptionsForm(QWidget):
    """Groups of options; the advanced part is folded, and built when it is first opened.

    Args:
        options_type: the struct.
        served: names of the fields that the loader serves; None is all. Others stand greyed, with `reason`.
        reason: the sentence that greyed fields show.
        checks: further checks, by field name: a sentence saying what is wrong with the value, or "".
        leave_out: fields that are not shown at all.
        advanced_open: whether the advanced part starts open.

    Signals:
        changed: a person changed a value. `set_values` does not emit it.
        advanced_toggled: the advanced part was opened or closed.
    """

    changed = Signal()
    advanced_toggled = Signal(bool)

    def __init__(
        self,
        options_type: type[msgspec.Struct],
        *,
        served: Collection[str] | None = None,
        reason: str = "This loader does not have it.",
        checks: Mapping[str, Check] | None = None,
        leave_out: Collection[str] = (),
        advanced_open: bool = False,
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(parent)
        self.options_type = options_type
        self.fields = {field.name: field for field in describe(options_type, leave_out)}
        self.rows: dict[str, FieldRow] = {}
        self._plain = dict(self.fields)  # with the struct's own defaults
        self._origin = ""
        self._served = None if served is None else frozenset(served)
        self._reason = reason
        self._checks = dict(checks or {})
        self._suggestions: dict[str, OptionValue] = {}
        self._pending: dict[str, OptionValue] = {}  # values of rows not built yet
        self._advanced: Fold | None = None
        self.last_changed = ""  # the field that a person changed last
        layout = column(spacing=8, parent=self)
        plain = [field for field in self.fields.values() if not field.advanced]
        advanced = [field for field in self.fields.values() if field.advanced]
        self._add_groups(layout, plain)
        if advanced:
            self._advanced_fields = advanced
            self._advanced_content = QWidget()
            self._advanced_layout = column(spacing=8, margins=(0, 4, 0, 0), parent=self._advanced_content)
            self._advanced = Fold(self._advanced_title(), self._advanced_content, opened=False)
            self._advanced.toggled.connect(self._open_advanced)
            layout.addWidget(self._advanced)
            if advanced_open:
                self._advanced.header.setChecked(True)

    def show_advanced(self, shown: bool) -> None:
        """Unfold or fold the advanced part, where there is one."""
        if self._advanced is not None:
            self._advanced.header.setChecked(shown)

    # Values -----------------------------------------------------------------------------------------

    def values(self) -> dict[str, OptionValue]:
        """The changed fields only, right or wrong (see `problems`)."""
        built = {name: row.value() for name, row in self.rows.items() if row.is_changed}
        return {name: (built | self._pending)[name] for name in self.fields if name in built or name in self._pending}

    def set_values(self, values: Mapping[str, OptionValue]) -> None:
        """Show these values; fields not named go to their defaults. Unknown names are left out."""
        self._pending = {}
        self.last_changed = ""
        for name, field in self.fields.items():
            value = values.get(name, field.default)
            if name in self.rows:
                self.rows[name].set_value(value)
            elif value != field.default and not self._blocked(field):
                self._pending[name] = value
        self._title_advanced()

    def set_defaults(self, values: Mapping[str, OptionValue], origin: str) -> None:
        """Other defaults than the struct's, for the fields that are named; `origin` says whose, as in "the model's own".

        Values that were shown because they were the defaults become the new ones; others stay.
        """
        before = self.values()
        self._origin = origin
        for name, plain in self._plain.items():
            self.fields[name] = msgspec.structs.replace(plain, default=values.get(name, plain.default))
            if name in self.rows:
                self._give_default(self.rows[name])
        self.set_values(before)

    def _give_default(self, row: FieldRow) -> None:
        default = self.fields[row.field.name].default
        row.set_default(default, self._origin if default != self._plain[row.field.name].default else "")

    def suggest(self, values: Mapping[str, OptionValue]) -> None:
        """Numbers that fields begin with when their Auto is switched off."""
        self._suggestions = dict(values)
        for name, row in self.rows.items():
            row.suggest(self._suggestions.get(name))

    def problems(self) -> dict[str, str]:
        """What is wrong, by field: empty when the values can be used."""
        found = {name: row.complaint() for name, row in self.rows.items()}
        return {name: text for name, text in found.items() if text}

    def advise(self, advice: Mapping[str, str]) -> None:
        """Sentences at fields whose values are taken but have a cost, by name; fields not named say none."""
        for name, row in self.rows.items():
            row.advise(advice.get(name, ""))

    def reset(self) -> None:
        """Every field to its default, reported as one change."""
        self.set_values({})
        self.changed.emit()

    def set_served(self, served: Collection[str] | None, reason: str = "") -> None:
        """Another loader serves other fields: grey accordingly and keep the values."""
        served = None if served is None else frozenset(served)
        if served == self._served and (not reason or reason == self._reason):
            return
        values = self.values() | {
            name: row.value() for name, row in self.rows.items() if row.blocked and row.value() != row.field.default
        }
        self._served = served
        self._reason = reason or self._reason
        for name, old in list(self.rows.items()):
            new = self._make_row(self.fields[name])
            holder = old.parentWidget()
            assert holder is not None
            layout = holder.layout()
            assert layout is not None
            layout.replaceWidget(old, new)
            old.hide()
            old.deleteLater()
        self.set_values(values)

    def focus_first_problem(self) -> None:
        """Put the cursor where the first wrong value is."""
        for name in self.problems():
            if self.fields[name].advanced and self._advanced is not None:
                self._advanced.header.setChecked(True)
            self.rows[name].control.setFocus()
            return

    # Building ---------------------------------------------------------------------------------------

    def _blocked(self, field: OptionField) -> str:
        if field.replaced:
            return field.replaced
        if self._served is not None and field.name not in self._served:
            return self._reason
        return ""

    def _make_row(self, field: OptionField) -> FieldRow:
        made = FieldRow(field, blocked=self._blocked(field), check=self._checks.get(field.name))
        made.suggest(self._suggestions.get(field.name))
        self._give_default(made)
        made.changed.connect(self._row_changed)
        self.rows[field.name] = made
        return made

    def _add_groups(self, layout: QVBoxLayout, fields: list[OptionField]) -> None:
        groups: dict[str, list[OptionField]] = {}
        for field in fields:
            groups.setdefault(field.group, []).append(field)
        for name, members in groups.items():
            if len(groups) > 1 or name != "General":
                head = label(name)
                head.setFont(title_font(head, 0))
                head.setContentsMargins(0, 8, 0, 0)
                layout.addWidget(head)
            for field in members:
                layout.addWidget(self._make_row(self.fields[field.name]))

    def _open_advanced(self, opened: bool) -> None:
        if opened and self._advanced_layout.count() == 0:
            pending, self._pending = self._pending, {}
            self._add_groups(self._advanced_layout, self._advanced_fields)
            for name, value in pending.items():
                self.rows[name].set_value(value)
        self.advanced_toggled.emit(opened)

    def _row_changed(self, name: str) -> None:
        self.last_changed = name
        self._title_advanced()
        self.changed.emit()

    def _advanced_title(self) -> str:
        count = sum(1 for field in self._advanced_fields if field.name in self.values())
        return f"Advanced · {count} changed" if count else "Advanced"

    def _title_advanced(self) -> None:
        if self._advanced is not None:
            self._advanced.header.setText(self._advanced_title())
