"""What a page is, and the one line that adds it to the window.

The rail is a tuple of `PageSpec`s (`app.rail`). `House.build` imports a page's module and makes it with what it needs when it is
first shown, so hidden pages cost nothing at start. A page speaks to the window through the signals below, and knows nothing of other pages.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec
from PySide6.QtCore import Signal
from PySide6.QtWidgets import QWidget


class PaletteCommand(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that Ctrl+K can do.

    Attributes:
        title: what a person types a part of ("New chat", a model's or a conversation's name).
        group: shown small beside it ("Chat", "Model", "Conversation").
        run: called when it is chosen.
        shortcut: shown at the right, as people know it ("Ctrl+N").
        enabled: false shows it greyed.
    """

    title: str
    group: str
    run: Callable[[], object]
    shortcut: str = ""
    icon: str = ""
    enabled: bool = True


class Notice(msgspec.Struct, frozen=True, kw_only=True):
    """A short message that goes away by itself, with at most one button.

    Attributes:
        tone: how it looks. `important` also reaches the desktop when the window is not in front.
        action, run: the button's text and what it does (undo, show).
    """

    text: str
    tone: Literal["info", "positive", "warning", "negative"] = "info"
    action: str = ""
    run: Callable[[], object] | None = None
    important: bool = False


class Page(QWidget):
    """One page of the window. Everything here is optional."""

    notice = Signal(object)  # Notice
    failed = Signal(object)  # WeftError: shown in the error dialog
    page_wanted = Signal(str)  # go to the page with this name

    def entered(self) -> None:
        """The page has come to the front: set the focus where work starts."""

    def commands(self) -> list[PaletteCommand]:
        """What Ctrl+K offers because of this page, whether it is in front or not."""
        return []

    def find_in_page(self) -> None:
        """Ctrl+F: find on this page."""

    def toggle_side(self) -> None:
        """Ctrl+B: show or hide this page's side bar."""

    def foot_height(self) -> int:
        """How many pixels at the page's lower end toasts are to leave free: what somebody types in."""
        return 0

    def shutdown(self) -> None:
        """The window is going: save, and end what runs in the background."""

    def accepts(self, paths: list[Path]) -> bool:
        """Whether these dropped (or handed over) files are this page's. Reads names only."""
        return False

    def take(self, paths: list[Path]) -> None:
        """Take files that `accepts` said yes to."""


class PageSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of the rail.

    Attributes:
        name: stable, for code and settings. title: on the rail. icon: file of resources/icons.
        bottom: stands in the lower part of the rail.
        loadout_bar: the loadout bar runs along the top of this page.
        window: it opens a window of its own instead of a page.
    """

    name: str
    title: str
    icon: str
    bottom: bool = False
    loadout_bar: bool = False
    window: bool = False
