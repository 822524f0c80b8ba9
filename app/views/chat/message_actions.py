"""What is done with the messages in view: their buttons, editing, links, and walking over them by keyboard."""

from __future__ import annotations

from PySide6.QtCore import QObject, Signal, Slot
from PySide6.QtGui import QGuiApplication
from PySide6.QtWidgets import QWidget

from app.viewmodels.chat import ChatController
from app.viewmodels.chat_reasoning import without_reasoning
from app.views.chat.frame import ChatFrame
from app.views.page import Notice


class MessageActions(QObject):
    """Does what the transcript asks for.

    Signals:
        notice(Notice): for the window.
    """

    notice = Signal(object)

    def __init__(self, controller: ChatController, frame: ChatFrame, page: QWidget) -> None:
        super().__init__(page)
        self._controller, self._page = controller, page
        self._transcript, self._composer = frame.transcript, frame.composer
        self._transcript.requested.connect(self.requested)
        self._transcript.edited.connect(self._edited)
        self._transcript.link_activated.connect(self.link)

    @Slot(int, str)
    def requested(self, message: int, what: str) -> None:
        """A button of a message, by its name."""
        controller = self._controller
        if what == "copy":
            text = controller.text(message)
            role = controller.message(message).role
            QGuiApplication.clipboard().setText(without_reasoning(text) if role == "assistant" else text)
            self.notice.emit(Notice(text="Message copied."))
        elif what == "show":
            self._transcript.show_message(message)
        elif controller.writing_conversation:
            return
        elif what != "edit":
            # Its button goes or is disabled: the keyboard would land on whatever comes next.
            self._composer.edit.setFocus()
            self._change(message, what)

    def _change(self, message: int, what: str) -> None:
        controller = self._controller
        if what == "regenerate":
            controller.regenerate(message)
            self._transcript.jump_to_latest()
        elif what == "continue":
            controller.continue_(message)
        elif what == "delete":
            controller.delete_message(message)
        elif what in ("previous", "next"):
            controller.switch_branch(message, -1 if what == "previous" else 1)

    @Slot(int, str)
    def _edited(self, message: int, text: str) -> None:
        if self._controller.edit(message, text):
            self._composer.edit.setFocus()
        elif (view := self._transcript.view_of(message)) is not None:
            view.edit(text)  # nothing typed is lost

    def regenerate_last(self) -> None:
        path = self._controller.path
        if path and not self._controller.writing_conversation:
            self.requested(path[-1].id, "regenerate")

    def walk(self, step: int) -> None:
        """Move the keyboard from message to message."""
        current = next((view.message.id for view in self._transcript.views if view.hasFocus()), 0)
        target = self._transcript.neighbour(current, step)
        if target:
            self._transcript.focus_message(target)
        elif step > 0:
            self._composer.edit.setFocus()

    @Slot(str)
    def link(self, target: str) -> None:
        """Ask before a web page is opened."""
        from app.views.chat.link_dialog import LinkDialog

        LinkDialog(target, self._page).open()
