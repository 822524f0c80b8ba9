"""The loadout bar: the model, its loader, what it is doing, the memory it takes, and the eject button."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PySide6.QtCore import QSize, Qt, Signal, Slot
from PySide6.QtGui import QDragEnterEvent, QDropEvent, QFontMetrics, QResizeEvent
from PySide6.QtWidgets import (
    QFrame,
    QHBoxLayout,
    QMenu,
    QProgressBar,
    QPushButton,
    QSizePolicy,
    QToolTip,
    QVBoxLayout,
    QWidget,
)

from app import backends
from app.core.jobs import Progress
from app.core.library import ModelEntry
from app.core.memory import Machine
from app.viewmodels.adapter_stack import StackModel
from app.viewmodels.jobs import JobCenter, progress_text
from app.viewmodels.loadout import Loadout, LoadoutState
from app.viewmodels.model_table import ModelTable
from app.viewmodels.units import readable_bytes
from app.views.icons import icon
from app.views.model_picker import ModelPicker
from app.views.stack_bar import StackBar
from app.views.widgets import (
    Banner,
    Chip,
    ElidedLabel,
    IconLabel,
    action,
    button,
    column,
    icon_button,
    label,
    local_paths,
    row,
)

WAITING = (LoadoutState.STARTING, LoadoutState.LOADING)


class PickerButton(QPushButton):
    """Shows the model's name, shortened in the middle, and opens the picker."""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._full = ""
        self.setProperty("kind", "picker")
        self.setIcon(icon("models", "muted"))
        self.setIconSize(QSize(20, 20))
        self.setMinimumWidth(160)
        self.setMaximumWidth(400)
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        self.setAutoDefault(False)
        column_ = row(1, IconLabel("chevron-down", 16), margins=(0, 0, 8, 0))
        self.setLayout(column_)

    def sizeHint(self) -> QSize:
        return QSize(320, super().sizeHint().height())

    def set_name(self, name: str) -> None:
        self._full = name
        self.setAccessibleName(f"Model: {name}")
        self.setToolTip(f"{name}\nChoose a model (Ctrl+L)")
        self._elide()

    def resizeEvent(self, event: QResizeEvent) -> None:
        super().resizeEvent(event)
        self._elide()

    def _elide(self) -> None:
        room = self.width() - 72
        # A lone & would become a mnemonic.
        text = QFontMetrics(self.font()).elidedText(self._full, Qt.TextElideMode.ElideMiddle, room)
        self.setText(text.replace("&", "&&"))


