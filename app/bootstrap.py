"""The composition root: the only place that builds stores, workers and the window, and ties them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from PySide6.QtCore import QSettings, Qt
from PySide6.QtGui import QGuiApplication
from PySide6.QtWidgets import QApplication

from app import __version__, logs
from app.core.errors import ErrorKind, WeftError
from app.core.paths import Paths, default_paths
from app.house import House
from app.views import theme
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
    arguments = absolute(list(argv))
    try:
        instance = SingleInstance(paths)
        if not instance.claim():
            instance.hand_over(arguments)
            return 0
        reporter = logs.install(paths.logs)
        house = House(application, paths, window_state(paths), reporter)
    except (WeftError, OSError) as error:
        return _cannot_start(error)
    instance.received.connect(house.second_start)
    house.open(arguments)
    status = application.exec()
    house.close()
    instance.release()
    logs.uninstall()
    return status


def window_state(paths: Paths) -> QSettings:
    """Where geometry is remembered: the platform's place, or under WEFT_HOME."""
    if os.environ.get("WEFT_HOME"):
        return QSettings(str(paths.config / "window.ini"), QSettings.Format.IniFormat)
    return QSettings(QSettings.Format.IniFormat, QSettings.Scope.UserScope, "weft", "window")


def _cannot_start(error: WeftError | OSError) -> int:
    """There is no window yet to show it in: a dialog of its own, and the terminal."""
    from app.views.dialogs import ErrorDialog

    if not isinstance(error, WeftError):
        error = WeftError(ErrorKind.PERMISSION, f"Weft cannot start: {error}.", "Set WEFT_HOME to a folder that you can write to.")
    print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
    if QGuiApplication.platformName() != "offscreen":
        theme.theme()
        ErrorDialog(error).exec()
    return 1


