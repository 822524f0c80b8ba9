"""What the LoRAs page can do with an adapter as it lies: its menu, its name in the list, the trash."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from PySide6.QtCore import Qt, QTimer, Signal, Slot
from PySide6.QtGui import QGuiApplication
from PySide6.QtWidgets import QMenu, QWidget

from app.core.errors import WeftError
from app.core.library import AdapterEntry, AdapterFormat
from app.core.paths import resources
from app.core.stack import AdapterStack, StackedAdapter
from app.viewmodels.adapter_facts import files_of
from app.viewmodels.adapter_import import AdapterImports
from app.viewmodels.adapter_table import AdapterTable
from app.viewmodels.background import Background
from app.viewmodels.library_roots import LibraryRoots
from app.viewmodels.loadout import Loadout
from app.viewmodels.model_files import trash_files
from app.viewmodels.units import readable_bytes
from app.views.dialogs import ConfirmDialog, reveal
from app.views.icons import icon
from app.views.loras.making import MakingPage
from app.views.loras.table import AdapterView
from app.views.page import Notice


class KeepingPage(MakingPage):
    """The part of the page with the menu, names and the trash.

    Signals:
        compare_wanted(AdapterStack): compare these with the base. export_wanted(ModelEntry or None, AdapterStack): merge and export.
    """

    compare_wanted = Signal(object)
    export_wanted = Signal(object, object)
    _loadout: Loadout
    _imports: AdapterImports
    _roots: LibraryRoots
    _background: Background
    _refresh: Callable[[], None]
    view: AdapterView
    table: AdapterTable

    @property
    def selected(self) -> AdapterEntry | None:
        """The current row's."""
        raise NotImplementedError

    def use(self, entry: AdapterEntry) -> None:
        """Add it to the stack of the loaded model."""
        raise NotImplementedError

    def _compare(self, entry: AdapterEntry) -> None:
        raise NotImplementedError

    def _is_stacked(self, path: str) -> bool:
        return any(entry.path == path for entry in self._stack_model.entries)

    def make_menu(self, entry: AdapterEntry, parent: QWidget) -> QMenu:
        """What can be done with an adapter; what cannot says why."""
        menu = QMenu(parent)
        menu.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        menu.setToolTipsVisible(True)
        usable = not entry.problem and not entry.needs_alpha
        use = menu.addAction(
            icon("minus" if self._is_stacked(entry.path) else "plus"),
            "Take out" if self._is_stacked(entry.path) else "Use",
            lambda: self.use(entry),
        )
        use.setShortcut("Return")
        back = entry.format is AdapterFormat.GGUF
        combine = menu.addAction("Combine…", self.combine_selected)
        resize = menu.addAction("Change the rank…", lambda: self.resize_rank(entry))
        convert = menu.addAction("Convert to PEFT…" if back else "Convert to GGUF…", lambda: self.convert(entry))
        compare = menu.addAction(icon("compare"), "Compare with base", lambda: self._compare(entry))
        export = menu.addAction(icon("export"), "Merge and export…", lambda: self._export(entry))
        for each in (use, combine, resize, convert, compare, export):
            each.setEnabled(usable)
            each.setToolTip("" if usable else entry.problem or "Its alpha is not recorded: say it first.")
        menu.addSeparator()
        menu.addAction(icon("folder"), "Show in file manager", lambda: reveal(Path(entry.path)))
        menu.addAction(icon("copy"), "Copy path", lambda: QGuiApplication.clipboard().setText(entry.path))
        rename = menu.addAction(icon("edit"), "Rename", self.rename_selected)
        rename.setShortcut("F2")
        rename.setToolTip("Changes the name in the list, not the file's")
        menu.addSeparator()
        reason = self._trash_refusal(entry)
        trash = menu.addAction(icon("trash"), "Move to trash", self.trash_selected)
        trash.setShortcut("Del")
        trash.setEnabled(not reason)
        trash.setToolTip(reason)
        return menu

    def _export(self, entry: AdapterEntry) -> None:
        stack = AdapterStack(adapters=(StackedAdapter(path=entry.path, name=entry.name),))
        ranked = self.details.ranked if self.details.entry is not None and self.details.entry.id == entry.id else []
        loaded = self._loadout.model
        fits = [each.model for each in ranked]
        model = loaded if loaded is not None and any(each.id == loaded.id for each in fits) else None
        self.export_wanted.emit(model or (fits[0] if fits else loaded), stack)

    @Slot()
    def rename_selected(self) -> None:
        """Edit the name that is shown, in its place; the file keeps its own. Empty goes back to that."""
        if self.selected is not None:
            self.view.rename(self.view.currentIndex().row())

    @Slot(object, str)
    def _renamed(self, entry: AdapterEntry, name: str) -> None:
        if name != entry.name:
            QTimer.singleShot(0, self, lambda: self.rename(entry, name))  # the table is still closing its editor

    def rename(self, entry: AdapterEntry, name: str) -> None:
        """Show an adapter under another name from now on."""
        try:
            self._library.rename_adapter(entry.id, name)
        except WeftError as error:
            self.failed.emit(error)
            return
        self.table.refresh()

    def _trash_refusal(self, entry: AdapterEntry) -> str:
        if resources() in Path(entry.path).parents:
            return "It belongs to Weft itself, and is only read here."
        if self._is_stacked(entry.path):
            return "It is in the stack. Take it out first."
        return ""

    @Slot()
    def trash_selected(self) -> None:
        """Move what is selected to the trash; outside Weft's own folder other programs may need it, so that is asked first."""
        entries = self.chosen or ([self.selected] if self.selected is not None else [])
        for entry in entries:
            if reason := self._trash_refusal(entry):
                self.notice.emit(Notice(text=f"{entry.name} cannot be moved to the trash. {reason}", tone="warning"))
                return
        files = [path for entry in entries for path in files_of(entry)]
        if not files:
            return
        if all(self._imports.folder in path.parents or self._roots.is_own(path) for path in files):
            self._trash(entries, files)
            return
        names = "\n".join(str(path) for path in files[:10])
        more = f"\n… and {len(files) - 10} more" if len(files) > 10 else ""
        dialog = ConfirmDialog(
            f"Move {_names(entries)} to the trash?",
            f"{names}{more}\n{readable_bytes(sum(entry.bytes for entry in entries))}",
            "Move to trash",
            lambda: self._trash(entries, files),
            self.window(),
            danger=True,
            hint="Not all of it lies in Weft's own folder: another program may use it too.",
        )
        dialog.no.setDefault(True)
        self._show(dialog)

    def _trash(self, entries: Sequence[AdapterEntry], files: list[Path]) -> None:
        if not any(self._is_stacked(entry.path) for entry in entries):  # it may have been put on meanwhile
            self._background.run(_names(entries), lambda: trash_files(files))

    @Slot(object, object, object)
    def _trashed(self, name: object, undo: object, error: object) -> None:
        if isinstance(error, WeftError):
            self.failed.emit(error)
        else:
            run = (lambda: self._undo_trash(undo)) if callable(undo) else None
            self.notice.emit(Notice(text=f"{name} moved to the trash.", action="Undo" if run else "", run=run))
        self._refresh()

    def _undo_trash(self, undo: Callable[..., object]) -> None:
        try:
            undo()
        except WeftError as error:
            self.failed.emit(error)
        except OSError as error:
            text = f"It could not be restored: {error}. Take it out of the trash by hand."
            self.notice.emit(Notice(text=text, tone="negative"))
        self._refresh()


def _names(entries: Sequence[AdapterEntry]) -> str:
    return entries[0].name if len(entries) == 1 else f"{len(entries)} adapters"
