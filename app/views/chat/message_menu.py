"""A message's context menu: what its buttons do, and copying a part of its text."""

from __future__ import annotations

from collections.abc import Callable

from PySide6.QtCore import Qt
from PySide6.QtWidgets import QMenu, QWidget

from app.views.chat.markdown_view import MarkdownView
from app.views.icons import icon


def message_menu(
    view: MarkdownView,
    request: Callable[[str], None],
    *,
    editing: bool,
    enabled: bool,
    can_continue: bool,
    parent: QWidget,
) -> QMenu:
    """The menu, which deletes itself when it closes.

    Args:
        view: the message's text. request: gets the name of the action that was chosen.
        editing: an editor stands in the text's place. enabled: messages can be changed now.
    """
    menu = QMenu(parent)
    menu.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
    if view.textCursor().hasSelection():
        menu.addAction(icon("copy"), "Copy selection", view.copy)
    menu.addAction(icon("copy"), "Copy message", lambda: request("copy"))
    select = menu.addAction("Select all", view.selectAll)
    select.setEnabled(not editing)
    menu.addSeparator()
    for name, title, mark in (
        ("edit", "Edit\N{HORIZONTAL ELLIPSIS}", "edit"),
        ("regenerate", "Answer again", "reload"),
        ("continue", "Continue", "continue"),
        ("delete", "Delete from here", "trash"),
    ):
        made = menu.addAction(icon(mark), title, lambda name=name: request(name))
        made.setEnabled(enabled and (name != "continue" or can_continue))
    return menu
