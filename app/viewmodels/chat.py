"""ChatController: the conversation in view, its branches, and the answer being written. No widgets.

What is in view lies in `chat_open.py`, asking in `chat_asking.py`, the answer on its way into the store in `chat_answers.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec
from PySide6.QtCore import QObject, Signal, Slot

from app.core.conversation import Conversation, StoredMessage
from app.core.errors import WeftError
from app.core.options import OptionValue
from app.store.chats import ChatStore
from app.viewmodels.chat_answers import AnswerWriter, Ending
from app.viewmodels.chat_asking import Asker
from app.viewmodels.chat_open import Defaults, OpenChat
from app.viewmodels.chat_request import unseen

if TYPE_CHECKING:
    from app.viewmodels.loadout import Loadout


class ChatController(QObject):
    """What the Chat page shows and does.

    Signals:
        opened: another conversation is in view (or a new, empty chat).
        path_changed: the messages in view are others.
        message_changed: a message in view was completed or got an error; its id.
        streamed: text came for a message in view; its id and the text.
        activity_changed: a generation began or ended, or the model's state changed.
        conversations_changed: the list of conversations is another.
        undoable: something was deleted; a sentence and the function that takes it back.
        failed: a WeftError worth a dialog.
    """

    opened = Signal()
    path_changed = Signal()
    message_changed = Signal(int)
    streamed = Signal(int, str)
    activity_changed = Signal()
    conversations_changed = Signal()
    undoable = Signal(str, object)
    failed = Signal(object)

    def __init__(
        self,
        store: ChatStore,
        loadout: Loadout,
        defaults: Defaults = lambda: ("", {}),
        parent: QObject | None = None,
    ) -> None:
        """`defaults` gives the system prompt and the sampling that a new chat begins with."""
        super().__init__(parent)
        self._store = store
        self._open = OpenChat(store, defaults, self.failed.emit)
        self._writer = AnswerWriter(store, loadout, self)
        self._writer.begun.connect(self.activity_changed)
        self._writer.streamed.connect(self._streamed)
        self._writer.ended.connect(self._ended)
        self._writer.failed.connect(self.failed)
        loadout.changed.connect(self.activity_changed)
        self._asker = Asker(store, loadout, self._open, self._writer, self)
        self._asker.opened.connect(self.opened)
        self._asker.path_changed.connect(self.path_changed)
        self._asker.activity_changed.connect(self.activity_changed)
        self._asker.conversations_changed.connect(self.conversations_changed)
        self._asker.failed.connect(self.failed)

    # What is in view ------------------------------------------------------------------------------

    @property
    def conversation(self) -> Conversation | None:
        """The conversation in view; None while a new chat has no message yet."""
        return self._open.conversation

    @property
    def conversation_id(self) -> int:
        return self._open.id

    @property
    def path(self) -> list[StoredMessage]:
        """The messages in view, oldest first. The text of the one being written is as of its last save: see `text`."""
        return self._open.path

    def text(self, message: int) -> str:
        """A message's text, up to the last batch."""
        written = self._writer.text(message)
        return self._open.tree[message].content if written is None else written

    def message(self, message: int) -> StoredMessage:
        return self._open.tree[message]

    def branches(self, message: int) -> tuple[int, int]:
        """Which of how many branches this message is: (1, 1) where there is only one."""
        return self._open.branches(message)

    def error(self, message: int) -> WeftError | None:
        """Why this answer broke off, if it did in this session."""
        return self._open.errors.get(message)

    @property
    def unseen(self) -> int:
        """How many of the messages in view, from the top, the model was not shown for its last answer."""
        return unseen(self.path)

    @property
    def writing(self) -> int:
        """The message in view that is being written, or 0."""
        generation = self._writer.generation
        return generation.message if generation is not None and generation.conversation == self.conversation_id else 0

    @property
    def received(self) -> bool:
        """Whether the answer being written has begun to come."""
        return self._writer.received

    @property
    def writing_conversation(self) -> int:
        """The conversation, in view or not, that an answer is being written into; 0 for none."""
        return self._writer.conversation

    @property
    def system(self) -> str:
        return self._open.system

    @property
    def sampling(self) -> dict[str, OptionValue]:
        """The sampling fields that were chosen for this conversation; the model's own settings stand for the others."""
        return self._open.sampling

    # Conversations --------------------------------------------------------------------------------

    def open(self, conversation: int) -> None:
        """Bring a conversation into view. Raises WeftError NOT_FOUND."""
        self._open.open(conversation)
        for ending in self._writer.unwritten.values():
            self._take(ending)
        self._came_into_view()

    def _came_into_view(self) -> None:
        self.opened.emit()
        self.path_changed.emit()
        self.activity_changed.emit()

    def interrupted(self) -> int:
        """The chat used last, when the window was ended in the middle of an answer there; else 0."""
        newest = max(self._store.conversations(), key=lambda found: found.modified, default=None)
        if newest is None or not newest.leaf:
            return 0
        last = self._store.message(newest.leaf)
        told = last.statistics is not None and last.statistics.finish_reason in ("crashed", "failed")
        return newest.id if last.role == "assistant" and not last.complete and not told else 0

    def new(self) -> None:
        """Begin a new chat; it is stored with its first message."""
        self._open.renew()
        self._came_into_view()

    def defaults_changed(self) -> None:
        """New chats may begin with something else now: so does the one in view, if it is new and nobody changed it."""
        if self._open.outdated:
            self.new()

    def rename(self, conversation: int, title: str) -> None:
        title = " ".join(title.split())[:200]
        if title:
            self._metadata_changed(self._store.rename(conversation, title))

    def set_pinned(self, conversation: int, pinned: bool) -> None:
        self._metadata_changed(self._store.set_pinned(conversation, pinned))

    def delete(self, conversation: int) -> None:
        """Put a conversation into the bin; an answer that is being written into it stops."""
        title = self._store.get(conversation).title
        if self.writing_conversation == conversation:
            self.stop()
        self._store.delete(conversation)
        if self.conversation_id == conversation:
            self.new()
        self.conversations_changed.emit()

        def undo() -> None:
            self._store.restore(conversation)
            self.conversations_changed.emit()
            self.open(conversation)

        self.undoable.emit(f"“{title}” was deleted.", undo)

    def set_system(self, text: str) -> None:
        """Change the system prompt of this conversation."""
        self._open.set_system(text)

    def set_sampling(self, values: Mapping[str, OptionValue]) -> None:
        """Change the sampling of this conversation; only fields that differ from the model's own settings are given."""
        self._open.set_sampling(values)

    def draft(self) -> str:
        """What was typed here and not sent."""
        return self._store.draft(self.conversation_id)

    def set_draft(self, text: str, conversation: int | None = None) -> None:
        self._store.set_draft(self.conversation_id if conversation is None else conversation, text)

    def _metadata_changed(self, changed: Conversation) -> None:
        if changed.id == self.conversation_id:
            self._open.conversation = changed
        self.conversations_changed.emit()

    # Asking ---------------------------------------------------------------------------------------

    def send(self, text: str) -> bool:
        """Send a message at the end of the branch in view. False when it could not be sent: the text is then the caller's to keep."""
        return self._asker.send(text)

    def edit(self, message: int, text: str) -> bool:
        """Write a message anew as another branch; a user's is answered. False when that could not be done."""
        return self._asker.edit(message, text)

    def regenerate(self, message: int) -> bool:
        """Answer again, as another branch. For a user's message: answer it."""
        return self._asker.regenerate(message)

    def continue_(self, message: int) -> bool:
        """Go on with an answer where it ends."""
        return self._asker.continue_(message)

    def cannot_send(self) -> str:
        """Why no message can be sent now, in a sentence; "" when one can."""
        return self._asker.cannot_send()

    def stop(self) -> None:
        """Stop the answer that is being written, wherever it goes."""
        if self._writer.stop():
            self.activity_changed.emit()

    # Branches -------------------------------------------------------------------------------------

    def switch_branch(self, message: int, step: int) -> None:
        """Show the branch before (-1) or after (+1) this message's."""
        siblings = self._open.tree.siblings(message)
        at = siblings.index(message) + step
        if 0 <= at < len(siblings):
            self._asker.show_leaf(self._open.tree.newest_leaf(siblings[at]))

    def delete_message(self, message: int) -> None:
        """Delete a message with all that follows it, and offer to undo that."""
        writing, conversation = self.writing, self.conversation_id
        if writing and any(below.id == writing for below in self._open.below(message)):
            self.stop()
        try:
            self._store.delete_message(message)
        except WeftError as error:
            self.failed.emit(error)
            return
        leaf = self._open.leaf
        other = self._open.tree.remove(message)
        self._asker.show_leaf(leaf if leaf in self._open.tree else other)

        def undo() -> None:
            self._store.restore_message(message)
            self._store.set_leaf(conversation, leaf)
            self.open(conversation)

        self.undoable.emit("The message and what followed it were deleted.", undo)

    # Answers --------------------------------------------------------------------------------------

    @Slot(int, int, str)
    def _streamed(self, conversation: int, message: int, text: str) -> None:
        if conversation == self.conversation_id:
            self.streamed.emit(message, text)

    @Slot(object)
    def _ended(self, ending: Ending) -> None:
        if ending.error is not None:
            self._open.errors[ending.message] = ending.error
        if self._take(ending):
            self.message_changed.emit(ending.message)
        self.activity_changed.emit()
        self.conversations_changed.emit()

    def _take(self, ending: Ending) -> bool:
        """Show how an answer ended. False when it is not in view."""
        tree = self._open.tree
        if ending.message not in tree:
            return False
        how = {"content": ending.content, "complete": ending.complete, "statistics": ending.statistics}
        tree.put(msgspec.structs.replace(tree[ending.message], **how))
        return True

    def shutdown(self) -> None:
        """The window closes: stop, and save what came."""
        self._writer.shutdown()