class LoadoutBar(QWidget):
    """Runs along the top of the pages that use the loaded model.

    Args:
        stack: of the loaded model; None makes one. dropped: takes what is dropped here, into the library and the stack.
        fill_menu: adds saved stacks to the menu of the chips.

    Signals:
        models_wanted: the Models page was asked for. jobs_wanted: the Jobs page.
        options_wanted(ModelEntry): the model's options were asked for.
    """

    models_wanted = Signal()
    jobs_wanted = Signal()
    options_wanted = Signal(object)
    export_wanted = Signal()

    def __init__(
        self,
        *,
        loadout: Loadout,
        jobs: JobCenter,
        make_table: Callable[[], ModelTable],
        machine: Callable[[], Machine],
        stack: StackModel | None = None,
        dropped: Callable[[list[Path]], object] | None = None,
        fill_menu: Callable[[QMenu, QWidget], object] | None = None,
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(parent)
        self._loadout = loadout
        self._jobs = jobs
        self._make_table = make_table
        self._machine = machine
        self._picker_model: ModelTable | None = None
        self._dropped = dropped
        self._banner: Banner | None = None
        self.setSizePolicy(QSizePolicy.Policy.Preferred, QSizePolicy.Policy.Fixed)
        self.setAcceptDrops(True)
        if stack is None:
            stack = StackModel(loadout, self)
            stack.refused.connect(loadout.notice)
        self.stack = stack
        self.stack_bar = StackBar(self.stack, fill_menu=fill_menu)
        bar = QFrame()
        bar.setObjectName("bar")
        bar.setFixedHeight(56)
        line = row(margins=(16, 0, 8, 0), spacing=8, parent=bar)
        self._add_model(line)
        self._add_state(line)
        self._add_actions(line)
        self._column: QVBoxLayout = column(bar, self.stack_bar, spacing=0, parent=self)
        action(self, "Choose a model", self.open_picker, "Ctrl+L")
        loadout.changed.connect(self.refresh)
        jobs.changed.connect(self._show_preparation)
        jobs.progressed.connect(self._show_preparation)
        self.refresh()
        self._show_preparation()

    # Building ---------------------------------------------------------------------------------------

    def _add_model(self, line: QHBoxLayout) -> None:
        """Which model, and what runs it."""
        self.picker = PickerButton()
        self.picker.clicked.connect(self.open_picker)
        self.loader = button("", self._open_loaders, kind="link", tip="The loader that runs this model")
        self.loader.setAccessibleName("Loader")
        line.addWidget(self.picker, 3)
        line.addWidget(self.loader)

    def _add_state(self, line: QHBoxLayout) -> None:
        """What it is doing, and the memory that it takes."""
        self.chip = Chip()
        self.bar = QProgressBar()
        self.bar.setTextVisible(False)
        self.bar.setFixedWidth(120)
        self.note = icon_button("info", "Notes about this load", self._show_notes)
        self.note.setIconSize(QSize(16, 16))
        self.state = ElidedLabel()
        self.state.setProperty("tone", "muted")
        self.state.setMinimumWidth(40)
        self.memory_icon = IconLabel("memory", 16)
        self.memory = label(tone="muted")
        for widget in (self.chip, self.bar, self.note):
            line.addWidget(widget)
        line.addWidget(self.state, 4)
        line.addWidget(self.memory_icon)
        line.addWidget(self.memory)

    def _add_actions(self, line: QHBoxLayout) -> None:
        """What can be done about it; `refresh` shows what makes sense."""
        now = self._loadout
        self.load = button("Load", self._load, kind="primary")
        self.cancel = button("Cancel", now.cancel_load)
        self.end = button("End it", now.end_engine, kind="danger", tip="End the engine that does not answer")
        self.options = icon_button("settings", "Options of this model", self._open_options)
        self.export = icon_button("export", "Merge and export", self.export_wanted.emit)
        self.reload = icon_button("reload", "Load the model again", self._reload)
        self.eject = icon_button("eject", "Eject the model and give its memory back", now.unload)
        for made in (self.load, self.cancel, self.end, self.options, self.export, self.reload, self.eject):
            line.addWidget(made)

    # Showing ----------------------------------------------------------------------------------------

    @Slot()
    def refresh(self) -> None:
        """Show the loadout as it is."""
        now = self._loadout
        model = now.model
        self.picker.set_name(model.name if model is not None else "Choose a model")
        loader = now.loader
        self.loader.setText(loader.title if loader is not None else "")
        self.loader.setVisible(loader is not None)
        self.stack_bar.setVisible(self.stack.shown)
        loading = now.state in WAITING
        self.bar.setVisible(loading)
        if loading:
            self._show_progress(now.load_progress)
        text, tone = self._words()
        self.state.setText(text)
        self.chip.set(*tone)
        known = now.is_loaded and now.memory > 0
        self.memory.setVisible(known)
        self.memory_icon.setVisible(known)
        if known:
            here = self._machine()
            self.memory.setText(readable_bytes(now.memory))
            self.memory.setToolTip(
                f"The model takes {readable_bytes(now.memory)}, measured. {readable_bytes(here.ram_free)} of "
                f"{readable_bytes(here.ram_total)} main memory is free."
            )
        notes = now.loaded.notes if now.loaded is not None else ()
        self.note.setVisible(bool(notes))
        self.note.setToolTip("\n".join(notes))
        self.note.setAccessibleDescription(" ".join(notes))
        self.load.setVisible(model is not None and now.state in (LoadoutState.EMPTY, LoadoutState.FAILED))
        self.chip.setToolTip(str(now.error) if now.state is LoadoutState.FAILED and now.error is not None else "")
        self.cancel.setVisible(loading)
        self.end.setVisible(now.state is LoadoutState.UNRESPONSIVE)
        self.options.setVisible(model is not None)
        self.export.setVisible(model is not None and not model.problem)
        self.reload.setVisible(now.is_loaded)
        self.eject.setVisible(now.is_loaded or now.state is LoadoutState.FAILED)

    def _words(self) -> tuple[str, tuple[str, str]]:
        now = self._loadout
        match now.state:
            case LoadoutState.STARTING | LoadoutState.LOADING:
                return progress_text(now.load_progress), ("", "plain")
            case LoadoutState.READY | LoadoutState.BUSY:
                loaded = now.loaded
                device = f"{loaded.device} · " if loaded is not None and loaded.device else ""
                word = ("Answering", "plain") if now.state is LoadoutState.BUSY else ("Ready", "positive")
                return f"{device}{now.context:,} tokens of context", word
            case LoadoutState.UNRESPONSIVE:
                return "The engine has not answered for a while. It may recover.", ("Not answering", "warning")
            case LoadoutState.FAILED:
                # Why is told where it happened: in a dialog, or in the answer that broke off.
                return "", ("Not loaded", "negative")
            case _:
                return ("Not loaded" if now.model is not None else "", ("", "plain"))

    def _show_progress(self, progress: Progress | None) -> None:
        fraction = progress.fraction if progress is not None else None
        if fraction is None:
            self.bar.setRange(0, 0)
        else:
            self.bar.setRange(0, 1000)
            self.bar.setValue(round(1000 * fraction))

    @Slot()
    def _show_preparation(self, *_: object) -> None:
        """The slim banner while an engine environment is being made."""
        running = self._jobs.running
        if running is None:
            if self._banner is not None:
                self._banner.hide()
            return
        if self._banner is None:
            self._banner = Banner("info", slim=True)
            self._banner.add(button("Show", self.jobs_wanted.emit, kind="link"))
            self._column.addWidget(self._banner)
        self._banner.show()
        progress = running.progress
        fraction = progress.fraction if progress is not None else None
        percent = f" {round(100 * fraction)} %" if fraction is not None else ""
        detail = progress_text(progress, running.pace.left(progress)) if progress is not None else ""
        self._banner.text.setText(f"Weft is preparing its engine ({self._jobs.title(running.environment)}) …{percent}")
        self._banner.setToolTip(detail)
        self._banner.bar.setVisible(True)
        self._banner.bar.setRange(0, 1000 if fraction is not None else 0)
        if fraction is not None:
            self._banner.bar.setValue(round(1000 * fraction))

    # Drops ------------------------------------------------------------------------------------------

    def dragEnterEvent(self, event: QDragEnterEvent) -> None:
        if local_paths(event.mimeData().urls()) and (self.stack.shown or self._loadout.model is not None):
            event.acceptProposedAction()

    def dropEvent(self, event: QDropEvent) -> None:
        paths = local_paths(event.mimeData().urls())
        if self._dropped is not None:
            self._dropped(paths)
        else:
            for path in paths:
                self.stack.add(path)
        event.acceptProposedAction()

    # Doing ------------------------------------------------------------------------------------------

    def open_picker(self) -> ModelPicker:
        """Open the list of models under the picker's button."""
        if self._picker_model is None:
            self._picker_model = self._make_table()
        popup = ModelPicker(self._picker_model, self.window())
        popup.picked.connect(self._picked)
        popup.more.connect(self.models_wanted)
        popup.open_below(self.picker)
        return popup

    @Slot(object)
    def _picked(self, entry: ModelEntry) -> None:
        now = self._loadout
        if not (now.is_loaded and now.model is not None and now.model.id == entry.id):
            now.select(entry)

    def _load(self) -> None:
        if self._loadout.state is LoadoutState.FAILED:
            self._loadout.load_again()
        elif self._loadout.model is not None:
            self._loadout.load(self._loadout.model)

    def _show_notes(self) -> None:
        QToolTip.showText(self.note.mapToGlobal(self.note.rect().bottomLeft()), self.note.toolTip(), self.note)

    def _reload(self) -> None:
        self._loadout.reload()

    def _open_options(self) -> None:
        if self._loadout.model is not None:
            self.options_wanted.emit(self._loadout.model)

    def _open_loaders(self) -> None:
        model = self._loadout.model
        if model is None:
            return
        menu = QMenu(self)
        menu.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        menu.setToolTipsVisible(True)
        cuda = bool(self._machine().gpus)
        for spec in backends.specs().values():
            reason = backends.refusal(spec, model, cuda=cuda)
            entry = menu.addAction(spec.title)
            entry.setCheckable(True)
            entry.setChecked(self._loadout.loader is not None and spec.id == self._loadout.loader.id)
            entry.setEnabled(not reason)
            entry.setToolTip(reason or spec.summary)
            entry.triggered.connect(lambda _=False, chosen=spec.id: self._loadout.load(model, chosen))
        menu.popup(self.loader.mapToGlobal(self.loader.rect().bottomLeft()))
