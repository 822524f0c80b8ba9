"""The composition root: a frame of a window first, then (app.house) stores, workers and pages, and the ties between them.

Nothing is imported at the top that the first paint does not need: it comes at the price of a bare Qt window.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from PySide6.QtCore import QObject, QSettings, Qt, Slot
from PySide6.QtGui import QGuiApplication
from PySide6.QtWidgets import QApplication

from app import __version__
from app.core.paths import Paths, default_paths
from app.rail import RAIL
from app.views import theme
from app.views.main_window import MainWindow
from app.workers.garbage import GarbageCollector
from app.workers.single_instance import SingleInstance, absolute

if TYPE_CHECKING:
    from app.house import House


def main(argv: Sequence[str]) -> int:
    """Open the window, with files to take. Returns the exit status; a second start hands over to the first and returns 0."""
    # Python's own handler would only run when Qt next calls Python. Ctrl+C in a terminal ends the window at once; what is written
    # is safe (SQLite), and engines end when their pipe does.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    paths = default_paths()
    QGuiApplication.setHighDpiScaleFactorRoundingPolicy(Qt.HighDpiScaleFactorRoundingPolicy.PassThrough)
    application = QApplication([sys.argv[0]])
    application.setApplicationName("weft")
    application.setApplicationDisplayName("Weft")
    application.setApplicationVersion(__version__)
    application.setDesktopFileName("weft")
    arguments = absolute(list(argv))
    from app.core.errors import WeftError

    try:
        instance = SingleInstance(paths)
        if not instance.claim():
            instance.hand_over(arguments)
            print("Weft is already running: its window was brought to the front.")
            return 0
    except (WeftError, OSError) as error:
        return _cannot_start(error)
    start = Start(application, paths, instance, arguments)
    status = application.exec()
    start.close()
    instance.release()
    return start.status or status


class Start(QObject):
    """From the frame of the window to the furnished house."""

    def __init__(
        self, application: QApplication, paths: Paths, instance: SingleInstance, arguments: Sequence[str]
    ) -> None:
        super().__init__(application)
        self._application = application
        self._paths = paths
        self._instance = instance
        self._arguments = list(arguments)
        self.house: House | None = None
        self.status = 0
        self._garbage = GarbageCollector(self)
        self.theme = theme.install(application, saved_appearance(paths))
        self.window = MainWindow(RAIL, state=window_state(paths))
        self.window.painted.connect(self._furnish)
        self.window.show_page(self.window.remembered_page("chat"))
        self.window.show()

    @Slot()
    def _furnish(self) -> None:
        """The frame is on the screen: build everything else."""
        from app import logs

        try:
            from app.house import House

            reporter = logs.install(self._paths.logs)
            self.house = House(self._application, self._paths, self.window, self.theme, reporter)
            self._instance.received.connect(self.house.second_start)
            self._instance.listen()
            self.house.open(self._arguments)
        except Exception as error:  # noqa: BLE001  (whatever it is: an empty frame that says nothing helps nobody)
            logs.log.exception("Weft cannot start")
            self.window.hide()
            self.status = _cannot_start(error)
            self._application.quit()
            return
        self._garbage.settle()

    def close(self) -> None:
        """End what was begun, in the reverse order."""
        if self.house is not None:
            self.house.close()
        self._garbage.close()
        from app import logs

        logs.uninstall()


def saved_appearance(paths: Paths) -> theme.Appearance:
    """The colours that were chosen: a quick look that the settings' store repeats with care a moment later."""
    import tomllib

    try:
        found = tomllib.loads(paths.settings.read_text("utf-8")).get("appearance")
    except (OSError, ValueError):
        return "system"
    return found if found in ("light", "dark") else "system"


def window_state(paths: Paths) -> QSettings:
    """Where geometry is remembered: the platform's place, or under WEFT_HOME."""
    if os.environ.get("WEFT_HOME"):
        return QSettings(str(paths.config / "window.ini"), QSettings.Format.IniFormat)
    return QSettings(QSettings.Format.IniFormat, QSettings.Scope.UserScope, "weft", "window")


def _cannot_start(error: Exception) -> int:
    """There is no window to show it in: a dialog of its own, and the terminal."""
    from app.core.errors import ErrorKind, WeftError
    from app.views.dialogs import ErrorDialog

    if isinstance(error, OSError):
        error = WeftError(
            ErrorKind.PERMISSION, f"Weft cannot start: {error}.", "Set WEFT_HOME to a folder that you can write to."
        )
    elif not isinstance(error, WeftError):
        error = WeftError(
            ErrorKind.INTERNAL,
            f"Weft cannot start: {type(error).__name__}: {error}.",
            "Install it anew, or go back to the version before. Please report this with the log.",
        )
    print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
    if QGuiApplication.platformName() != "offscreen":
        theme.theme()
        ErrorDialog(error).exec()
    return 1
