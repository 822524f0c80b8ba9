"""The whole window over a home of its own, for the tests that want nothing less."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

from PySide6.QtCore import QSettings
from PySide6.QtWidgets import QApplication
from pytestqt.qtbot import QtBot

from app import logs
from app.core.paths import default_paths
from app.house import House
from app.rail import RAIL
from app.views import theme
from app.views.main_window import MainWindow

WAIT = 20_000


def lived_in(
    qtbot: QtBot, home: Path, *, settings: str = "", ready: Callable[[House], object] = lambda _: None
) -> Iterator[House]:
    """A fixture's `yield from`: a house that is open and has found its two starters, and is closed afterwards.

    Args:
        settings: more lines of settings.toml. ready: called before the test begins.
    """
    home.mkdir(parents=True, exist_ok=True)
    (home / "settings.toml").write_text(f"load_last = false\n{settings}")
    application = QApplication.instance()
    assert isinstance(application, QApplication)
    window = MainWindow(RAIL, state=QSettings(str(home / "window.ini"), QSettings.Format.IniFormat))
    qtbot.addWidget(window)
    window.show_page("chat")
    window.show()
    look = theme.install(application, "light")
    made = House(application, default_paths(), window, look, logs.Reporter())
    made.open()
    qtbot.waitUntil(lambda library=made.library: library.count() >= 2, timeout=WAIT)
    ready(made)
    yield made
    window.close()
    made.close()
    made.deleteLater()
    qtbot.wait(20)
    del made, window, look
    gc.collect()  # here: another thread that happens to collect would free Qt's objects outside theirs
