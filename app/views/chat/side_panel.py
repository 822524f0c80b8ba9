"""The panel at the right: system prompt and sampling of this chat."""

from __future__ import annotations

from collections.abc import Callable, Collection

from PySide6.QtCore import QEvent, QObject, QPoint, Qt, QTimer, Signal, Slot
from PySide6.QtGui import QKeyEvent
from PySide6.QtWidgets import QComboBox, QFrame, QLineEdit, QMenu, QPlainTextEdit, QScrollArea, QWidget

from app.backends.base import Spec
from app.core.library import ModelEntry
from app.core.options import OptionValue
from app.core.own_sampling import OwnSampling
from app.core.sampling import Sampling, worded
from app.viewmodels.chat_presets import Presets
from app.views.chat.style import GRID
from app.views.icons import icon
from app.views.options_form import OptionsForm
from app.views.trying import attempt
from app.views.widgets import button, column, icon_button, label, row, title

CHANGED = "Changed"
OWN = "the model's own"
SAVE_MS = 300


class SidePanel(QFrame):
    """What the model is told first, and how it picks its words.

    Signals:
        system_changed: the system prompt. sampling_changed: the changed sampling fields.
        failed: a WeftError. noticed: a sentence and the function that takes it back.
        closed: the panel is to be hidden.
    """

    system_changed = Signal(str)
    sampling_changed = Signal(dict)
    failed = Signal(object)
    noticed = Signal(str, object)
    closed = Signal()

    def __init__(self, presets: Presets, parent: QWidget | None = None, *, heading: str = "This chat") -> None:
        super().__init__(parent)
        self.setObjectName("panel")
        self._presets = presets
        self._take_name: Callable[[str], None] | None = None
        self._form: OptionsForm | None = None
        self._served: Collection[str] | None = None
        self._served_reason = ""
        self._values: dict[str, OptionValue] = {}
        self._own: dict[str, OptionValue] = {}
        self.own = label(tone="muted", wrap=True)
        self.own_notes = label(tone="warning", wrap=True)
        self.own.hide()
        self.own_notes.hide()
        self.system = QPlainTextEdit()
        self.system.setAccessibleName("System prompt")
        self.system.setPlaceholderText(
            "What the model is told before the conversation, for example who it is and how it shall answer."
        )
        self.system.setTabChangesFocus(True)
        self.system.setFixedHeight(120)
        self.system.textChanged.connect(self._system_typed)
        self._make_presets()
        self._lay_out(heading)
        self.defaults: tuple[str, dict[str, OptionValue]] = ("", {})
        self._timer = QTimer(self)
        self._timer.setSingleShot(True)
        self._timer.setInterval(SAVE_MS)
        self._timer.timeout.connect(self._report_system)
        self._fill_presets()

    def _make_presets(self) -> None:
        self.preset = QComboBox()
        self.preset.setAccessibleName("Sampling preset")
        self.preset.activated.connect(self._preset_chosen)
        self._more = icon_button("more", "Save, rename or delete presets")
        self._more.clicked.connect(self._preset_menu)
        self.name = QLineEdit()  # in the list's place, while a preset gets its name
        self.name.setAccessibleName("Name of the preset")
        self.name.setPlaceholderText("Name of the preset")
        self.name.setMaxLength(100)
        self.name.installEventFilter(self)
        self.name.hide()

    def _lay_out(self, heading: str) -> None:
        self._reset = button("Reset", tip="Back to the values that new chats begin with", icon_name="undo")
        self._reset.clicked.connect(self._reset_all)
        self._body = QWidget()
        self._body.setObjectName("panelBody")
        self._layout = column(
            title("System prompt", 0),
            self.system,
            title("Preset", 0),
            spacing=GRID,
            margins=(16, 4, 16, 16),
            parent=self._body,
        )
        presets_row = row(self.preset, self.name, self._more, spacing=4)
        presets_row.setStretch(0, 1)
        presets_row.setStretch(1, 1)
        self._layout.addLayout(presets_row)
        self._layout.addWidget(self.own)
        self._layout.addWidget(self.own_notes)
        self._layout.addStretch(1)
        scroll = QScrollArea()
        scroll.setWidgetResizable(True)
        scroll.setFrameShape(QFrame.Shape.NoFrame)
        scroll.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        scroll.setWidget(self._body)
        scroll.setFocusPolicy(Qt.FocusPolicy.NoFocus)
        self._body.setAutoFillBackground(False)
        scroll.viewport().setAutoFillBackground(False)
        close = icon_button("close", "Close the panel")
        close.clicked.connect(self.closed)
        head = row(title(heading, 0), 1, self._reset, close, margins=(16, 8, 8, 8), spacing=4)
        layout = column(spacing=0, parent=self)
        layout.addLayout(head)
        layout.addWidget(scroll, 1)

    # Content ----------------------------------------------------------------------------------------

    def set_values(self, system: str, sampling: dict[str, OptionValue]) -> None:
        """Show a conversation's. Reports nothing."""
        self._timer.stop()
        if system != self.system.toPlainText():
            self.system.blockSignals(True)
            self.system.setPlainText(system)
            self.system.blockSignals(False)
        self._values = dict(sampling)
        if self._form is not None:
            self._form.set_values(sampling)
        self._fill_presets()

    def _set_served(self, served: Collection[str] | None, reason: str) -> None:
        """Which sampling fields the loader serves; None is all."""
        self._served, self._served_reason = served, reason
        if self._form is not None:
            self._form.set_served(served, reason)

    def set_loaded(self, model: ModelEntry | None, loader: Spec | None) -> None:
        """Another model, or another loader: what a chat begins with where nobody chose anything, and which fields there are."""
        self._set_own(model.name if model else "", model.own_sampling if model else OwnSampling())
        self._set_served(loader.sampling if loader else None, f"{loader.title} does not have it." if loader else "")

    def _set_own(self, model: str, own: OwnSampling) -> None:
        """How the model's maker has it answer."""
        values, notes = own.values(), own.notes
        told = f"{model} brings its own: {worded(values)}. They hold until you change them." if values else ""
        if values == self._own and told == self.own.text() and "\n".join(notes) == self.own_notes.text():
            return
        self._own = values
        self.own.setText(told)
        self.own.setVisible(bool(told))
        self.own_notes.setText("\n".join(notes))
        self.own_notes.setVisible(bool(notes))
        if self._form is not None:
            self._form.set_defaults(self._own, OWN)
            self._form.set_values(self._values)
        self._fill_presets()

    def flush(self) -> None:
        """Report a system prompt that waits."""
        if self._timer.isActive():
            self._timer.stop()
            self._report_system()

    @property
    def form(self) -> OptionsForm:
        """The sampling form; built when the panel is first shown, because it is dear."""
        if self._form is None:
            self._form = OptionsForm(
                Sampling,
                served=self._served,
                reason=self._served_reason or "This loader does not have it.",
                parent=self._body,
            )
            self._form.set_defaults(self._own, OWN)
            self._form.set_values(self._values)
            self._form.changed.connect(self._form_changed)
            self._layout.insertWidget(self._layout.count() - 1, self._form)
        return self._form

    def showEvent(self, event: object) -> None:
        super().showEvent(event)  # type: ignore[arg-type]
        _ = self.form

    @Slot()
    def _system_typed(self) -> None:
        self._timer.start()

    @Slot()
    def _report_system(self) -> None:
        self.system_changed.emit(self.system.toPlainText())

    @Slot()
    def _form_changed(self) -> None:
        if not self.form.problems():
            self._values = self.form.values()
            self._fill_presets()
            self.sampling_changed.emit(self._values)

    @Slot()
    def _reset_all(self) -> None:
        system, sampling = self.defaults
        before = (self.system.toPlainText(), dict(self._values))
        self._apply(system, sampling)

        def undo() -> None:
            self._apply(*before)

        if before != (system, sampling):
            self.noticed.emit("System prompt and sampling were reset.", undo)

    def _apply(self, system: str, sampling: dict[str, OptionValue]) -> None:
        self.set_values(system, sampling)
        self.system_changed.emit(system)
        self.sampling_changed.emit(dict(sampling))

    # Presets ----------------------------------------------------------------------------------------

    def _fill_presets(self) -> None:
        self.preset.clear()
        for name, values in self._presets.all().items():
            self.preset.addItem("The model's own" if self._own and not values else name, name)
        found = self._presets.matching(self._values)
        if not found:
            self.preset.addItem(CHANGED, "")
        self.preset.setCurrentIndex(self.preset.findData(found))

    @Slot(int)
    def _preset_chosen(self, _index: int) -> None:
        values = self._presets.all().get(self.preset.currentData())
        if values is not None:
            self.set_values(self.system.toPlainText(), values)
            self.sampling_changed.emit(dict(values))

    @Slot()
    def _preset_menu(self) -> None:
        name = self.preset.currentData()
        own = self._presets.is_own(name)
        menu = QMenu(self)
        menu.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        menu.addAction(icon("plus"), "Save as a preset\N{HORIZONTAL ELLIPSIS}", self._ask_save)
        rename = menu.addAction(
            icon("edit"), f"Rename “{name}”\N{HORIZONTAL ELLIPSIS}" if own else "Rename", self._ask_rename
        )
        delete = menu.addAction(
            icon("trash"), f"Delete “{name}”" if own else "Delete", lambda: self.delete_preset(name)
        )
        rename.setEnabled(own)
        delete.setEnabled(own)
        menu.popup(self._more.mapToGlobal(QPoint(0, self._more.height())))

    @Slot()
    def _ask_save(self) -> None:
        self._ask("", self.save_preset)

    @Slot()
    def _ask_rename(self) -> None:
        old = self.preset.currentData()
        self._ask(old, lambda new: self.rename_preset(old, new))

    def _ask(self, text: str, take: Callable[[str], None]) -> None:
        """Have a name typed in the list's place: Enter takes it, Esc or going elsewhere does not."""
        self._take_name = take
        self.name.setText(text)
        self.preset.hide()
        self.name.show()
        self.name.setFocus()
        self.name.selectAll()

    def _asked(self, taken: bool) -> None:
        take, self._take_name = self._take_name, None
        name = " ".join(self.name.text().split())
        self.name.hide()
        self.preset.show()
        if take is not None and taken and name:
            take(name)

    def eventFilter(self, watched: QObject, event: QEvent) -> bool:
        if watched is self.name and self._take_name is not None:
            if isinstance(event, QKeyEvent) and event.type() == QEvent.Type.KeyPress:
                if event.key() in (Qt.Key.Key_Return, Qt.Key.Key_Enter, Qt.Key.Key_Escape):
                    self._asked(event.key() != Qt.Key.Key_Escape)
                    self.preset.setFocus()
                    return True
            elif event.type() == QEvent.Type.FocusOut and self.window().isActiveWindow():
                self._asked(False)
        return super().eventFilter(watched, event)

    def save_preset(self, name: str) -> None:
        """Keep the present values under this name."""
        self._try(lambda: self._presets.save(name, self._values))

    def rename_preset(self, old: str, new: str) -> None:
        self._try(lambda: self._presets.rename(old, new))

    def delete_preset(self, name: str) -> None:
        """Forget an own preset, with undo."""

        def delete() -> None:
            values = self._presets.delete(name)
            self.noticed.emit(
                f"The preset “{name}” was deleted.", lambda: self._try(lambda: self._presets.save(name, values))
            )

        self._try(delete)

    def _try(self, change: Callable[[], object]) -> None:
        attempt(change, self.failed)
        self._fill_presets()
