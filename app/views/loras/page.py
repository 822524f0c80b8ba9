"""The LoRAs page: filter, table and details; adding, using, combining, converting, renaming and removing adapters."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from PySide6.QtCore import QItemSelection, QModelIndex, QPoint, Qt, QTimer, Slot
from PySide6.QtGui import QDragEnterEvent, QDropEvent, QKeySequence, QShortcut
from PySide6.QtWidgets import QDialog, QFileDialog, QFrame, QLineEdit, QMenu, QSplitter, QStackedWidget, QWidget

from app.core.adapter_import import ImportResult, Outcome
from app.core.library import AdapterEntry, ModelEntry
from app.core.stack import AdapterStack, StackedAdapter
from app.store.database import Database
from app.store.library import LibraryStore
from app.viewmodels.adapter_details import AdapterStudy
from app.viewmodels.adapter_import import AdapterImports, Imported, can_import, given, summary, words
from app.viewmodels.adapter_jobs import AdapterJobs
from app.viewmodels.adapter_stack import StackModel
from app.viewmodels.adapter_table import AdapterTable
from app.viewmodels.background import Background
from app.viewmodels.library_roots import LibraryRoots
from app.viewmodels.library_table import EntryRole
from app.viewmodels.loadout import Loadout
from app.viewmodels.model_table import ModelTable
from app.viewmodels.saved_stacks import SavedStacks
from app.views.icons import icon
from app.views.loras.details import AdapterDetails
from app.views.loras.keeping import KeepingPage
from app.views.loras.results import Line, Results
from app.views.loras.table import AdapterView
from app.views.model_picker import ModelPicker
from app.views.page import Notice, PaletteCommand
from app.views.saved_stacks_menu import fill_saved_stacks
from app.views.widgets import EmptyState, button, column, icon_button, label, local_paths, row, title

FILTER_MS = 80


class LorasPage(KeepingPage):
    """Every adapter of the library.

    Args:
        refresh: looks at the disk again. make_models: a table of models, to pick one from.
    """

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
        super().__init__(parent)
        self._library = library
        self._database = database
        self._loadout = loadout
        self._stack_model = stack
        self._saved = saved
        self._imports = imports
        self._jobs = jobs
        self._study = study
        self._make_models = make_models
        self._roots = roots
        self._refresh = refresh
        self._selected = ""
        self._loaded_id = ""
        self._wanted_path = ""  # of an adapter that is to be shown as soon as it is indexed
        self._dialog: QDialog | None = None
        self._picker_model: ModelTable | None = None
        self._background = Background(self)
        self._background.done.connect(self._trashed)
        self._searching = Background(self)
        self._searching.done.connect(self._duplicates_found)
        self._stop_searching = threading.Event()
        self.setAcceptDrops(True)
        self.table = AdapterTable(library, database, parent=self)
        self.view = AdapterView()
        self.view.set_table(self.table)
        self.details = AdapterDetails(study=study, loadout=loadout, make_menu=self.make_menu, stacked=self._is_stacked)
        self.results = Results()
        self._filter_later = QTimer(self)
        self._filter_later.setSingleShot(True)
        self._filter_later.setInterval(FILTER_MS)
        self._filter_later.timeout.connect(self._filter)
        self._build()
        self._connect()
        self._stack_changed()
        self.table.refresh()
        self._select_row(0)

    def _build(self) -> None:
        self._count = label(tone="muted")
        self.field = QLineEdit()
        self.field.setPlaceholderText("Filter adapters")
        self.field.setAccessibleName("Filter adapters")
        self.field.setClearButtonEnabled(True)
        self.field.setMaximumWidth(360)
        self.field.setMinimumWidth(140)
        self.field.addAction(icon("search", "muted"), QLineEdit.ActionPosition.LeadingPosition)
        self.combine = button("Combine…", self.combine_selected, tip="Make one adapter of several")
        self.stacks = button("Stacks", tip="Saved stacks: put one on, rename, delete")
        stacks_menu = QMenu(self)
        stacks_menu.setToolTipsVisible(True)
        stacks_menu.aboutToShow.connect(self._fill_stacks)
        self.stacks.setMenu(stacks_menu)
        self._add = button("Add", icon_name="plus", tip="Add adapters: folders, files or archives")
        self._add.setMenu(self._add_menu())
        again = icon_button("reload", "Refresh: look at the disk again", self._refresh, shortcut="F5")
        self._side = icon_button("side-panel", "Show or hide details", self.toggle_side, shortcut="Ctrl+B")
        head = QFrame()
        head.setObjectName("pageHeader")
        head.setFixedHeight(56)
        bar = row(
            title("LoRAs"),
            self._count,
            1,
            self.field,
            self.combine,
            self.stacks,
            self._add,
            again,
            self._side,
            margins=(16, 0, 8, 0),
            spacing=8,
            parent=head,
        )
        bar.setStretch(3, 3)
        self._splitter = QSplitter(Qt.Orientation.Horizontal)
        self._splitter.addWidget(self.view)
        self._splitter.addWidget(self.details)
        self._splitter.setStretchFactor(0, 1)
        self._splitter.setStretchFactor(1, 0)
        self._splitter.setChildrenCollapsible(False)
        self._splitter.setHandleWidth(1)
        self._splitter.setSizes([1000, 384])
        add = button("Add adapters…", self._add_files, kind="primary", icon_name="plus")
        self._empty = EmptyState(
            "loras",
            "No adapters yet",
            "Drop a LoRA's folder, .safetensors, .gguf or .zip here, one or many. They are copied into Weft's own folder.",
            add,
        )
        clear = button("Clear the filter", self.field.clear, kind="primary")
        self._nothing = EmptyState(
            "search", "Nothing matches", "No adapter has all of these words in its name, kind, base or targets.", clear
        )
        self._pages = QStackedWidget()
        for widget in (self._splitter, self._empty, self._nothing):
            self._pages.addWidget(widget)
        column(head, self.results, self._pages, spacing=0, parent=self)

    def _connect(self) -> None:
        self.field.textChanged.connect(self._filter_later.start)
        self.field.returnPressed.connect(self._to_table)
        self.view.selectionModel().currentRowChanged.connect(self._row_changed)
        self.view.selectionModel().selectionChanged.connect(self._selection_changed)
        self.view.customContextMenuRequested.connect(self._context_menu)
        self.view.doubleClicked.connect(self.use_selected)
        self.view.load_wanted.connect(self.use_selected)
        self.view.rename_wanted.connect(self.rename_selected)
        self.view.trash_wanted.connect(self.trash_selected)
        self.table.can_rename = True
        self.table.renamed.connect(self._renamed)
        self.table.counted.connect(self._counted)
        self.table.modelReset.connect(self._keep_selection)
        self.table.dataChanged.connect(self._refresh_details)
        self.details.closed.connect(self.toggle_side)
        self.details.use_wanted.connect(self.use)
        self.details.use_with.connect(self.use_with)
        self.details.alpha_wanted.connect(self._ask_alpha)
        self.details.compare_wanted.connect(self._compare)
        self.details.other_model_wanted.connect(self.pick_model)
        self._stack_model.changed.connect(self._stack_changed)
        self._loadout.changed.connect(self._loadout_changed)
        self._imports.changed.connect(self._import_moved)
        self._imports.ended.connect(self._imported)
        self._jobs.made.connect(self._made)
        self.results.cancelled.connect(self._imports.cancel)
        for keys, run in (("F5", self._refresh), ("Esc", self._escape)):
            shortcut = QShortcut(QKeySequence(keys), self)
            shortcut.setContext(Qt.ShortcutContext.WidgetWithChildrenShortcut)
            shortcut.activated.connect(run)

    def _add_menu(self) -> QMenu:
        menu = QMenu(self)
        menu.addAction(icon("plus"), "Files or archives…", self._add_files)
        menu.addAction(icon("folder-add"), "Folder of adapters…", self._add_folder)
        menu.addSeparator()
        menu.addAction(icon("copy"), "Find duplicates", self.find_duplicates)
        return menu

    @Slot()
    def _fill_stacks(self) -> None:
        menu = self.stacks.menu()
        if menu is not None:
            menu.clear()
            fill_saved_stacks(menu, self._saved, self._stack_model, self, notice=self.notice.emit)

    # What the window asks ---------------------------------------------------------------------------

    def entered(self) -> None:
        self.view.setFocus()

    def find_in_page(self) -> None:
        self.field.setFocus()
        self.field.selectAll()

    def toggle_side(self) -> None:
        self.details.setVisible(not self.details.isVisible())

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

    def set_scanning(self, scanning: bool) -> None:
        self._scanning = scanning
        self._counted(self.table.rowCount(), self.table.total)

    _scanning = False

    def show_adapter(self, adapter: str) -> None:
        """Select an adapter and show its details, as soon as it is in the index."""
        if self.table.row_of(adapter) < 0 and self.field.text():
            self.field.clear()
            self._filter()
        place = self.table.row_of(adapter)
        self._wanted_path = adapter if place < 0 else ""
        self.details.show()
        self._select_row(place)

    def shutdown(self) -> None:
        """End what runs in the background: the window is going."""
        self.table.close()
        self._stop_searching.set()
        self._searching.close()
        self._background.close()
        self._study.close()

    # Selection --------------------------------------------------------------------------------------

    @property
    def selected(self) -> AdapterEntry | None:
        index = self.view.currentIndex()
        return index.data(EntryRole) if index.isValid() else None

    @property
    def chosen(self) -> list[AdapterEntry]:
        """All that are selected, in the order of the table."""
        rows = sorted(index.row() for index in self.view.selectionModel().selectedRows())
        return [entry for place in rows if (entry := self.table.entry(place)) is not None]

    def _select_row(self, wanted: int) -> None:
        if 0 <= wanted < self.table.rowCount():
            index = self.table.index(wanted, 0)
            self.view.setCurrentIndex(index)
            self.view.selectRow(wanted)
            self.view.scrollTo(index)

    @Slot(QModelIndex, QModelIndex)
    def _row_changed(self, current: QModelIndex, _before: QModelIndex) -> None:
        entry = current.data(EntryRole) if current.isValid() else None
        if isinstance(entry, AdapterEntry):
            self._selected = entry.id
            self.details.show_entry(entry)

    @Slot(QItemSelection, QItemSelection)
    def _selection_changed(self, *_: object) -> None:
        count = len(self.view.selectionModel().selectedRows())
        self.combine.setText(f"Combine {count}…" if count > 1 else "Combine…")

    @Slot()
    def _keep_selection(self) -> None:
        place = self.table.row_of(self._selected)
        self._select_row(place if place >= 0 else 0)
        if self.table.rowCount() == 0:
            self.details.show_entry(None)

    @Slot()
    def _refresh_details(self) -> None:
        entry = self.selected
        if entry is not None and self.details.entry != entry:
            self.details.show_entry(entry)

    @Slot(int, int)
    def _counted(self, shown: int, total: int) -> None:
        text = f"{shown:,} of {total:,}" if self.table.filter else f"{total:,}"
        self._count.setText(f"{text} · looking for adapters…" if self._scanning else text)
        self._pages.setCurrentIndex(0 if shown else 2 if self.table.filter else 1)
        self.combine.setEnabled(total > 0)

    @Slot()
    def _filter(self) -> None:
        self._filter_later.stop()
        self.table.set_filter(self.field.text())

    def _to_table(self) -> None:
        self._filter()
        self.view.setFocus()

    def _escape(self) -> None:
        if self.field.text():
            self.field.clear()
        self.view.setFocus()

    # Using ------------------------------------------------------------------------------------------

    @Slot()
    def _stack_changed(self) -> None:
        self.table.set_stacked(frozenset(entry.path for entry in self._stack_model.entries))
        self.details.refresh_actions()

    @Slot()
    def _loadout_changed(self) -> None:
        now = self._loadout.model
        if (now.id if now is not None else "") != self._loaded_id:
            self._loaded_id = now.id if now is not None else ""
            self.details.refresh_models()

    @Slot()
    def use_selected(self) -> None:
        """Enter or a double click on the row."""
        entry = self.selected
        if entry is not None and not self._is_stacked(entry.path):
            self.use(entry)

    @Slot(object)
    def use(self, entry: AdapterEntry) -> None:
        """Add it to the stack of the loaded model, or offer the models that it fits; take it out when it is in."""
        if self._is_stacked(entry.path):
            self._stack_model.remove(entry.path)
        elif entry.needs_alpha:
            self._ask_alpha(entry)
        elif self._loadout.takes_adapters and not self._misfits(entry):
            self._join(entry)
        else:
            self._offer_bases(entry)

    @Slot(object, object)
    def use_with(self, entry: AdapterEntry, model: ModelEntry) -> None:
        """Load a model, and put the adapter into its stack."""
        now = self._loadout
        if not (now.is_loaded and now.model is not None and now.model.id == model.id):
            now.load(model)
        if now.model is not None and now.model.id == model.id:  # else it asks first, or refused
            self._join(entry)

    def _misfits(self, entry: AdapterEntry) -> bool:
        """Whether it is known already that none of it fits the loaded model."""
        fit, model = self.details.fit, self._loadout.model
        known = fit is not None and model is not None and fit.model.id == model.id and self.details.entry == entry
        return known and fit is not None and fit.compatibility.matched == 0

    def _join(self, entry: AdapterEntry) -> None:
        if self._stack_model.add(Path(entry.path), entry.name):
            model, fit = self._loadout.model, self.details.fit
            where = f" of {model.name}" if model is not None else ""
            partly = ""
            if fit is not None and model is not None and fit.model.id == model.id and self.details.entry == entry:
                found = fit.compatibility
                if found.matched < found.total:
                    partly = f" Only {found.matched:,} of its {found.total:,} modules match; the details say why."
            undo = entry.path
            self.notice.emit(
                Notice(
                    text=f"{entry.name} is in the stack{where}.{partly}",
                    tone="warning" if partly else "positive",
                    action="Take out",
                    run=lambda: self._stack_model.remove(undo),
                )
            )

    def _offer_bases(self, entry: AdapterEntry) -> None:
        menu = QMenu(self)
        menu.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        ranked = self.details.ranked if self.details.entry is not None and self.details.entry.id == entry.id else []
        if not ranked:
            loaded = self._loadout.model if self._loadout.takes_adapters else None
            first = f"It does not fit {loaded.name}" if loaded is not None else "No model is loaded"
            text = f"{first}, and the library has none that {entry.name} fits."
            if entry.base:
                text += f" It records {entry.base} as its base."
            self.notice.emit(Notice(text=text, tone="warning"))
            return
        menu.addAction("Load a model that it fits").setEnabled(False)
        for each in ranked[:8]:
            found = each.compatibility
            text = f"{each.model.name}  ({found.matched:,} of {found.total:,})".replace("&", "&&")
            menu.addAction(icon("load"), text, lambda _=False, model=each.model: self.use_with(entry, model))
        anchor = self.details.use
        menu.popup(anchor.mapToGlobal(anchor.rect().bottomLeft()))

    @Slot()
    def pick_model(self) -> ModelPicker:
        """Choose a model of the library to hold the adapter against."""
        if self._picker_model is None:
            self._picker_model = self._make_models()
        popup = ModelPicker(self._picker_model, self.window())
        popup.picked.connect(self.details.hold_against)
        popup.more.connect(lambda: self.page_wanted.emit("models"))
        popup.open_below(self.details.other)
        return popup

    @Slot(object)
    def _compare(self, entry: AdapterEntry) -> None:
        self.compare_wanted.emit(AdapterStack(adapters=(StackedAdapter(path=entry.path, name=entry.name),)))

    # Adding -----------------------------------------------------------------------------------------

    @Slot(object)
    def _ask_alpha(self, entry: AdapterEntry) -> None:
        self._imports.ask_alpha(Path(entry.path), entry.rank)

    @Slot()
    def _import_moved(self) -> None:
        self.results.show_progress(self._imports.progress)

    @Slot(object)
    def _imported(self, found: Imported) -> None:
        heading, _ = summary(found)
        lines = [self._line(result, found) for result in found.results]
        if found.error is not None:
            lines.append(Line(name="Import", text=str(found.error), tone="negative"))
        self.results.add(heading, lines)
        if found.here:
            entry = found.here[0].entry
            assert entry is not None
            self.show_adapter(entry.id)

    def _line(self, result: ImportResult, found: Imported) -> Line:
        text, tone = words(result)
        name = result.entry.name if result.entry is not None else Path(result.source).name
        line = Line(name=name, text=text, tone=tone, source=result.source)
        if result.outcome is Outcome.DUPLICATE:
            source, path = result.source, given(result.source, found.batch.paths)
            line.name = Path(source).name
            line.action, line.run = "Copy anyway", lambda: self._imports.add_again({source: path})
        elif result.entry is not None:
            adapter = result.entry.id
            line.action, line.run = "Show", lambda: self.show_adapter(adapter)
        return line

    @Slot()
    def _add_folder(self) -> None:
        dialog = QFileDialog(self.window(), "Add a folder of adapters", str(Path.home()))
        dialog.setFileMode(QFileDialog.FileMode.Directory)
        dialog.setOption(QFileDialog.Option.ShowDirsOnly)
        self._ask(dialog)

    @Slot()
    def _add_files(self) -> None:
        kinds = "Adapters (*.safetensors *.gguf *.bin *.pt *.zip *.tar *.tar.gz *.tgz *.tar.bz2 *.tar.xz)"
        dialog = QFileDialog(self.window(), "Add adapters", str(Path.home()), kinds)
        dialog.setFileMode(QFileDialog.FileMode.ExistingFiles)
        self._ask(dialog)

    def _ask(self, dialog: QFileDialog) -> None:
        dialog.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        dialog.filesSelected.connect(lambda names: self.take([Path(name) for name in names]))
        dialog.open()

    @Slot(QPoint)
    def _context_menu(self, where: QPoint) -> None:
        index = self.view.indexAt(where)
        if not index.isValid() and where.y() > 0:
            index = self.view.currentIndex()
        entry = index.data(EntryRole) if index.isValid() else None
        if isinstance(entry, AdapterEntry):
            if not self.view.selectionModel().isRowSelected(index.row(), QModelIndex()):
                self.view.setCurrentIndex(index)
            self.make_menu(entry, self).popup(self.view.viewport().mapToGlobal(where))

    # Drops ------------------------------------------------------------------------------------------

    def dragEnterEvent(self, event: QDragEnterEvent) -> None:
        if self.accepts(local_paths(event.mimeData().urls())):
            event.acceptProposedAction()

    def dropEvent(self, event: QDropEvent) -> None:
        paths = local_paths(event.mimeData().urls())
        if self.accepts(paths):
            event.acceptProposedAction()
            self.take(paths)
