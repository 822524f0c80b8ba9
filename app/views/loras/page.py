"""The LoRAs page: what is a page's own about adapters: importing, using, combining, converting, comparing them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from PySide6.QtCore import QItemSelection, Signal, Slot
from PySide6.QtWidgets import QMenu, QPushButton, QWidget

from app.core.library import AdapterEntry, AdapterFormat, ModelEntry
from app.core.paths import resources
from app.core.stack import AdapterStack, StackedAdapter
from app.store.database import Database
from app.store.library import LibraryStore
from app.viewmodels.adapter_details import AdapterStudy
from app.viewmodels.adapter_facts import files_of
from app.viewmodels.adapter_import import AdapterImports, can_import
from app.viewmodels.adapter_jobs import AdapterJobs
from app.viewmodels.adapter_stack import StackModel
from app.viewmodels.adapter_table import AdapterTable
from app.viewmodels.library_roots import LibraryRoots
from app.viewmodels.loadout import Loadout
from app.viewmodels.model_files import trash_files
from app.viewmodels.model_table import ModelTable
from app.viewmodels.saved_stacks import SavedStacks
from app.views.icons import icon
from app.views.library.page import LibraryPage, Words
from app.views.loras.arrivals import Arrivals
from app.views.loras.details import AdapterDetails
from app.views.loras.making import Making
from app.views.loras.results import Results
from app.views.loras.table import AdapterView
from app.views.loras.using import Using
from app.views.model_picker import ModelPicker
from app.views.page import PaletteCommand
from app.views.saved_stacks_menu import fill_saved_stacks
from app.views.widgets import button

_WORDS = Words(
    title="LoRAs",
    many="adapters",
    icon="loras",
    empty="Drop a LoRA's folder, .safetensors, .gguf or .zip here, one or many. They are copied into Weft's own folder.",
    nothing="No adapter has all of these words in its name, kind, base or targets.",
)
_FILES = "Adapters (*.safetensors *.gguf *.bin *.pt *.zip *.tar *.tar.gz *.tgz *.tar.bz2 *.tar.xz)"
_SIDE = 384


class LorasPage(LibraryPage[AdapterEntry, AdapterTable, AdapterDetails]):
    """Every adapter of the library.

    Args:
        refresh: looks at the disk again. make_models: a table of models, to pick one from.

    Signals:
        compare_wanted(AdapterStack): compare these with the base. export_wanted(ModelEntry or None, AdapterStack): merge and export.
    """

    compare_wanted = Signal(object)
    export_wanted = Signal(object, object)

    def __init__(
        self,
        *,
        library: LibraryStore,
        database: Database,
        loadout: Loadout,
        stack: StackModel,
        saved: SavedStacks,
        imports: AdapterImports,
        jobs: AdapterJobs,
        study: AdapterStudy,
        roots: LibraryRoots,
        make_models: Callable[[], ModelTable],
        refresh: Callable[[], None],
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(_WORDS, refresh, parent)
        self._library, self._loadout, self._roots = library, loadout, roots
        self._stack_model, self._saved, self._imports, self._study = stack, saved, imports, study
        self._make_models = make_models
        self._loaded_id = ""
        self._wanted_path = ""  # of an adapter that is to be shown as soon as it is indexed
        self._picker_model: ModelTable | None = None
        self.results = Results()
        self._arrivals = Arrivals(imports, self.results, self)
        self._making = Making(self, self.results, jobs, stack, library, database)
        table = AdapterTable(library, database, parent=self)
        details = AdapterDetails(study=study, loadout=loadout, make_menu=self.make_menu, stacked=stack.holds)
        self._using = Using(loadout, stack, details, self)
        add = button("Add adapters…", self._add_files, kind="primary", icon_name="plus")
        tools, notes = self._tools(), (self.results,)
        self._assemble(table, AdapterView(), details, tools=tools, add=add, notes=notes, side=_SIDE)
        self._connect_parts()
        self._stack_changed()
        self.table.refresh()
        self._select_row(0)

    def _tools(self) -> tuple[QPushButton, ...]:
        self.combine = button("Combine…", self.combine_selected, tip="Make one adapter of several")
        self.stacks = button("Stacks", tip="Saved stacks: put one on, rename, delete")
        stacks_menu = QMenu(self)
        stacks_menu.setToolTipsVisible(True)
        stacks_menu.aboutToShow.connect(self._fill_stacks)
        self.stacks.setMenu(stacks_menu)
        add = button("Add", icon_name="plus", tip="Add adapters: folders, files or archives")
        menu = QMenu(self)
        menu.addAction(icon("plus"), "Files or archives…", self._add_files)
        menu.addAction(icon("folder-add"), "Folder of adapters…", self._add_folder)
        menu.addSeparator()
        menu.addAction(icon("copy"), "Find duplicates", self.find_duplicates)
        add.setMenu(menu)
        return self.combine, self.stacks, add

    def _connect_parts(self) -> None:
        self.view.selectionModel().selectionChanged.connect(self._selection_changed)
        self.table.counted.connect(self._adapters_counted)
        self.details.use_wanted.connect(self._using.use)
        self.details.use_with.connect(self._using.use_with)
        self.details.alpha_wanted.connect(self._ask_alpha)
        self.details.compare_wanted.connect(self._compare)
        self.details.other_model_wanted.connect(self.pick_model)
        self._using.notice.connect(self.notice)
        self._using.alpha_wanted.connect(self._ask_alpha)
        self._arrivals.show_wanted.connect(self.show_adapter)
        self._making.failed.connect(self.failed)
        self._making.sheet_wanted.connect(self._show)
        self._making.show_wanted.connect(self.show_adapter)
        self._making.coming.connect(self._expect)
        self._stack_model.changed.connect(self._stack_changed)
        self._loadout.changed.connect(self._loadout_changed)

    @Slot()
    def _fill_stacks(self) -> None:
        menu = self.stacks.menu()
        if menu is not None:
            menu.clear()
            fill_saved_stacks(menu, self._saved, self._stack_model, self, notice=self.notice.emit)

    # What the window asks ---------------------------------------------------------------------------

    def accepts(self, paths: list[Path]) -> bool:
        return can_import(paths)

    def take(self, paths: list[Path]) -> None:
        """Copy dropped adapters into the library."""
        self._imports.add(paths)

    def commands(self) -> list[PaletteCommand]:
        return [
            PaletteCommand(title="Add adapters…", group="LoRAs", icon="plus", run=self._add_files),
            PaletteCommand(title="Add a folder of adapters…", group="LoRAs", icon="folder-add", run=self._add_folder),
            PaletteCommand(title="Find duplicate adapters", group="LoRAs", icon="copy", run=self.find_duplicates),
            PaletteCommand(title="Combine adapters…", group="LoRAs", icon="loras", run=self.combine_selected),
        ]

    @Slot()
    def library_changed(self) -> None:
        """The index holds something else now."""
        self.table.library_changed()
        self._study.library_changed()
        if self._wanted_path and self.table.row_of(self._wanted_path) >= 0:
            self.show_adapter(self._wanted_path)

    @Slot(str)
    def show_adapter(self, adapter: str) -> None:
        """Select an adapter and show its details, as soon as it is in the index."""
        self._wanted_path = "" if self.show_id(adapter) else adapter

    def shutdown(self) -> None:
        self.table.close()
        self._making.close()
        self._study.close()
        super().shutdown()

    # What changes -----------------------------------------------------------------------------------

    @Slot(QItemSelection, QItemSelection)
    def _selection_changed(self, *_: object) -> None:
        count = len(self.view.selectionModel().selectedRows())
        self.combine.setText(f"Combine {count}…" if count > 1 else "Combine…")

    @Slot(int, int)
    def _adapters_counted(self, _shown: int, total: int) -> None:
        self.combine.setEnabled(total > 0)

    @Slot()
    def _stack_changed(self) -> None:
        self.table.set_stacked(frozenset(entry.path for entry in self._stack_model.entries))
        self.details.refresh_actions()

    @Slot()
    def _loadout_changed(self) -> None:
        now = self._loadout.model
        loaded = now.id if now is not None else ""
        if loaded != self._loaded_id:
            self._loaded_id = loaded
            self.details.refresh_models()

    @Slot(str)
    def _expect(self, adapter: str) -> None:
        self._wanted_path = adapter

    # Using ------------------------------------------------------------------------------------------

    @Slot()
    def _use_current(self) -> None:
        entry = self.selected
        if entry is not None and not self._stack_model.holds(entry.path):
            self.use(entry)

    def use(self, entry: AdapterEntry) -> None:
        """Add it to the stack of the loaded model, or offer the models that it fits; take it out when it is in."""
        self._using.use(entry)

    @Slot()
    def pick_model(self) -> ModelPicker:
        """Choose a model of the library to hold the adapter against."""
        if self._picker_model is None:
            self._picker_model = self._make_models()
        popup = ModelPicker(self._picker_model, self.window())
        popup.picked.connect(self.details.hold_against)
        popup.more.connect(self._show_models)
        popup.open_below(self.details.other)
        return popup

    @Slot()
    def _show_models(self) -> None:
        self.page_wanted.emit("models")

    # Making -----------------------------------------------------------------------------------------

    @Slot()
    def combine_selected(self) -> None:
        """Combine what is selected; when that is one, with what is in the stack."""
        self._making.combine(self.chosen)

    def resize_rank(self, entry: AdapterEntry) -> None:
        """Bring an adapter to another rank."""
        self._making.resize_rank(entry)

    def convert(self, entry: AdapterEntry) -> None:
        """To GGUF, or from GGUF to PEFT."""
        self._making.convert(entry, self._fitting(entry))

    @Slot()
    def find_duplicates(self) -> None:
        """Look for adapters that hold the same tensors."""
        self._making.find_duplicates()

    def _fitting(self, entry: AdapterEntry) -> list[ModelEntry]:
        return [each.model for each in self.details.ranked_for(entry)]

    @Slot(object)
    def _compare(self, entry: AdapterEntry) -> None:
        self.compare_wanted.emit(_alone(entry))

    def _export(self, entry: AdapterEntry) -> None:
        loaded, fits = self._loadout.model, self._fitting(entry)
        model = loaded if loaded is not None and any(each.id == loaded.id for each in fits) else None
        self.export_wanted.emit(model or (fits[0] if fits else loaded), _alone(entry))

    # What can be done with an adapter ---------------------------------------------------------------

    def _add_uses(self, menu: QMenu, entry: AdapterEntry) -> None:
        stacked = self._stack_model.holds(entry.path)
        mark, text = ("minus", "Take out") if stacked else ("plus", "Use")
        use = menu.addAction(icon(mark), text, lambda: self.use(entry))
        use.setShortcut("Return")
        back = entry.format is AdapterFormat.GGUF
        combine = menu.addAction("Combine…", self.combine_selected)
        resize = menu.addAction("Change the rank…", lambda: self.resize_rank(entry))
        convert = menu.addAction("Convert to PEFT…" if back else "Convert to GGUF…", lambda: self.convert(entry))
        compare = menu.addAction(icon("compare"), "Compare with base", lambda: self._compare(entry))
        export = menu.addAction(icon("export"), "Merge and export…", lambda: self._export(entry))
        usable = not entry.problem and not entry.needs_alpha
        for each in (use, combine, resize, convert, compare, export):
            each.setEnabled(usable)
            each.setToolTip("" if usable else entry.problem or "Its alpha is not recorded: say it first.")
        menu.addSeparator()

    def _store_name(self, entry: AdapterEntry, name: str) -> None:
        self._library.rename_adapter(entry.id, name)

    def _trash_refusal(self, entry: AdapterEntry) -> str:
        if resources() in Path(entry.path).parents:
            return "It belongs to Weft itself, and is only read here."
        if self._stack_model.holds(entry.path):
            return "It is in the stack. Take it out first."
        return ""

    def _files_of(self, entry: AdapterEntry) -> list[Path]:
        return files_of(entry)

    def _is_own(self, path: Path) -> bool:
        return self._imports.folder in path.parents or self._roots.is_own(path)

    def _mover(self, entries: Sequence[AdapterEntry]) -> Callable[[], Callable[[], None] | None]:
        files = [path for entry in entries for path in files_of(entry)]
        return lambda: trash_files(files)

    # Adding -----------------------------------------------------------------------------------------

    @Slot(object)
    def _ask_alpha(self, entry: AdapterEntry) -> None:
        self._imports.ask_alpha(Path(entry.path), entry.rank)

    @Slot()
    def _add_folder(self) -> None:
        self._choose("Add a folder of adapters")

    @Slot()
    def _add_files(self) -> None:
        self._choose("Add adapters", _FILES)


def _alone(entry: AdapterEntry) -> AdapterStack:
    return AdapterStack(adapters=(StackedAdapter(path=entry.path, name=entry.name),))
