"""What the desktop is told when the window is not in front."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import pytest
from PySide6.QtWidgets import QApplication, QSystemTrayIcon, QWidget
from pytestqt.qtbot import QtBot

from app.house_notify import DesktopNotices


@pytest.mark.skipif(os.name == "nt", reason="a stand-in for notify-send is a POSIX script")
def test_a_desktop_without_a_tray_is_told_through_its_notification_service(
    qtbot: QtBot, qapp: QApplication, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "told"
    command = tmp_path / "bin" / "notify-send"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > "{told}.part" && mv "{told}.part" "{told}"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(command.parent), prepend=os.pathsep)
    monkeypatch.setattr(QSystemTrayIcon, "isSystemTrayAvailable", lambda: False)
    window = QWidget()
    qtbot.addWidget(window)
    DesktopNotices(qapp, cast(Any, window)).tell("Download finished", "--user/tiny is in the library.")
    qtbot.waitUntil(told.is_file, timeout=10_000)
    assert told.read_text().splitlines() == [
        "--app-name=Weft",
        "--",
        "Download finished",
        "--user/tiny is in the library.",
    ]
