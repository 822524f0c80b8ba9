"""The Compare page: columns of answers to one prompt, and what is asked."""

from __future__ import annotations

from pathlib import Path

from PySide6.QtCore import Qt, Slot
from PySide6.QtWidgets import QCheckBox, QFrame, QHBoxLayout, QScrollArea, QSpinBox, QSplitter, QWidget

from app.core.errors import WeftError
from app.core.options import OptionValue
from app.core.stack import AdapterStack
from app.viewmodels.chat_presets import Presets
from app.viewmodels.compare import MOST, Compare
from app.views.chat.composer import Composer
from app.views.chat.side_panel import SidePanel
from app.views.compare.column import CompareColumn
from app.views.compare.stack_editor import StackEditor
from app.views.dialogs import reveal
from app.views.page import Notice, Page, PaletteCommand
from app.views.theme import theme
from app.views.widgets import Banner, button, column, icon_button, label, row, spaced, title

PANEL_WIDTH = 320


class ComparePage(Page):
    """One prompt, two to six stacks.

    Args:
        pick_model: opens the model picker.
    """

    def __init__(self, model: Compare, presets: Presets, *, pick_model: object, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._model = model
        self._presets = presets
        self._pick_model = pick_model
        self._panel: SidePanel | None = None
        self.columns: list[CompareColumn] = []
        self._row_widget = QWidget()
        self._row = QHBoxLayout(self._row_widget)
        self._row.setContentsMargins(16, 8, 16, 8)
        self._row.setSpacing(12)
        area = QScrollArea()
        area.setWidgetResizable(True)
        area.setFrameShape(QFrame.Shape.NoFrame)
        area.setVerticalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        area.setWidget(self._row_widget)
        area.setFocusPolicy(Qt.FocusPolicy.NoFocus)
        self.note = Banner("info", slim=True)
        self.note.hide()
        self.composer = Composer()
        self.composer.edit.setPlaceholderText("Ask every column the same\N{HORIZONTAL ELLIPSIS}")
        self.composer.sent.connect(self._run)
        self.composer.stopped.connect(model.stop)
        self.composer.help_wanted.connect(self._help)
        centre = QWidget()
        foot = column(self.composer, margins=(16, 0, 16, 8))
        inner = column(self._head(), self.note, area, spacing=0, parent=centre)
        inner.setStretch(2, 1)
        inner.addLayout(foot)
        self._splitter = QSplitter(Qt.Orientation.Horizontal)
        self._splitter.setHandleWidth(1)
        self._splitter.setChildrenCollapsible(False)
        self._splitter.addWidget(centre)
        column(self._splitter, spacing=0, parent=self)
        model.columns_changed.connect(self._rebuild)
        model.state_changed.connect(self._show)
        model.text_came.connect(self._text_came)
        model.cleared.connect(self._cleared)
        model.failed.connect(self.failed)
        theme().changed.connect(self._mark)  # the marks have colours of their own
        self._rebuild()

    def _head(self) -> QWidget:
        head = QFrame()
        head.setObjectName("pageHeader")
        self.add = button("Add column", self._add, icon_name="plus", tip="Another column, with the stack that is on")
        self.differences = QCheckBox("Highlight differences")
        self.differences.setToolTip(
            "Words that another column has not: against the first column, the first against the second"
        )
        self.differences.toggled.connect(self._mark)
        self.seed = spaced(QSpinBox())
        self.seed.setRange(0, 2**31 - 1)
        self.seed.setValue(self._model.seed)
        self.seed.setAccessibleName("Seed")
        self.seed.setToolTip("All columns begin with this seed")
        self.seed.valueChanged.connect(self._set_seed)
        self.collected = button("", self._show_collected, kind="link", tip="Examples of what was better, for training")
        self.panel_button = icon_button("side-panel", "System prompt and sampling", self.toggle_side, shortcut="Ctrl+B")
        row(
            title("Compare"), self.add, self.differences, 1, self.collected, label("Seed", tone="muted"), self.seed,
            self.panel_button, margins=(16, 8, 8, 8), spacing=12, parent=head,
        )  # fmt: skip
        return head

    # What the window asks ---------------------------------------------------------------------------

    def entered(self) -> None:
        self.composer.edit.setFocus()

    def foot_height(self) -> int:
        return self.composer.height() + 16

    def commands(self) -> list[PaletteCommand]:
        return [
            PaletteCommand(title="Add a column", group="Compare", icon="plus", run=self._come_and_add),
        ]

    def shutdown(self) -> None:
        self._model.stop()

    def show_stacks(self, stacks: list[AdapterStack]) -> None:
        """Begin with these columns."""
        self._model.set_stacks(stacks)

    @property
    def panel(self) -> SidePanel:
        """System prompt and sampling; made when first shown."""
        if self._panel is None:
            made = SidePanel(self._presets, heading="All columns")
            made.setMinimumWidth(280)
            made.setMaximumWidth(480)
            made.defaults = ("", dict(self._model.sampling))
            made.set_values(self._model.system, made.defaults[1])
            made.set_loaded(self._model.model, self._model.loader)
            made.system_changed.connect(self._set_system)
            made.sampling_changed.connect(self._set_sampling)
            made.failed.connect(self.failed)
            made.noticed.connect(self._noticed)
            made.closed.connect(self.toggle_side)
            self._splitter.addWidget(made)
            self._splitter.setSizes([max(320, self.width() - PANEL_WIDTH), PANEL_WIDTH])
            made.hide()
            self._panel = made
        return self._panel

    def toggle_side(self) -> None:
        panel = self.panel
        panel.setVisible(panel.isHidden())

    # Columns ----------------------------------------------------------------------------------------

    @Slot()
    def _rebuild(self) -> None:
        while len(self.columns) > len(self._model.columns):
            gone = self.columns.pop()
            self._row.removeWidget(gone)
            gone.hide()
            gone.deleteLater()
        while len(self.columns) < len(self._model.columns):
            made = CompareColumn(len(self.columns))
            made.stack_wanted.connect(self._edit_stack)
            made.closed.connect(self._close_column)
            made.preferred.connect(self._prefer)
            self.columns.append(made)
            self._row.addWidget(made, 1)
        for view, shown in zip(self.columns, self._model.columns, strict=True):
            if view.text.toPlainText() != shown.text:
                view.set_text(shown.text)
        self._show()

    @Slot()
    def _show(self) -> None:
        model = self._model
        for place, (view, shown) in enumerate(zip(self.columns, model.columns, strict=True)):
            view.show_column(
                shown,
                closable=len(model.columns) > 2,
                running=model.running,
                can_prefer=model.can_prefer(place),
            )
        self.add.setEnabled(len(model.columns) < MOST and not model.running)
        self.composer.set_state(
            reason="" if model.ready else "No model is loaded.",
            help_text="" if model.ready else "Choose a model",
            writing=model.running,
        )
        stacked = any(column.stack.adapters for column in model.columns)
        text = model.note or (
            "The loaded model takes no adapters." if stacked and model.ready and not model.takes_adapters else ""
        )
        if self._panel is not None:
            self._panel.set_loaded(model.model, model.loader)
        self.note.setVisible(bool(text))
        self.note.text.setText(text)
        self.collected.setVisible(model.collected > 0)
        self.collected.setText(f"{model.collected} examples collected")
        self._mark()

    @Slot(int, str)
    def _text_came(self, place: int, text: str) -> None:
        view = self.columns[place]
        view.append(text)
        view.facts.setText(f"{self._model.columns[place].tokens} tokens")

    @Slot()
    def _cleared(self) -> None:
        for view in self.columns:
            view.set_text("")

    @Slot()
    def _mark(self, *_: object) -> None:
        on = self.differences.isChecked() and not self._model.running
        for place, view in enumerate(self.columns):
            view.mark(self._model.marks(place) if on and self._model.columns[place].text else [])

    # Acts -------------------------------------------------------------------------------------------

    def _place(self) -> int:
        sender = self.sender()
        return next((place for place, view in enumerate(self.columns) if view is sender), -1)

    @Slot()
    def _edit_stack(self) -> None:
        place = self._place()
        try:
            known = self._model.known()
        except WeftError as error:
            self.failed.emit(error)
            return
        editor = StackEditor(known, self._model.columns[place].stack, self)
        editor.changed.connect(lambda stack: self._model.set_stack(place, stack))
        editor.open_below(self.columns[place].stack)

    @Slot()
    def _close_column(self) -> None:
        self._model.remove(self._place())

    @Slot()
    def _prefer(self) -> None:
        self._model.prefer(self._place())

    @Slot(str)
    def _run(self, prompt: str) -> None:
        if self._panel is not None:
            self._panel.flush()
        self._model.run(prompt)

    def _add(self) -> None:
        self._model.add()

    def _come_and_add(self) -> None:
        self.page_wanted.emit("compare")
        self._model.add()

    @Slot(int)
    def _set_seed(self, seed: int) -> None:
        self._model.seed = seed

    @Slot(str)
    def _set_system(self, system: str) -> None:
        self._model.system = system

    @Slot(dict)
    def _set_sampling(self, values: dict[str, OptionValue]) -> None:
        self._model.sampling = dict(values)

    @Slot(str, object)
    def _noticed(self, text: str, undo: object) -> None:
        self.notice.emit(Notice(text=text, action="Undo", run=undo))  # type: ignore[arg-type]

    def _show_collected(self) -> None:
        reveal(Path(self._model.preferences_path))

    @Slot()
    def _help(self) -> None:
        if callable(self._pick_model):
            self._pick_model()
