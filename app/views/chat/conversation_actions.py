"""What is done with whole conversations: renaming, pinning, deleting, and taking a deletion back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from PySide6.QtCore import QEvent, QObject, QTimer, Signal, Slot
from PySide6.QtGui import QKeyEvent, QKeySequence
from PySide6.QtWidgets import QWidget

from app.viewmodels.chat import ChatController
from app.viewmodels.chat_list import ConversationList
from app.views.chat.frame import ChatFrame
from app.views.chat.undos import Undos
from app.views.page import Notice
from app.views.trying import attempt


class ConversationActions(QObject):
    """Does what the list of conversations asks for.

    Args:
        leave: keeps what is typed before another conversation comes into view.

    Attributes:
        undos: the deletions, of messages too, that can be taken back.

    Signals:
        notice, failed: as the page's.
    """

    notice = Signal(object)
    failed = Signal(object)

    def __init__(
        self,
        controller: ChatController,
        model: ConversationList,
        frame: ChatFrame,
        leave: Callable[[], None],
        page: QWidget,
    ) -> None:
        super().__init__(page)
        self._controller, self._model, self._leave = controller, model, leave
        self._side, self._composer = frame.side, frame.composer
        self.undos = Undos()
        self._side.pin_wanted.connect(self._pin)
        self._side.delete_wanted.connect(self.delete)
        model.renamed.connect(self._rename)
        controller.undoable.connect(self.undoable)
        self._composer.edit.installEventFilter(self)

    @Slot(int, str)
    def _rename(self, conversation: int, title: str) -> None:
        # Later: the view is still closing its editor, and the list is about to be read again.
        QTimer.singleShot(0, self, lambda: attempt(lambda: self._controller.rename(conversation, title), self.failed))

    def rename_current(self) -> None:
        """Edit the title of the conversation that is chosen in the list, else of the one in view."""
        focused = self._side.list.currentIndex() if self._side.list.hasFocus() else None
        row = self._model.conversation(focused.row()) if focused is not None and focused.isValid() else None
        id = row.id if row is not None else self._controller.conversation_id
        if id:
            self._side.show()
            self._side.rename(id)

    @Slot(int, bool)
    def _pin(self, conversation: int, pinned: bool) -> None:
        attempt(lambda: self._controller.set_pinned(conversation, pinned), self.failed)

    @Slot(int)
    def delete(self, conversation: int) -> None:
        """Put a conversation into the bin."""
        self._leave()
        attempt(lambda: self._controller.delete(conversation), self.failed)

    @Slot(str, object)
    def undoable(self, text: str, undo: Callable[[], object]) -> None:
        """Something was deleted: offer to take that back."""
        once = self.undos.add(partial(attempt, undo, self.failed), self._composer.text)
        self.notice.emit(Notice(text=text, action="Undo", run=once))

    def eventFilter(self, watched: QObject, event: QEvent) -> bool:
        if (
            event.type() == QEvent.Type.ShortcutOverride
            and isinstance(event, QKeyEvent)
            and event.matches(QKeySequence.StandardKey.Undo)
            and not self._undoes_typing()
        ):
            event.ignore()  # the page's shortcut has it, not the text
            return True
        return super().eventFilter(watched, event)

    def _undoes_typing(self) -> bool:
        """Whether Ctrl+Z in the composer belongs to its text: something was typed since the last deletion, or none is left."""
        if not self.undos:
            return True
        return self.undos.typed_since(self._composer.text) and self._composer.edit.document().isUndoAvailable()
