"""The Settings page: where downloads go, and what was measured on this machine."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest
from PySide6.QtCore import Qt
from pytestqt.qtbot import QtBot

from app.core.errors import ErrorKind, WeftError
from app.store.settings import SettingsStore
from app.viewmodels.library_roots import LibraryRoots
from app.viewmodels.settings import SettingsView
from app.views.settings.download_folder import DownloadFolder
from app.views.settings.performance import PerformanceSection
from tests.qt.shell_parts import Rooms


def test_downloads_go_where_the_settings_say_and_the_former_folder_stays_in_the_library(
    rooms: Rooms, qtbot: QtBot, tmp_path: Path
) -> None:
    roots = LibraryRoots(rooms.settings, rooms.paths)
    shown = DownloadFolder(roots)
    qtbot.addWidget(shown)
    shown.show()
    assert roots.downloads() == rooms.paths.models and not shown.reset.isVisible()
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    with qtbot.waitSignal(roots.changed):
        shown.take(first)
    assert SettingsStore(rooms.paths.settings).settings.downloads == str(first)
    assert str(first) in shown.where.accessibleName() and shown.reset.isVisible()
    shown.take(second)
    listed = [root.path for root in roots.roots()]
    assert str(first) in listed and str(second) in listed, "what came into the first one is not lost"
    qtbot.keyClick(shown.reset, Qt.Key.Key_Space)
    assert roots.is_own_downloads() and rooms.settings.settings.downloads == ""
    assert {str(first), str(second)} <= {root.path for root in roots.roots()}
    shown.take(rooms.paths.models if rooms.paths.models.is_dir() else None)
    assert rooms.settings.settings.downloads == ""


@pytest.mark.fault
def test_a_folder_that_cannot_take_downloads_is_refused(
    rooms: Rooms, qtbot: QtBot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = DownloadFolder(LibraryRoots(rooms.settings, rooms.paths))
    qtbot.addWidget(shown)
    errors: list[WeftError] = []
    shown.failed.connect(errors.append)
    shown.take(tmp_path / "gone")
    monkeypatch.setattr(os, "access", lambda *_: False)  # the tests may run as root, whom nothing is refused
    shown.take(tmp_path)
    assert [error.kind for error in errors] == [ErrorKind.NOT_FOUND, ErrorKind.PERMISSION]
    assert all(error.hint for error in errors)
    assert rooms.settings.settings.downloads == ""


def test_what_was_measured_is_said_and_can_be_measured_again(rooms: Rooms, qtbot: QtBot) -> None:
    here, other = platform.node() or "here", "another machine"
    settings = SettingsView(rooms.settings)
    shown = PerformanceSection(settings)
    qtbot.addWidget(shown)
    assert not shown.again.isEnabled() and "next loaded" in shown.text.text()
    rooms.settings.update(
        calibration={
            f"{here}/llama_cpp/threads/8/24": 1,
            f"{here}/llama_cpp/threads/8/33": 6,
            f"{other}/llama_cpp/threads/2/24": 2,
        }
    )
    shown.show_now()
    assert "1 thread or 6 threads" in shown.text.text()
    shown.again.click()
    assert list(rooms.settings.load().calibration) == [f"{other}/llama_cpp/threads/2/24"]
    assert not shown.again.isEnabled() and "next loaded" in shown.text.text()
