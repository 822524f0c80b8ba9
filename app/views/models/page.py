"""The Models page: what is a page's own about models: loading, adding where they lie, training and exporting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from PySide6.QtCore import Signal, Slot
from PySide6.QtWidgets import QCheckBox, QMenu, QPushButton, QWidget

from app.core.library import AdapterEntry, ModelEntry
from app.store.library import LibraryStore
from app.store.model_settings import ModelSettings
from app.viewmodels.fitting import judge
from app.viewmodels.library_roots import LibraryRoots
from app.viewmodels.loadout import Loadout
from app.viewmodels.machine_watch import MachineWatch
from app.viewmodels.model_files import files_of, move_to_trash, trash_refusal
from app.viewmodels.model_table import ModelTable
from app.viewmodels.settings import SettingsView
from app.views.adding import Adding
from app.views.icons import icon
from app.views.library.page import LibraryPage, Words
from app.views.models.details import ModelDetails
from app.views.models.table import ModelView
from app.views.page import Notice, PaletteCommand
from app.views.widgets import button

_WORDS = Words(
    title="Models",
    many="models",
    icon="models",
    empty="Drop a .gguf file or a model's folder here, or add the folder where yours lie. They stay where they are.",
    nothing="No model has all of these words in its name, format or folder.",
)


class ModelsPage(LibraryPage[ModelEntry, ModelTable, ModelDetails]):
    """Every model of the library.

    Args:
        refresh: looks at the disk again. adapters: those that fit a model, see `ModelDetails`.

    Signals:
        code_wanted(ModelEntry): the files that would run are to be shown. export_wanted, certificate_wanted, train_wanted(ModelEntry).
    """

    code_wanted = Signal(object)
    dropped: Callable[[list[Path]], bool] = staticmethod(lambda _: False)  # takes drops, to tell adapters from models
    export_wanted = Signal(object)
    certificate_wanted = Signal(object)
    train_wanted = Signal(object)

    def __init__(
        self,
        *,
        library: LibraryStore,
        loadout: Loadout,
        model_settings: ModelSettings,
        settings: SettingsView,
        roots: LibraryRoots,
        machine: MachineWatch,
        refresh: Callable[[], None],
        adapters: Callable[[ModelEntry], list[tuple[AdapterEntry, int, int]]] | None = None,
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(_WORDS, refresh, parent)
        self._library, self._loadout, self._roots = library, loadout, roots
        self._settings, self._machine = settings, machine
        self._loaded_id = ""
        self._adding = Adding(roots, self)
        self._adding.notice.connect(self.notice)
        self._adding.failed.connect(self.failed)
        table = ModelTable(
            library,
            fitting=lambda entry: judge(entry, machine.now()),
            loaded=lambda: loadout.model.id if loadout.is_loaded and loadout.model is not None else "",
            parent=self,
        )
        details = ModelDetails(
            loadout=loadout,
            model_settings=model_settings,
            machine=machine.now,
            make_menu=self.make_menu,
            show_advanced=settings.now.show_advanced,
            adapters=adapters,
        )
        add = button("Add a folder…", self._add_folder, kind="primary", icon_name="folder-add")
        self._assemble(table, ModelView(), details, tools=self._tools(), add=add)
        details.failed.connect(self.failed)
        details.code_wanted.connect(self.code_wanted)
        loadout.changed.connect(self._loadout_changed)
        machine.changed.connect(self._machine_changed)
        settings.changed.connect(self._setting_changed)
        self.table.refresh()
        self._select_row(0)

    def _tools(self) -> tuple[QCheckBox, QPushButton]:
        self.autoload = QCheckBox("Autoload")
        self.autoload.setToolTip("Load a model as soon as it is picked from the bar above. Off: Load loads it.")
        self.autoload.setAccessibleDescription(self.autoload.toolTip())
        self.autoload.setChecked(self._settings.now.autoload)
        self.autoload.toggled.connect(self._autoload_toggled)
        add = button("Add", icon_name="plus", tip="Add a model's file or a folder of models")
        menu = QMenu(self)
        menu.addAction(icon("folder-add"), "Folder of models…", self._add_folder)
        menu.addAction(icon("plus"), "Model file (.gguf)…", self._add_file)
        add.setMenu(menu)
        return self.autoload, add

    # What the window asks ---------------------------------------------------------------------------

    def accepts(self, paths: list[Path]) -> bool:
        return self._roots.can_add(paths)

    def take(self, paths: list[Path]) -> None:
        """Add dropped files and folders to the library, where they lie."""
        self._adding.take(paths)

    def _take_dropped(self, paths: list[Path]) -> None:
        if not self.dropped(paths):
            self.take(paths)

    def commands(self) -> list[PaletteCommand]:
        return [
            PaletteCommand(title="Add a folder of models…", group="Models", icon="folder-add", run=self._add_folder),
            PaletteCommand(title="Add a model file…", group="Models", icon="plus", run=self._add_file),
            PaletteCommand(
                title="Refresh the library", group="Models", icon="reload", run=self._refresh, shortcut="F5"
            ),
        ]

    @Slot()
    def library_changed(self) -> None:
        """The index holds something else now."""
        self.table.refresh()

    def show_model(self, model: str) -> None:
        """Select a model and show its details."""
        self.show_id(model)

    def code_decided(self) -> None:
        self.details.code_decided()

    def shutdown(self) -> None:
        self.details.shutdown()
        self._adding.close()
        super().shutdown()

    # What changes elsewhere -------------------------------------------------------------------------

    @Slot()
    def _loadout_changed(self) -> None:
        now = self._loadout
        loaded = now.model.id if now.is_loaded and now.model is not None else ""
        if loaded != self._loaded_id:
            self._loaded_id = loaded
            self.table.loaded_changed()

    @Slot()
    def _machine_changed(self) -> None:
        if self.isVisible():
            self.table.machine_changed()
            self.details.refresh_estimate()

    @Slot(bool)
    def _autoload_toggled(self, on: bool) -> None:
        if not self._settings.set("autoload", on):
            self.autoload.setChecked(self._settings.now.autoload)

    @Slot(str)
    def _setting_changed(self, name: str) -> None:
        if name == "autoload":
            self.autoload.setChecked(self._settings.now.autoload)
        elif name == "show_advanced":
            self.details.set_show_advanced(self._settings.now.show_advanced)

    # Loading ----------------------------------------------------------------------------------------

    @Slot()
    def load_selected(self) -> None:
        if self.selected is not None:
            if self.details.entry is None or self.details.entry.id != self.selected.id:
                self.details.show_entry(self.selected)
            self.details.load()

    @Slot()
    def _use_current(self) -> None:
        """Load it; a model that runs with these very options is not read a second time."""
        if self.selected is not None and self._loaded_id == self.selected.id and not self.details.differs:
            text = f"{self.selected.name} is loaded already. Reload reads it anew."
            self.notice.emit(Notice(text=text))
        else:
            self.load_selected()

    def _is_loaded(self, entry: ModelEntry) -> bool:
        now = self._loadout
        return now.is_loaded and now.model is not None and now.model.id == entry.id

    # What can be done with a model ------------------------------------------------------------------

    def _add_uses(self, menu: QMenu, entry: ModelEntry) -> None:
        loaded = self._is_loaded(entry)
        if loaded:
            menu.addAction(icon("eject"), "Unload", self._loadout.unload)
        load = menu.addAction(icon("load"), "Reload" if loaded else "Load", self.load_selected)
        load.setShortcut("Return")
        load.setEnabled(not entry.problem)
        load.setToolTip(entry.problem)
        menu.addSeparator()
        menu.addAction(icon("train"), "Train on this…", lambda: self.train_wanted.emit(entry))
        menu.addAction(icon("export"), "Merge and export…", lambda: self.export_wanted.emit(entry))
        certificate = menu.addAction(icon("done"), "Certificate…", lambda: self.certificate_wanted.emit(entry))
        certificate.setToolTip("How far it is from what it was merged or exported from, if Weft made it")

    def _store_name(self, entry: ModelEntry, name: str) -> None:
        self._library.rename_model(entry.id, name)

    def _trash_refusal(self, entry: ModelEntry) -> str:
        return trash_refusal(entry, loaded=self._is_loaded(entry))

    def _files_of(self, entry: ModelEntry) -> list[Path]:
        return files_of(entry)

    def _is_own(self, path: Path) -> bool:
        return self._roots.is_own(path)

    def _mover(self, entries: Sequence[ModelEntry]) -> Callable[[], Callable[[], None] | None]:
        (entry,) = entries  # one is selected at a time
        return lambda: move_to_trash(entry)

    # Adding -----------------------------------------------------------------------------------------

    @Slot()
    def _add_folder(self) -> None:
        self._choose("Add a folder of models")

    @Slot()
    def _add_file(self) -> None:
        self._choose("Add a model file", "Models (*.gguf *.safetensors)")
