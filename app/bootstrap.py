"""The composition root: the only place that builds stores, workers and the window, and ties them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from PySide6.QtCore import QObject, QSettings, Qt, QTimer, Slot
from PySide6.QtGui import QGuiApplication
from PySide6.QtWidgets import QApplication

from app import __version__, logs
from app.core.errors import ErrorKind, WeftError
from app.core.paths import Paths, default_paths
from app.store.chats import ChatStore
from app.store.database import Database
from app.store.jobs import JobStore
from app.store.library import LibraryStore
from app.store.model_settings import ModelSettings
from app.store.settings import SettingsStore
from app.views import theme
from app.views.main_window import MainWindow
from app.views.page import Page, PageSpec
from app.workers.single_instance import SingleInstance, absolute


def main(argv: Sequence[str]) -> int:
    """Open the window, with files to take. Returns the exit status; a second start hands over to the first and returns 0."""
    paths = default_paths()
    QGuiApplication.setHighDpiScaleFactorRoundingPolicy(Qt.HighDpiScaleFactorRoundingPolicy.PassThrough)
    application = QApplication([sys.argv[0]])
    application.setApplicationName("weft")
    application.setApplicationDisplayName("Weft")
    application.setApplicationVersion(__version__)
    application.setDesktopFileName("weft")
    try:
        instance = SingleInstance(paths)
        if not instance.claim():
            instance.hand_over(absolute(list(argv)))
            return 0
        reporter = logs.install(paths.logs)
        house = House(application, paths, instance, reporter)
    except (WeftError, OSError) as error:
        return _cannot_start(error)
    house.open(absolute(list(argv)))
    status = application.exec()
    house.close()
    return status


def _cannot_start(error: WeftError | OSError) -> int:
    """There is no window yet to show it in: a dialog of its own, and the terminal."""
    from app.views.dialogs import ErrorDialog

    if not isinstance(error, WeftError):
        error = WeftError(ErrorKind.PERMISSION, f"Weft cannot start: {error}.", "Set WEFT_HOME to a folder that you can write to.")
    print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
    if not os.environ.get("QT_QPA_PLATFORM") == "offscreen":
        theme.theme()
        ErrorDialog(error).exec()
    return 1


class House(QObject):
    """Everything that lives as long as the window: stores, view models, workers, and the ties between them."""

    def __init__(self, application: QApplication, paths: Paths, instance: SingleInstance | None, reporter: logs.Reporter) -> None:
        super().__init__(application)
        self.paths = paths
        self._instance = instance
        self._reporter = reporter
        self.settings = SettingsStore(paths.settings)
        self.database = Database(paths.database)
        self.chats = ChatStore(self.database)
        self.jobs = JobStore(self.database)
        self.library = LibraryStore(self.database)
        self.model_settings = ModelSettings(self.database)
        self.theme = theme.install(application, self.settings.settings.appearance)
        self.window = MainWindow(self._pages(), state=_window_state(paths))
        if instance is not None:
            instance.received.connect(self._second_start)

    def _pages(self) -> list[PageSpec]:
        """The rail, from top to bottom. Another page is another line here and its `build` below."""
        return [
            PageSpec(name="chat", title="Chat", icon="chat", build=Page, loadout_bar=True),
            PageSpec(name="models", title="Models", icon="models", build=Page),
            PageSpec(name="jobs", title="Jobs", icon="jobs", build=Page, bottom=True),
            PageSpec(name="settings", title="Settings", icon="settings", build=Page, bottom=True),
        ]

    def open(self, arguments: Sequence[str] = ()) -> None:
        """Show the window; what first paint does not need starts after it."""
        self.window.show_page(self.window.remembered_page("chat"))
        self.window.show()
        self._arguments = list(arguments)
        QTimer.singleShot(0, self, self._settle)

    @Slot()
    def _settle(self) -> None:
        self._take(self._arguments)

    @Slot(list)
    def _second_start(self, arguments: list[str]) -> None:
        self.window.come_to_front()
        self._take(arguments)

    def _take(self, arguments: Sequence[str]) -> None:
        files = [Path(argument) for argument in arguments if "://" not in argument]
        if files:
            self.window.take(files)

    def close(self) -> None:
        """Stop every worker and let go of the files. Nothing runs on after this."""
        self.database.close()
        if self._instance is not None:
            self._instance.release()
        logs.uninstall()


def _window_state(paths: Paths) -> QSettings:
    """Where geometry is remembered: the platform's place, or under WEFT_HOME."""
    if os.environ.get("WEFT_HOME"):
        return QSettings(str(paths.config / "window.ini"), QSettings.Format.IniFormat)
    return QSettings(QSettings.Format.IniFormat, QSettings.Scope.UserScope, "weft", "window")
