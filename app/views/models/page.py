"""The Models page: filter, table and details; adding, loading, renaming and removing models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PySide6.QtCore import QModelIndex, QPoint, Qt, QTimer, Signal, Slot
from PySide6.QtGui import QDragEnterEvent, QDropEvent, QGuiApplication, QKeySequence, QShortcut
from PySide6.QtWidgets import (
    QCheckBox,
    QFileDialog,
    QFrame,
    QLineEdit,
    QMenu,
    QSplitter,
    QStackedWidget,
    QWidget,
)

from app.core.errors import WeftError
from app.core.library import AdapterEntry, ModelEntry
from app.store.library import LibraryStore
from app.store.model_settings import ModelSettings
from app.viewmodels.background import Background
from app.viewmodels.fitting import judge
from app.viewmodels.library_roots import Added, LibraryRoots, damage
from app.viewmodels.library_table import EntryRole
from app.viewmodels.loadout import Loadout
from app.viewmodels.machine_watch import MachineWatch
from app.viewmodels.model_files import files_of, move_to_trash, trash_refusal
from app.viewmodels.model_table import ModelTable
from app.viewmodels.settings import SettingsView
from app.viewmodels.units import readable_bytes
from app.views.dialogs import ConfirmDialog, reveal
from app.views.icons import icon
from app.views.models.details import ModelDetails
from app.views.models.table import ModelView
from app.views.page import Notice, Page, PaletteCommand, added_notice
from app.views.widgets import EmptyState, button, column, icon_button, label, local_paths, row, title

FILTER_MS = 80


class ModelsPage(Page):
    """Every model of the library.

    Args:
        refresh: looks at the disk again. adapters: those that fit a model, see `ModelDetails`. scanning: whether that is going on now (asked once; `set_scanning` tells later).
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
        super().__init__(parent)
        self._library = library
        self._loadout = loadout
        self._settings = settings
        self._roots = roots
        self._machine = machine
        self._refresh = refresh
        self._selected = ""
        self._background = Background(self)
        self._background.done.connect(self._trashed)
        self._looking = Background(self)
        self._looking.done.connect(self._added)
        self.setAcceptDrops(True)
        self.table = ModelTable(
            library,
            fitting=lambda entry: judge(entry, machine.now()),
            loaded=lambda: loadout.model.id if loadout.is_loaded and loadout.model is not None else "",
            parent=self,
        )
        self.view = ModelView()
        self.view.set_table(self.table)
        self.details = ModelDetails(
            loadout=loadout,
            model_settings=model_settings,
            machine=machine.now,
            make_menu=self.make_menu,
            show_advanced=settings.now.show_advanced,
            adapters=adapters,
        )
        self._filter_later = QTimer(self)
        self._filter_later.setSingleShot(True)
        self._filter_later.setInterval(FILTER_MS)
        self._filter_later.timeout.connect(self._filter)
        self._build()
        self._connect()
        self.table.refresh()
        self._select_row(0)

    def _build(self) -> None:
        self._count = label(tone="muted")
        self.field = QLineEdit()
        self.field.setPlaceholderText("Filter models")
        self.field.setAccessibleName("Filter models")
        self.field.setClearButtonEnabled(True)
        self.field.setMaximumWidth(360)
        self.field.setMinimumWidth(160)
        self.field.addAction(icon("search", "muted"), QLineEdit.ActionPosition.LeadingPosition)
        self._add = button("Add", icon_name="plus", tip="Add a model's file or a folder of models")
        self._add.setMenu(self._add_menu())
        again = icon_button("reload", "Refresh: look at the disk again", self._refresh, shortcut="F5")
        self._side = icon_button("side-panel", "Show or hide details", self.toggle_side, shortcut="Ctrl+B")
        self.autoload = QCheckBox("Autoload")
        self.autoload.setToolTip("Load a model as soon as it is picked from the bar above. Off: Load loads it.")
        self.autoload.setAccessibleDescription(self.autoload.toolTip())
        self.autoload.setChecked(self._settings.now.autoload)
        head = QFrame()
        head.setObjectName("pageHeader")
        head.setFixedHeight(56)
        bar = row(
            title("Models"),
            self._count,
            1,
            self.field,
            self.autoload,
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
        self._splitter.setSizes([1000, 360])
        add = button("Add a folder…", self._add_folder, kind="primary", icon_name="folder-add")
        self._empty = EmptyState(
            "models",
            "No models yet",
            "Drop a .gguf file or a model's folder here, or add the folder where yours lie. They stay where they are.",
            add,
        )
        clear = button("Clear the filter", self.field.clear, kind="primary")
        self._nothing = EmptyState(
            "search", "Nothing matches", "No model has all of these words in its name, format or folder.", clear
        )
        self._stack = QStackedWidget()
        for widget in (self._splitter, self._empty, self._nothing):
            self._stack.addWidget(widget)
        column(head, self._stack, spacing=0, parent=self)

    def _connect(self) -> None:
        self.field.textChanged.connect(self._filter_later.start)
        self.field.returnPressed.connect(self._to_table)
        self.view.selectionModel().currentRowChanged.connect(self._row_changed)
        self.view.customContextMenuRequested.connect(self._context_menu)
        self.view.doubleClicked.connect(self._load_unless_loaded)
        self.view.load_wanted.connect(self._load_unless_loaded)
        self.view.rename_wanted.connect(self.rename_selected)
        self.view.trash_wanted.connect(self.trash_selected)
        self.table.can_rename = True
        self.table.renamed.connect(self._renamed)
        self.table.counted.connect(self._counted)
        self.table.modelReset.connect(self._keep_selection)
        self.table.dataChanged.connect(self._refresh_details)
        self.details.failed.connect(self.failed)
        self.details.code_wanted.connect(self.code_wanted)
        self.details.closed.connect(self.toggle_side)
        self._loadout.changed.connect(self._loadout_changed)
        self._machine.changed.connect(self._machine_changed)
        self.autoload.toggled.connect(self._autoload_toggled)
        self._settings.changed.connect(self._setting_changed)
        self._loaded_id = ""
        for keys, run in (("F5", self._refresh), ("Esc", self._escape)):
            shortcut = QShortcut(QKeySequence(keys), self)
            shortcut.setContext(Qt.ShortcutContext.WidgetWithChildrenShortcut)
            shortcut.activated.connect(run)

    def _add_menu(self) -> QMenu:
        menu = QMenu(self)
        menu.addAction(icon("folder-add"), "Folder of models…", self._add_folder)
        menu.addAction(icon("plus"), "Model file (.gguf)…", self._add_file)
        return menu

    # What the window asks ---------------------------------------------------------------------------

    def entered(self) -> None:
        self.view.setFocus()

    def find_in_page(self) -> None:
        self.field.setFocus()
        self.field.selectAll()

    def toggle_side(self) -> None:
        self.details.setVisible(not self.details.isVisible())

    def accepts(self, paths: list[Path]) -> bool:
        return self._roots.can_add(paths)

    def take(self, paths: list[Path]) -> None:
        """Add dropped files and folders to the library, where they lie."""
        try:
            added = self._roots.add(paths)
        except WeftError as error:
            self.failed.emit(error)
            return
        self._looking.run(added, lambda: damage(paths))

    @Slot(object, object, object)
    def _added(self, added: object, wrong: object, error: object) -> None:
        assert isinstance(added, Added)
        self.notice.emit(added_notice(added, wrong, error))

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

    @Slot(bool)
    def set_scanning(self, scanning: bool) -> None:
        self._scanning = scanning
        self._counted(self.table.rowCount(), self.table.total)

    _scanning = False

    def show_model(self, model: str) -> None:
        """Select a model and show its details."""
        if self.table.row_of(model) < 0:
            self.field.clear()
            self._filter()
        self.details.show()
        self._select_row(self.table.row_of(model))

    def code_decided(self) -> None:
        self.details.code_decided()

    def shutdown(self) -> None:
        """End what runs in the background: the window is going."""
        self.details.shutdown()
        self._background.close()
        self._looking.close()

    # Selection --------------------------------------------------------------------------------------

    @property
    def selected(self) -> ModelEntry | None:
        index = self.view.currentIndex()
        return index.data(EntryRole) if index.isValid() else None

    def _select_row(self, wanted: int) -> None:
        if 0 <= wanted < self.table.rowCount():
            index = self.table.index(wanted, 0)
            self.view.setCurrentIndex(index)
            self.view.scrollTo(index)

    @Slot(QModelIndex, QModelIndex)
    def _row_changed(self, current: QModelIndex, _before: QModelIndex) -> None:
        entry = current.data(EntryRole) if current.isValid() else None
        if isinstance(entry, ModelEntry):
            self._selected = entry.id
            self.details.show_entry(entry)

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

    @Slot(int, int)
    def _counted(self, shown: int, total: int) -> None:
        text = f"{shown:,} of {total:,}" if self.table.filter else f"{total:,}"
        self._count.setText(f"{text} · looking for models…" if self._scanning else text)
        self._stack.setCurrentIndex(0 if shown else 2 if self.table.filter else 1)

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

    # Actions ----------------------------------------------------------------------------------------

    @Slot()
    def load_selected(self) -> None:
        if self.selected is not None:
            if self.details.entry is None or self.details.entry.id != self.selected.id:
                self.details.show_entry(self.selected)
            self.details.load()

    @Slot()
    def _load_unless_loaded(self) -> None:
        """Enter or a double click on the row: a model that runs with these very options is not read a second time."""
        if self.selected is not None and self._loaded_id == self.selected.id and not self.details.differs:
            text = f"{self.selected.name} is loaded already. Reload reads it anew."
            self.notice.emit(Notice(text=text))
        else:
            self.load_selected()

    def make_menu(self, entry: ModelEntry, parent: QWidget) -> QMenu:
        """What can be done with a model; what cannot says why."""
        menu = QMenu(parent)
        menu.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        menu.setToolTipsVisible(True)
        now = self._loadout
        loaded = now.is_loaded and now.model is not None and now.model.id == entry.id
        if loaded:
            menu.addAction(icon("eject"), "Unload", now.unload)
        load = menu.addAction(icon("load"), "Reload" if loaded else "Load", self.load_selected)
        load.setShortcut("Return")
        load.setEnabled(not entry.problem)
        load.setToolTip(entry.problem)
        menu.addSeparator()
        menu.addAction(icon("train"), "Train on this…", lambda: self.train_wanted.emit(entry))
        menu.addAction(icon("export"), "Merge and export…", lambda: self.export_wanted.emit(entry))
        certificate = menu.addAction(icon("done"), "Certificate…", lambda: self.certificate_wanted.emit(entry))
        certificate.setToolTip("How far it is from what it was merged or exported from, if Weft made it")
        menu.addAction(icon("folder"), "Show in file manager", lambda: reveal(Path(entry.path)))
        menu.addAction(icon("copy"), "Copy path", lambda: QGuiApplication.clipboard().setText(entry.path))
        rename = menu.addAction(icon("edit"), "Rename", self.rename_selected)
        rename.setShortcut("F2")
        rename.setToolTip("Changes the name in the list, not the file's")
        menu.addSeparator()
        reason = trash_refusal(entry, loaded=loaded)
        trash = menu.addAction(icon("trash"), "Move to trash", self.trash_selected)
        trash.setShortcut("Del")
        trash.setEnabled(not reason)
        trash.setToolTip(reason)
        return menu

    @Slot(QPoint)
    def _context_menu(self, where: QPoint) -> None:
        index = self.view.indexAt(where)
        if not index.isValid() and where.y() > 0:
            index = self.view.currentIndex()
        entry = index.data(EntryRole) if index.isValid() else None
        if isinstance(entry, ModelEntry):
            self.view.setCurrentIndex(index)
            self.make_menu(entry, self).popup(self.view.viewport().mapToGlobal(where))

    @Slot()
    def rename_selected(self) -> None:
        """Edit the name that is shown, in its place; the file keeps its own. Empty goes back to that."""
        if self.selected is None:
            return
        self.view.rename(self.view.currentIndex().row())

    @Slot(object, str)
    def _renamed(self, entry: ModelEntry, name: str) -> None:
        if name != entry.name:
            # Later: the table is still closing its editor, and is about to be read again.
            QTimer.singleShot(0, self, lambda: self.rename(entry, name))

    def rename(self, entry: ModelEntry, name: str) -> None:
        """Show a model under another name from now on."""
        try:
            self._library.rename_model(entry.id, name)
        except WeftError as error:
            self.failed.emit(error)
            return
        self.table.refresh()

    @Slot()
    def trash_selected(self) -> None:
        """Move the model to the trash; outside Weft's own folder other programs may need it, so that is asked first."""
        entry = self.selected
        if entry is None or self._refuses_trash(entry):
            return
        files = files_of(entry)
        if all(self._roots.is_own(path) for path in files):
            self._trash(entry)
            return
        names = "\n".join(str(path) for path in files[:10])
        more = f"\n… and {len(files) - 10} more" if len(files) > 10 else ""
        dialog = ConfirmDialog(
            f"Move {entry.name} to the trash?",
            f"{names}{more}\n{readable_bytes(entry.bytes)}",
            "Move to trash",
            lambda: self._trash(entry),
            self.window(),
            danger=True,
            hint="It does not lie in Weft's own folder: another program may use it too.",
        )
        dialog.no.setDefault(True)
        dialog.open()

    def _trash(self, entry: ModelEntry) -> None:
        if not self._refuses_trash(entry):  # it may have been loaded meanwhile
            self._background.run(entry, lambda: move_to_trash(entry))

    def _refuses_trash(self, entry: ModelEntry) -> bool:
        now = self._loadout
        loaded = now.is_loaded and now.model is not None and now.model.id == entry.id
        if reason := trash_refusal(entry, loaded=loaded):
            self.notice.emit(Notice(text=f"{entry.name} cannot be moved to the trash. {reason}", tone="warning"))
        return bool(reason)

    @Slot(object, object, object)
    def _trashed(self, entry: object, undo: object, error: object) -> None:
        assert isinstance(entry, ModelEntry)
        if isinstance(error, WeftError):
            self.failed.emit(error)
        else:
            run = (lambda: self._undo_trash(undo)) if callable(undo) else None
            self.notice.emit(Notice(text=f"{entry.name} is in the trash.", action="Undo" if run else "", run=run))
        self._refresh()

    def _undo_trash(self, undo: Callable[..., object]) -> None:
        try:
            undo()
        except WeftError as error:
            self.failed.emit(error)
        except OSError as error:
            self.notice.emit(
                Notice(text=f"It could not be restored: {error}. Take it out of the trash by hand.", tone="negative")
            )
        self._refresh()

    @Slot()
    def _add_folder(self) -> None:
        dialog = QFileDialog(self.window(), "Add a folder of models", str(Path.home()))
        dialog.setFileMode(QFileDialog.FileMode.Directory)
        dialog.setOption(QFileDialog.Option.ShowDirsOnly)
        self._ask(dialog)

    @Slot()
    def _add_file(self) -> None:
        dialog = QFileDialog(self.window(), "Add a model file", str(Path.home()), "Models (*.gguf *.safetensors)")
        dialog.setFileMode(QFileDialog.FileMode.ExistingFiles)
        self._ask(dialog)

    def _ask(self, dialog: QFileDialog) -> None:
        dialog.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        dialog.filesSelected.connect(lambda names: self.take([Path(name) for name in names]))
        dialog.open()

    # Drops ------------------------------------------------------------------------------------------

    def dragEnterEvent(self, event: QDragEnterEvent) -> None:
        if self.accepts(local_paths(event.mimeData().urls())):
            event.acceptProposedAction()

    def dropEvent(self, event: QDropEvent) -> None:
        paths = local_paths(event.mimeData().urls())
        if self.accepts(paths):
            event.acceptProposedAction()
            if not self.dropped(paths):
                self.take(paths)
