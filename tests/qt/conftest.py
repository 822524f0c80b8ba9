"""What every test of the window gets: waits as long as a busy machine with two processors may need."""

from __future__ import annotations

from pytestqt.qtbot import QtBot

# What a test waits for comes within milliseconds; a wait costs its whole time only where the test fails anyway.
for wait in (QtBot.waitUntil, QtBot.waitSignal, QtBot.waitSignals, QtBot.waitExposed):
    assert wait.__kwdefaults__ is not None
    wait.__kwdefaults__["timeout"] = 20_000
