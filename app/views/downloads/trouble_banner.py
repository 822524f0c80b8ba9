"""What went wrong between Weft and the hub, above the list, with the buttons that help."""

from __future__ import annotations

import re

from PySide6.QtCore import QUrl, Signal, Slot
from PySide6.QtGui import QDesktopServices
from PySide6.QtWidgets import QAbstractButton, QWidget

from app.core.errors import ErrorKind, WeftError
from app.views.widgets import Banner, button, icon_button

_ADDRESS = re.compile(r"https?://[^\s,]+[^\s,.;:]")
_NEAR = re.compile(r"Did you mean ([^?]+)\?")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class TroubleBanner(Banner):
    """Hidden while nothing is amiss.

    Signals:
        near_wanted(str): a repository whose name comes near was chosen. settings_wanted; again_wanted.
    """

    near_wanted = Signal(str)
    settings_wanted = Signal()
    again_wanted = Signal()

    def __init__(self) -> None:
        super().__init__("negative", slim=True)
        self.page = ""
        self._waiting = False  # it says why the hub takes its time
        self.near = [button("", self._choose_near, kind="link") for _ in range(2)]
        self.open_page = button("Open page", self._open, kind="link", icon_name="open")
        self.open_settings = button("Settings", self.settings_wanted.emit, kind="link", icon_name="settings")
        self.again = button("Try again", self.again_wanted.emit, kind="link", icon_name="reload")
        self._helps: tuple[QWidget, ...] = (*self.near, self.open_page, self.open_settings, self.again)
        for made in self._helps:
            self.add(made)
        self.add(icon_button("close", "Dismiss", self.hide))
        self.hide()

    def show_error(self, error: WeftError) -> None:
        """Say what failed."""
        text = f"{error.message} {error.hint}"
        found = _ADDRESS.search(text)
        # Not what somebody typed and is none of the hub's.
        self.page = found[0] if found and error.kind is not ErrorKind.BAD_INPUT else ""
        near = _NEAR.search(text)
        names = list(dict.fromkeys(_NAME.findall(near[1]))) if near is not None else []
        helps: list[QWidget] = []
        for made, name in zip(self.near, names, strict=False):
            made.setText(name)
            made.setAccessibleName(name)
            helps.append(made)
        helps += [self.open_page] if self.page else []
        helps += [self.open_settings] if "Settings" in text else []
        helps += [self.again] if error.kind is ErrorKind.NETWORK else []
        self._waiting = False
        self._say("warning" if error.kind in (ErrorKind.BAD_INPUT, ErrorKind.NOT_FOUND) else "negative", text, helps)

    def show_wait(self, why: str) -> None:
        """Say why an answer takes longer than one expects; "" when it does no more."""
        if why:
            self._waiting = True
            self._say("warning", why, [])
        elif self._waiting:
            self._waiting = False
            self.hide()

    def _say(self, tone: str, text: str, helps: list[QWidget]) -> None:
        self.set_tone(tone)
        self.text.setText(text)
        for made in self._helps:
            made.setVisible(made in helps)
        self.show()

    @Slot()
    def _choose_near(self) -> None:
        made = self.sender()
        if isinstance(made, QAbstractButton):
            self.near_wanted.emit(made.text())

    @Slot()
    def _open(self) -> None:
        QDesktopServices.openUrl(QUrl(self.page))
