"""What every test of the window gets: waits as long as a busy machine with two processors may need; and what many share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pytestqt.qtbot import QtBot

from tests.qt.shell_parts import Rooms

# What a test waits for comes within milliseconds; a wait costs its whole time only where the test fails anyway.
for wait in (QtBot.waitUntil, QtBot.waitSignal, QtBot.waitSignals, QtBot.waitExposed):
    assert wait.__kwdefaults__ is not None
    wait.__kwdefaults__["timeout"] = 20_000


@pytest.fixture
def rooms(home: Path, qtbot: QtBot) -> Iterator[Rooms]:
    """Stores and view models in the test's home."""
    made = Rooms.build()
    yield made
    made.close()
    qtbot.wait(20)
