"""The window: rail, loadout bar, pages, toasts and dialogs. It builds a page when it is first shown.

The window is shown as a frame first (rail and nothing beside it), so that something is there at once; `furnish` then hands it what
pages are made with. Adding a page is one `PageSpec` in `app.rail` and one builder in `app.house.House`; a page's class derives from
`app.views.page.Page`, takes what it needs as arguments (stores and view models, never other pages), and imports nothing heavy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from PySide6.QtCore import QByteArray, QEvent, QObject, QSettings, Qt, QTimer, Signal, Slot
from PySide6.QtGui import QAction, QCloseEvent, QDragEnterEvent, QDropEvent
from PySide6.QtWidgets import QDialog, QMainWindow, QStackedWidget, QVBoxLayout, QWidget

from app.core.errors import ErrorKind, WeftError
from app.views.icons import window_icon
from app.views.page import Notice, Page, PageSpec, PaletteCommand
from app.views.rail import Rail
from app.views.toasts import Toasts
from app.views.widgets import action, column, local_paths, row

MINIMUM = (960, 600)
SORTED_FIRST = (
    "chat",
    "compare",
    "models",
    "loras",
    "jobs",
    "settings",
    "evaluate",
)  # pages with no use of their own for folders


class MainWindow(QMainWindow):
    """One window.

    Args:
        specs: the pages, in the order of the rail.
        state: where geometry is remembered.

    Signals:
        painted: the window's first paint has happened. closing: it is about to close.
        window_wanted(name): an entry of the rail that is a window of its own was chosen.
    """

    painted = Signal()
    closing = Signal()
    window_wanted = Signal(str)

    def __init__(self, specs: Sequence[PageSpec], *, state: QSettings) -> None:
        super().__init__()
        self.setWindowTitle("Weft")
        self.setWindowIcon(window_icon())
        self.setMinimumSize(*MINIMUM)
        self.setAcceptDrops(True)
        self._specs = {spec.name: spec for spec in specs}
        self._pages: dict[str, Page] = {}
        self._state = state
        self._build: Callable[[str], Page] | None = None
        self._header_factory: Callable[[], QWidget] | None = None
        self._header: QWidget | None = None
        self._commands: Callable[[], list[PaletteCommand]] = list
        self._notify: Callable[[str, str], object] | None = None
        self._sort: Callable[[list[Path]], bool] | None = None
        self._current = ""
        self._wanted = ""
        self._dialog: QDialog | None = None
        self._waiting_dialogs: list[Callable[[], QDialog]] = []
        self.rail = Rail(specs)
        self.rail.chosen.connect(self.show_page)
        self._stack = QStackedWidget()
        self._right = QWidget()
        self._right_column: QVBoxLayout = column(self._stack, spacing=0, parent=self._right)
        body = QWidget()
        row(self.rail, self._right, spacing=0, parent=body)
        self.setCentralWidget(body)
        self.toasts = Toasts(body, self.rail.width, self._foot)
        self._add_actions()
        self._restore()
        body.installEventFilter(self)

    def eventFilter(self, watched: QObject, event: QEvent) -> bool:
        if event.type() == QEvent.Type.Paint:
            watched.removeEventFilter(self)
            QTimer.singleShot(0, self, self._tell_painted)
        return False

    @Slot()
    def _tell_painted(self) -> None:
        self.painted.emit()

    def furnish(
        self,
        *,
        build: Callable[[str], Page],
        header: Callable[[], QWidget] | None = None,
        commands: Callable[[], list[PaletteCommand]] = list,
        notify: Callable[[str, str], object] | None = None,
        sort: Callable[[list[Path]], bool] | None = None,
    ) -> None:
        """Hand over what pages are made with; the page that was asked for meanwhile is shown.

        Args:
            build: makes the page of this name.
            header: builds the loadout bar (and whatever stands along the top); shown on pages whose spec asks for it.
            commands: what Ctrl+K offers besides pages and their own commands.
            notify: hands a notice to the desktop when the window is not in front.
            sort: takes dropped files that may be models or adapters and finds out which; False when they are neither by name.
        """
        self._build, self._header_factory, self._commands, self._notify = build, header, commands, notify
        self._sort = sort
        if self._wanted:
            self.show_page(self._wanted)

    # Pages ----------------------------------------------------------------------------------------

    @Slot(str)
    def show_page(self, name: str) -> None:
        """Bring a page to the front, building it on its first time."""
        spec = self._specs[name]
        if spec.window:
            self.window_wanted.emit(name)
            return
        if self._build is None:
            self._wanted = name
            self.rail.show_page(name)
            return
        page = self.page(name)
        if spec.loadout_bar and self._header is None and self._header_factory is not None:
            self._header = self._header_factory()
            self._right_column.insertWidget(0, self._header)
        if self._header is not None:
            self._header.setVisible(spec.loadout_bar)
        self.rail.show_page(name)
        self._stack.setCurrentWidget(page)
        self.setWindowTitle(f"{spec.title} – Weft")
        if name != self._current:
            self._current = name
            self._state.setValue("page", name)
            page.entered()
            self.toasts.place()

    def _foot(self) -> int:
        page = self._pages.get(self._current)
        return page.foot_height() if page is not None else 0

    def page(self, name: str) -> Page:
        """The page with this name, built if need be."""
        if name not in self._pages:
            assert self._build is not None, "a page was asked for before the window was furnished"
            page = self._build(name)
            page.notice.connect(self.show_notice)
            page.failed.connect(self.show_error)
            page.page_wanted.connect(self.show_page)
            self._pages[name] = page
            self._stack.addWidget(page)
        return self._pages[name]

    def built(self, name: str) -> Page | None:
        """The page with this name if it has been built."""
        return self._pages.get(name)

    def close_pages(self) -> None:
        """Have every page save and end what it does in the background, all of them even when one fails."""
        with contextlib.ExitStack() as every:
            for page in self._pages.values():
                every.callback(page.shutdown)

    @property
    def state(self) -> QSettings:
        """Where geometry is remembered."""
        return self._state

    @property
    def current(self) -> str:
        """Name of the page in front."""
        return self._current

    @property
    def header(self) -> QWidget | None:
        """What stands along the top, once a page that wants it has been shown."""
        return self._header

    # Messages -------------------------------------------------------------------------------------

    @Slot(object)
    def show_notice(self, notice: Notice) -> None:
        """Show a toast; an important one also reaches the desktop when the window is not in front."""
        self.toasts.show(notice)
        if notice.important and not self.isActiveWindow() and self._notify is not None:
            self._notify("Weft", notice.text)

    @Slot(object)
    def show_error(self, error: WeftError) -> None:
        """Show a failure in a dialog. A cancellation is what the user asked for: a toast says so."""
        if error.kind is ErrorKind.CANCELLED:
            self.show_notice(Notice(text=error.message))
            return

        def build() -> QDialog:
            from app.views.dialogs import ErrorDialog

            return ErrorDialog(error, self, details=getattr(error, "detail", ""), log=getattr(error, "log", None))

        self.show_dialog(build)

    def show_dialog(self, build: Callable[[], QDialog]) -> None:
        """Show a dialog over the window; others wait until it is closed, so that they never pile up."""
        if self._dialog is not None:
            if len(self._waiting_dialogs) < 8:
                self._waiting_dialogs.append(build)
            return
        self._dialog = build()
        self._dialog.finished.connect(self._dialog_closed)
        self._dialog.open()

    @property
    def dialog(self) -> QDialog | None:
        """The dialog that is open now."""
        return self._dialog

    @Slot()
    def _dialog_closed(self) -> None:
        self._dialog = None
        if self._waiting_dialogs:
            QTimer.singleShot(0, self, self._next_dialog)

    @Slot()
    def _next_dialog(self) -> None:
        if self._dialog is None and self._waiting_dialogs:
            self.show_dialog(self._waiting_dialogs.pop(0))

    # Actions --------------------------------------------------------------------------------------

    def _add_actions(self) -> None:
        self.actions_by_name: dict[str, QAction] = {
            "palette": action(self, "Command palette", self.show_palette, "Ctrl+K"),
            "side": action(self, "Show or hide the side bar", self._toggle_side, "Ctrl+B"),
            "find": action(self, "Find on this page", self._find, "Ctrl+F"),
            "full_screen": action(self, "Full screen", self._toggle_full_screen, "F11"),
            "quit": action(self, "Quit Weft", self.close, "Ctrl+Q"),
        }
        if "settings" in self._specs:
            self.actions_by_name["settings"] = action(self, "Settings", lambda: self.show_page("settings"), "Ctrl+,")
        for number, name in enumerate(self.rail.names[:9], 1):
            action(self, self._specs[name].title, lambda name=name: self.show_page(name), f"Ctrl+{number}")

    def all_commands(self) -> list[PaletteCommand]:
        """What Ctrl+K offers now."""
        found = [
            PaletteCommand(
                title=spec.title,
                group="Page",
                icon=spec.icon,
                run=lambda name=spec.name: self.show_page(name),
                shortcut=f"Ctrl+{self.rail.names.index(spec.name) + 1}",
            )
            for spec in self._specs.values()
        ]
        icons = {"side": "side-bar", "find": "search", "full_screen": "open", "quit": "close"}
        for name, made in self.actions_by_name.items():
            if name in icons:
                found.append(
                    PaletteCommand(
                        title=made.text(),
                        group="Window",
                        icon=icons[name],
                        run=made.trigger,
                        shortcut=made.shortcut().toString(),
                    )
                )
        for page in self._pages.values():
            found += page.commands()
        return found + self._commands()

    def show_palette(self) -> None:
        if self._build is None:
            return
        from app.views.command_palette import CommandPalette

        CommandPalette(self.all_commands(), self).show()

    def _toggle_side(self) -> None:
        if self._current:
            self.page(self._current).toggle_side()

    def _find(self) -> None:
        if self._current:
            self.page(self._current).find_in_page()

    def _toggle_full_screen(self) -> None:
        self.setWindowState(self.windowState() ^ Qt.WindowState.WindowFullScreen)

    def come_to_front(self) -> None:
        """Raise the window, also out of the task bar: a second start asked for it."""
        self.setWindowState(self.windowState() & ~Qt.WindowState.WindowMinimized)
        self.show()
        self.raise_()
        self.activateWindow()

    # Files ----------------------------------------------------------------------------------------

    def take(self, paths: list[Path]) -> bool:
        """Give files to the page in front if it wants them, else to the first that does. False when none does.

        Names do not tell models from adapters, so those are sorted out first, whatever page is in front.
        """
        if self._build is None:
            return False
        if self._current in SORTED_FIRST and self._sort is not None and self._sort(paths):
            return True
        order = [self._current, *(name for name in self.rail.names if name != self._current)]
        for name in order:
            if name and not self._specs[name].window and self.page(name).accepts(paths):
                self.show_page(name)
                self.page(name).take(paths)
                return True
        return False

    def dragEnterEvent(self, event: QDragEnterEvent) -> None:
        if event.mimeData().hasUrls() and local_paths(event.mimeData().urls()):
            event.acceptProposedAction()

    def dropEvent(self, event: QDropEvent) -> None:
        paths = local_paths(event.mimeData().urls())
        event.acceptProposedAction()
        if not self.take(paths):
            names = ", ".join(path.name for path in paths[:3])
            self.show_notice(
                Notice(
                    text=f"Weft has no use for {names}. Drop models or adapters: folders, .gguf, .safetensors or .zip files.",
                    tone="warning",
                )
            )

    # State ----------------------------------------------------------------------------------------

    def _restore(self) -> None:
        geometry = self._state.value("geometry")
        if not (isinstance(geometry, QByteArray) and self.restoreGeometry(geometry)):
            room = self.screen().availableSize()
            self.resize(min(1280, room.width()), min(800, room.height()))

    def remembered_page(self, default: str) -> str:
        """The page that was in front last time, if it still exists."""
        name = self._state.value("page", default)
        return name if isinstance(name, str) and name in self._specs else default

    def closeEvent(self, event: QCloseEvent) -> None:
        self._state.setValue("geometry", self.saveGeometry())
        self._state.sync()
        self.closing.emit()
        super().closeEvent(event)

    def changeEvent(self, event: QEvent) -> None:
        super().changeEvent(event)
        if event.type() == QEvent.Type.PaletteChange:
            for widget in self.findChildren(QWidget):
                widget.update()
