"""Combine adapters into a new one, or resize one: which, how much of each, how, and under which name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import cast

from PySide6.QtCore import QEvent, QModelIndex, QObject, Qt, Slot
from PySide6.QtGui import QKeyEvent
from PySide6.QtWidgets import (
    QDoubleSpinBox,
    QFormLayout,
    QFrame,
    QLineEdit,
    QListView,
    QScrollArea,
    QSpinBox,
    QWidget,
)

from app.core.combine_plan import METHODS, CombinePlan, Dtype, Method, Sign, uses_density, uses_rank, uses_sign
from app.core.errors import WeftError
from app.core.library import AdapterEntry, ModelEntry
from app.core.stack import AdapterStack, StackedAdapter
from app.viewmodels.adapter_jobs import AdapterJobs, combined_name
from app.viewmodels.adapter_table import AdapterTable
from app.viewmodels.library_table import EntryRole
from app.views.dialogs import Sheet
from app.views.option_fields import QuietCombo
from app.views.search_field import SearchField
from app.views.widgets import ElidedLabel, button, column, icon_button, label, row, spaced

_WEIGHT = 100.0
_SIGNS = {"total": "By the sum of the values", "frequency": "By the count of signs"}
_DTYPES = {"float32": "float32: exact", "bfloat16": "bfloat16: half the size", "float16": "float16: half the size"}


class _Part(QFrame):
    """One adapter with its weight."""

    def __init__(self, entry: AdapterEntry, weight: float, remove: Callable[[_Part], object], fixed: bool) -> None:
        super().__init__()
        self.setObjectName("bar")
        self.entry = entry
        name = ElidedLabel(entry.name, mode=Qt.TextElideMode.ElideMiddle)
        facts = label(f"{entry.kind}, rank {entry.rank}", tone="muted")
        self.weight = spaced(QDoubleSpinBox())
        self.weight.setRange(-_WEIGHT, _WEIGHT)
        self.weight.setSingleStep(0.05)
        self.weight.setDecimals(3)
        self.weight.setValue(weight)
        self.weight.setAccessibleName(f"Weight of {entry.name}")
        self.weight.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
        self.remove = icon_button("close", f"Leave {entry.name} out", lambda: remove(self))
        self.weight.setVisible(not fixed)
        self.remove.setVisible(not fixed)
        made = row(name, facts, self.weight, self.remove, margins=(8, 2, 4, 2), parent=self)
        made.setStretch(0, 1)


class CombineSheet(Sheet):
    """The sheet. Enter in the filter adds the adapter that is chosen there.

    Args:
        entries: adapters to begin with, each with its weight. resize: one adapter alone, cut or brought to another rank.
        table: a table of its own of the library's adapters, for adding more.
        bases: models that DoRAs among them may have been trained on, the likeliest first.
    """

    def __init__(
        self,
        jobs: AdapterJobs,
        entries: Sequence[tuple[AdapterEntry, float]],
        table: AdapterTable | None,
        *,
        resize: bool = False,
        bases: Sequence[ModelEntry] = (),
        parent: QWidget | None = None,
    ) -> None:
        heading = "Change the rank" if resize else "Combine into a new adapter"
        text = (
            "A lower rank makes the file smaller and the adapter quicker; the energy that is kept is shown when it is done."
            if resize
            else "The new adapter does alone, at weight 1, what these do together with their weights."
        )
        super().__init__(parent, "loras", "accent", heading, [(text, "muted")])
        self._jobs, self._table, self._resize, self._bases = jobs, table, resize, list(bases)
        self._named = False
        self.parts: list[_Part] = []
        self._inside = QWidget()
        self._parts = column(spacing=4, parent=self._inside)
        self._parts.addStretch(1)
        self._scroll = QScrollArea()
        self._scroll.setWidgetResizable(True)
        self._scroll.setFrameShape(QFrame.Shape.NoFrame)
        self._scroll.setWidget(self._inside)
        self._scroll.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.body.addWidget(self._scroll, 1)
        if table is not None:
            self._add_finder(table)
        self._add_fields()
        self.problem = label(tone="negative", wrap=True)
        self.body.addWidget(self.problem)
        self.add_close("Cancel")
        self.yes = button("Change the rank" if resize else "Combine", self._accept, kind="primary")
        self.yes.setDefault(True)
        self.buttons.addWidget(self.yes)
        for entry, weight in entries:
            self.add(entry, weight)
        self._method_chosen()
        self.setMinimumWidth(600)
        (self.rank if resize else self.field).setFocus()

    # Building

    def _add_finder(self, table: AdapterTable) -> None:
        self.finder = SearchField("Add an adapter: type a part of its name")
        self.finder.setAccessibleName("Find an adapter to add")
        self.finder.textChanged.connect(table.set_filter)
        self.finder.textChanged.connect(self._found)
        self.finder.installEventFilter(self)
        self.found = QListView()
        self.found.setModel(table)
        self.found.setUniformItemSizes(True)
        self.found.setAccessibleName("Adapters of the library")
        self.found.setFixedHeight(96)
        self.found.activated.connect(self._take)
        self.found.clicked.connect(self._take)
        self.found.hide()
        self.body.addWidget(self.finder)
        self.body.addWidget(self.found)
        table.set_filter("")
        table.refresh()

    def _add_fields(self) -> None:
        self.method = _choice("Method", [(name, name) for name in METHODS])
        self.method.setCurrentIndex(self.method.findData("svd" if self._resize else "cat"))
        self.method.currentIndexChanged.connect(self._method_chosen)
        self.help = label(tone="muted", wrap=True)
        self.help.setMinimumHeight(2 * self.help.fontMetrics().lineSpacing())
        self.density = self._number("Density", 0.01, 1.0, 0.5, 0.05, "Share of the values that is kept")
        self.sign = _choice("Sign election", _SIGNS.items())
        self.base = _choice("Base", [(model.id, model.name) for model in self._bases])
        self.base.setToolTip("What a DoRA changes depends on the model that it was trained on")
        self.rank = _whole("Rank", 65_536, "Of the new adapter")
        self.rank.setSpecialValueText("As the largest")
        self.clamp = self._number("Clamp", 0.5, 1.0, 1.0, 0.01, "Quantile beyond which values are cut; 1 cuts none")
        seed_tip = "Of the values that are dropped at random: the same seed drops the same"
        self.seed = _whole("Seed", 2**31 - 1, seed_tip)
        self.dtype = _choice("Saved as", _DTYPES.items())
        self.field = QLineEdit()
        self.field.setAccessibleName("Name of the new adapter")
        self.field.setMaxLength(100)
        self.field.textEdited.connect(self._name_typed)
        self._lay_out()
        if self._resize:
            self.rank.valueChanged.connect(self._suggest)
        for changed in (self.rank.valueChanged, self.density.valueChanged, self.clamp.valueChanged):
            changed.connect(self._look)

    def _lay_out(self) -> None:
        self._form = QFormLayout()
        self._form.setHorizontalSpacing(16)
        self._form.setVerticalSpacing(8)
        self._form.setFieldGrowthPolicy(QFormLayout.FieldGrowthPolicy.AllNonFixedFieldsGrow)
        for text, widget in (
            ("Method", self.method),
            ("", self.help),
            ("Density", self.density),
            ("Sign", self.sign),
            ("Base", self.base),
            ("Rank", self.rank),
            ("Clamp", self.clamp),
            ("Seed", self.seed),
            ("Saved as", self.dtype),
            ("Name", self.field),
        ):
            self._form.addRow(text, widget)
        if self._resize:
            for widget in (self.method, self.help):
                self._form.setRowVisible(widget, False)
        self.body.addLayout(self._form)

    def _number(self, name: str, low: float, high: float, value: float, step: float, tip: str) -> QDoubleSpinBox:
        made = spaced(QDoubleSpinBox())
        made.setRange(low, high)
        made.setSingleStep(step)
        made.setDecimals(3)
        made.setValue(value)
        made.setAccessibleName(name)
        made.setToolTip(tip)
        return made

    # Adapters

    def add(self, entry: AdapterEntry, weight: float = 1.0) -> None:
        """Put one more adapter among those that are combined."""
        if any(part.entry.path == entry.path for part in self.parts):
            return
        part = _Part(entry, weight, self._remove, self._resize)
        self.parts.append(part)
        self._parts.insertWidget(len(self.parts) - 1, part)
        self._parts_changed()

    def _remove(self, part: _Part) -> None:
        self.parts.remove(part)
        self._parts.removeWidget(part)
        part.hide()
        part.deleteLater()
        self._parts_changed()

    def _parts_changed(self) -> None:
        height = sum(part.sizeHint().height() + 4 for part in self.parts[:3])
        self._scroll.setFixedHeight(max(40, height))
        self._suggest()
        self._method_chosen()

    @Slot()
    def _suggest(self, *_: object) -> None:
        """A name, until somebody types one."""
        if not self._named:
            names = [part.entry.name for part in self.parts]
            rank = self.rank.value() or max((part.entry.rank for part in self.parts), default=0)
            wanted = f"{names[0].rpartition('/')[2]}-r{rank}" if self._resize and names else combined_name(names)
            self.field.setText(self._jobs.free_name(wanted) if names else "")

    @Slot(str)
    def _found(self, text: str) -> None:
        assert self._table is not None
        shown = bool(text.strip()) and self._table.rowCount() > 0
        self.found.setVisible(shown)
        if shown:
            self.found.setCurrentIndex(self._table.index(0, 0))

    @Slot(QModelIndex)
    def _take(self, index: QModelIndex) -> None:
        entry = index.data(EntryRole) if index.isValid() else None
        if isinstance(entry, AdapterEntry):
            self.add(entry)
            self.finder.clear()

    def eventFilter(self, watched: QObject, event: QEvent) -> bool:
        if isinstance(event, QKeyEvent) and event.type() == QEvent.Type.KeyPress and self._table is not None:
            if watched is self.finder and self.found.isVisible():
                steps = {Qt.Key.Key_Down: 1, Qt.Key.Key_Up: -1}
                if event.key() in steps:
                    place = self.found.currentIndex().row() + steps[Qt.Key(event.key())]
                    self.found.setCurrentIndex(self._table.index(max(0, min(self._table.rowCount() - 1, place)), 0))
                    return True
                if event.key() in (Qt.Key.Key_Return, Qt.Key.Key_Enter):
                    self._take(self.found.currentIndex())
                    return True
                if event.key() == Qt.Key.Key_Escape:
                    self.finder.clear()
                    return True
        return super().eventFilter(watched, event)

    # Method and plan

    @Slot()
    def _method_chosen(self) -> None:
        method = self.method.currentData()
        self.help.setText(METHODS[method])
        for widget, wanted in (
            (self.density, uses_density(method)),
            (self.sign, uses_sign(method)),
            (self.base, uses_rank(method) and bool(self._dora())),
            (self.rank, uses_rank(method)),
            (self.clamp, uses_rank(method) and not self._resize),
            (self.seed, method.startswith("dare")),
        ):
            self._form.setRowVisible(widget, wanted)
        self._look()

    @Slot(str)
    def _name_typed(self, text: str) -> None:
        self._named = bool(text.strip())
        self._look()

    @Slot()
    def _look(self, *_: object) -> None:
        """Say what is wrong before the button is pressed."""
        try:
            self.plan()
        except WeftError as error:
            self.problem.setText(error.message)
        else:
            self.problem.setText(self._impossible())
        self.problem.setVisible(bool(self.problem.text()))
        self.yes.setEnabled(not self.problem.text())

    def _impossible(self) -> str:
        """Why what was chosen cannot be combined, as far as the library knows."""
        if (dora := self._dora()) and not uses_rank(self.method.currentData()):
            return (
                f"{dora} is a DoRA, whose difference is no low-rank pair: choose svd or one of the svd forms, which come near "
                "it. Exact is to use the adapters together as a stack, or to merge them into their base."
            )
        if dora and not self._bases:
            return f"{dora} is a DoRA: what it changes depends on its base, and the library has no such model of safetensors."
        for part in self.parts:
            if part.entry.needs_alpha:
                return f"The alpha of {part.entry.name} is not recorded. Say it on the LoRAs page first."
        return ""

    def _dora(self) -> str:
        """The name of the first DoRA among the parts, "" when none is one."""
        return next((part.entry.name for part in self.parts if "DoRA" in part.entry.kind), "")

    def plan(self) -> CombinePlan:
        """What the sheet says. Raises WeftError for what cannot be."""
        method = cast("Method", self.method.currentData())
        adapters = tuple(
            StackedAdapter(path=part.entry.path, name=part.entry.name, weight=part.weight.value())
            for part in self.parts
        )
        dropped = uses_density(method)
        plan = CombinePlan(
            adapters=AdapterStack(adapters=adapters),
            to="",
            method=method,
            density=round(self.density.value(), 6) if dropped else 0.5,
            sign=cast("Sign", self.sign.currentData()),
            rank=self.rank.value() if uses_rank(method) else 0,
            clamp=round(self.clamp.value(), 6) if uses_rank(method) else 1.0,
            seed=self.seed.value() if method.startswith("dare") else 0,
            dtype=cast("Dtype", self.dtype.currentData()),
            base=self._bases[self.base.currentIndex()].path if self._dora() and self._bases else "",
        )
        plan.check()
        return _at(plan, str(self._jobs.place(self.field.text())))

    def _accept(self) -> None:
        try:
            self._jobs.combine(self.plan())
        except WeftError as error:
            self.problem.setText(str(error))
            self.problem.show()
            return
        self.accept()


def _at(plan: CombinePlan, to: str) -> CombinePlan:
    import msgspec

    return msgspec.structs.replace(plan, to=to)


def _choice(name: str, entries: Iterable[tuple[str, str]]) -> QuietCombo:
    """A list to choose one of: (key, what is shown)."""
    made = QuietCombo()
    made.setAccessibleName(name)
    for key, text in entries:
        made.addItem(text, key)
    return made


def _whole(name: str, most: int, tip: str) -> QSpinBox:
    """A field for a whole number from 0."""
    made = spaced(QSpinBox())
    made.setRange(0, most)
    made.setAccessibleName(name)
    made.setToolTip(tip)
    return made
