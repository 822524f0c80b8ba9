"""A page of the library: filter, table and details; names, the trash, drops. Models and adapters have theirs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec
from PySide6.QtCore import QModelIndex, QPoint, Qt, QTimer, Slot
from PySide6.QtGui import QDragEnterEvent, QDropEvent, QGuiApplication, QKeySequence, QShortcut
from PySide6.QtWidgets import QDialog, QFrame, QMenu, QPushButton, QSplitter, QStackedWidget, QWidget

from app.core.errors import WeftError
from app.core.library import AdapterEntry, ModelEntry
from app.viewmodels.library_table import EntryRole, LibraryTable
from app.views.dialogs import choose_paths, reveal
from app.views.icons import icon
from app.views.library.filter_field import FilterField
from app.views.library.panel import DetailsPanel
from app.views.library.table import LibraryView
from app.views.library.trash import Trash, trash_question
from app.views.page import Notice, Page
from app.views.widgets import EmptyState, button, column, icon_button, label, local_paths, row, title

Entry = TypeVar("Entry", ModelEntry, AdapterEntry)
Table = TypeVar("Table", bound=LibraryTable[Any])
Details = TypeVar("Details", bound=DetailsPanel[Any])


class Words(msgspec.Struct, frozen=True, kw_only=True):
    """What a page calls what it lists.

    Attributes:
        title: the page's. many: "adapters". icon: of the empty page.
        empty: how the first one comes. nothing: what the filter looked for in vain.
    """

    title: str
    many: str
    icon: str
    empty: str
    nothing: str


class LibraryPage(Page, Generic[Entry, Table, Details]):
    """What is marked abstract is a page's own. A page makes its parts, and puts them together with `_assemble`.

    Args:
        refresh: looks at the disk again.
    """

    table: Table
    details: Details
    view: LibraryView

    def __init__(self, words: Words, refresh: Callable[[], None], parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._words = words
        self._refresh = refresh
        self._selected = ""
        self._scanning = False
        self._dialog: QDialog | None = None
        self._trash = Trash(self)
        self._trash.notice.connect(self.notice)
        self._trash.failed.connect(self.failed)
        self._trash.moved.connect(self._trash_moved)
        self.setAcceptDrops(True)

    # What a page says of its entries ----------------------------------------------------------------

    @abstractmethod
    def _add_uses(self, menu: QMenu, entry: Entry) -> None:
        """Add what can be done with an entry, besides its file, its name and the trash; what cannot says why."""

    @abstractmethod
    def _use_current(self) -> None:
        """Enter, or a double click on a row."""

    @abstractmethod
    def _store_name(self, entry: Entry, name: str) -> None:
        """Keep another name; "" is that of the file. Raises WeftError."""

    @abstractmethod
    def _trash_refusal(self, entry: Entry) -> str:
        """Why it cannot go to the trash, in a sentence; "" when it can."""

    @abstractmethod
    def _files_of(self, entry: Entry) -> list[Path]:
        """What goes with it."""

    @abstractmethod
    def _is_own(self, path: Path) -> bool:
        """Whether it lies where nobody but Weft put it."""

    @abstractmethod
    def _mover(self, entries: Sequence[Entry]) -> Callable[[], Callable[[], None] | None]:
        """What moves these to the trash, in another thread: see `Trash.take`."""

    # Building ---------------------------------------------------------------------------------------

    def _assemble(
        self,
        table: Table,
        view: LibraryView,
        details: Details,
        *,
        tools: Sequence[QWidget],
        add: QPushButton,
        notes: Sequence[QWidget] = (),
        side: int = 360,
    ) -> None:
        """Put the page together.

        Args:
            tools: in the head, behind the filter. add: what the empty page offers. notes: between head and table.
            side: how wide the details begin, in pixels.
        """
        self.table, self.view, self.details = table, view, details
        table.can_rename = True
        view.set_model(table)
        self._splitter = QSplitter(Qt.Orientation.Horizontal)
        self._splitter.addWidget(view)
        self._splitter.addWidget(details)
        self._splitter.setStretchFactor(0, 1)
        self._splitter.setStretchFactor(1, 0)
        self._splitter.setChildrenCollapsible(False)
        self._splitter.setHandleWidth(1)
        self._splitter.setSizes([1000, side])
        words = self._words
        self._empty = EmptyState(words.icon, f"No {words.many} yet", words.empty, add)
        head = self._head(tools)
        clear = button("Clear the filter", self.field.clear, kind="primary")
        self._nothing = EmptyState("search", "Nothing matches", words.nothing, clear)
        self._pages = QStackedWidget()
        for widget in (self._splitter, self._empty, self._nothing):
            self._pages.addWidget(widget)
        column(head, *notes, self._pages, spacing=0, parent=self)
        self._connect()

    def _head(self, tools: Sequence[QWidget]) -> QFrame:
        self._count = label(tone="muted")
        self.field = FilterField(f"Filter {self._words.many}")
        again = icon_button("reload", "Refresh: look at the disk again", self._refresh, shortcut="F5")
        side = icon_button("side-panel", "Show or hide details", self.toggle_side, shortcut="Ctrl+B")
        head = QFrame()
        head.setObjectName("pageHeader")
        head.setFixedHeight(56)
        parts = (title(self._words.title), self._count, 1, self.field, *tools, again, side)
        row(*parts, margins=(16, 0, 8, 0), spacing=8, parent=head).setStretch(3, 3)
        return head

    def _connect(self) -> None:
        self.field.settled.connect(self.table.set_filter)
        self.field.returnPressed.connect(self._to_table)
        self.view.selectionModel().currentRowChanged.connect(self._row_changed)
        self.view.customContextMenuRequested.connect(self._context_menu)
        self.view.doubleClicked.connect(self._use_current)
        self.view.load_wanted.connect(self._use_current)
        self.view.rename_wanted.connect(self.rename_selected)
        self.view.trash_wanted.connect(self.trash_selected)
        self.table.renamed.connect(self._renamed)
        self.table.counted.connect(self._counted)
        self.table.modelReset.connect(self._keep_selection)
        self.table.dataChanged.connect(self._refresh_details)
        self.details.closed.connect(self.toggle_side)
        for keys, run in (("F5", self._refresh), ("Esc", self._escape)):
            shortcut = QShortcut(QKeySequence(keys), self)
            shortcut.setContext(Qt.ShortcutContext.WidgetWithChildrenShortcut)
            shortcut.activated.connect(run)

    # What the window asks ---------------------------------------------------------------------------

    def entered(self) -> None:
        self.view.setFocus()

    def find_in_page(self) -> None:
        self.field.setFocus()
        self.field.selectAll()

    @Slot()
    def toggle_side(self) -> None:
        self.details.setVisible(not self.details.isVisible())

    @Slot(bool)
    def set_scanning(self, scanning: bool) -> None:
        """The disk is being looked at, or no more."""
        self._scanning = scanning
        self._counted(self.table.rowCount(), self.table.total)

    def show_id(self, wanted: str) -> bool:
        """Select an entry and show its details, without the filter where that hides it. False: the index has none of that id."""
        if self.table.row_of(wanted) < 0 and self.field.text():
            self.field.clear()
            self._filter()
        place = self.table.row_of(wanted)
        self.details.show()
        self._select_row(place)
        return place >= 0

    def shutdown(self) -> None:
        """End what runs in the background: the window is going."""
        self._trash.close()

    # Selection --------------------------------------------------------------------------------------

    @property
    def selected(self) -> Entry | None:
        """The current row's."""
        index = self.view.currentIndex()
        return index.data(EntryRole) if index.isValid() else None

    @property
    def chosen(self) -> list[Entry]:
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
        entry: Entry | None = current.data(EntryRole) if current.isValid() else None
        if entry is not None:
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

    @Slot(int, int)
    def _counted(self, shown: int, total: int) -> None:
        text = f"{shown:,} of {total:,}" if self.table.filter else f"{total:,}"
        self._count.setText(f"{text} · looking for {self._words.many}…" if self._scanning else text)
        self._pages.setCurrentIndex(0 if shown else 2 if self.table.filter else 1)

    @Slot()
    def _filter(self) -> None:
        self.field.settle()

    @Slot()
    def _to_table(self) -> None:
        self._filter()
        self.view.setFocus()

    @Slot()
    def _escape(self) -> None:
        if self.field.text():
            self.field.clear()
        self.view.setFocus()

    # The menu of a row ------------------------------------------------------------------------------

    def make_menu(self, entry: Entry, parent: QWidget) -> QMenu:
        """What can be done with an entry; what cannot says why."""
        menu = QMenu(parent)
        menu.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        menu.setToolTipsVisible(True)
        self._add_uses(menu, entry)
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

    @Slot(QPoint)
    def _context_menu(self, where: QPoint) -> None:
        index = self.view.indexAt(where)
        if not index.isValid() and where.y() > 0:
            index = self.view.currentIndex()
        entry: Entry | None = index.data(EntryRole) if index.isValid() else None
        if entry is not None:
            if not self.view.selectionModel().isRowSelected(index.row(), QModelIndex()):
                self.view.setCurrentIndex(index)
            self.make_menu(entry, self).popup(self.view.viewport().mapToGlobal(where))

    # Names ------------------------------------------------------------------------------------------

    @Slot()
    def rename_selected(self) -> None:
        """Edit the name that is shown, in its place; the file keeps its own. Empty goes back to that."""
        if self.selected is not None:
            self.view.rename(self.view.currentIndex().row())

    @Slot(object, str)
    def _renamed(self, entry: Entry, name: str) -> None:
        if name != entry.name:
            # Later: the table is still closing its editor, and is about to be read again.
            QTimer.singleShot(0, self, lambda: self.rename(entry, name))

    def rename(self, entry: Entry, name: str) -> None:
        """Show an entry under another name from now on."""
        try:
            self._store_name(entry, name)
        except WeftError as error:
            self.failed.emit(error)
            return
        self.table.refresh()

    # The trash --------------------------------------------------------------------------------------

    @Slot()
    def trash_selected(self) -> None:
        """Move what is selected to the trash; outside Weft's own folder other programs may need it, so that is asked first."""
        entries = self.chosen or ([self.selected] if self.selected is not None else [])
        if not entries or self._refuses_trash(entries):
            return
        files = [path for entry in entries for path in self._files_of(entry)]
        own = [self._is_own(path) for path in files]
        if all(own):
            self._move_to_trash(entries)
            return
        size = sum(entry.bytes for entry in entries)
        name, yes = self._name_of(entries), lambda: self._move_to_trash(entries)
        self._show(trash_question(name, files, size, self.window(), yes, partly_own=any(own)))

    def _move_to_trash(self, entries: Sequence[Entry]) -> None:
        if not self._refuses_trash(entries):  # it may have been loaded meanwhile
            self._trash.take(self._name_of(entries), self._mover(entries))

    def _refuses_trash(self, entries: Sequence[Entry]) -> bool:
        for entry in entries:
            if reason := self._trash_refusal(entry):
                self.notice.emit(Notice(text=f"{entry.name} cannot be moved to the trash. {reason}", tone="warning"))
                return True
        return False

    def _name_of(self, entries: Sequence[Entry]) -> str:
        return entries[0].name if len(entries) == 1 else f"{len(entries)} {self._words.many}"

    @Slot()
    def _trash_moved(self) -> None:
        self._refresh()

    # Adding -----------------------------------------------------------------------------------------

    def _choose(self, heading: str, kinds: str = "") -> None:
        """Ask for files of these kinds, or (with none) for a folder; what is chosen is taken."""
        choose_paths(self, heading, self._chosen_files, kinds=kinds)

    @Slot(list)
    def _chosen_files(self, names: list[str]) -> None:
        self.take([Path(name) for name in names])

    @Slot(object)
    def _show(self, dialog: QDialog) -> None:
        """Open a dialog; the last one is kept hold of."""
        self._dialog = dialog
        dialog.open()

    def _take_dropped(self, paths: list[Path]) -> None:
        """Take what was dropped here, of which `accepts` said yes."""
        self.take(paths)

    def dragEnterEvent(self, event: QDragEnterEvent) -> None:
        if self.accepts(local_paths(event.mimeData().urls())):
            event.acceptProposedAction()

    def dropEvent(self, event: QDropEvent) -> None:
        paths = local_paths(event.mimeData().urls())
        if self.accepts(paths):
            event.acceptProposedAction()
            self._take_dropped(paths)
