"""ChatController: the conversation in view, its branches, and the answer being written. No widgets.

An answer goes into the conversation in which it was asked for, whichever one is in view. What was
received is in the store within half a second, so a kill of the window loses no more than that.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import msgspec
from PySide6.QtCore import QObject, QTimer, Signal, Slot

from app.core.conversation import AnswerStatistics, Conversation, Message, StoredMessage
from app.core.errors import ErrorKind, WeftError
from app.core.options import OptionValue, build
from app.core.sampling import Sampling
from app.core.transcripts import title_of
from app.engine.protocol import Generate, Generated
from app.store.chats import ChatStore
from app.viewmodels.chat_generation import Generation
from app.viewmodels.chat_reasoning import without_reasoning
from app.viewmodels.chat_tree import MessageTree

if TYPE_CHECKING:
    from app.viewmodels.loadout import Loadout

SAVE_MS = 500  # how much of an answer a kill of the window may lose, at most
_CRASHES = (ErrorKind.CRASHED, ErrorKind.UNRESPONSIVE, ErrorKind.PROTOCOL, ErrorKind.OUT_OF_MEMORY)


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
        defaults: Callable[[], tuple[str, dict[str, OptionValue]]] = lambda: ("", {}),
        parent: QObject | None = None,
    ) -> None:
        """`defaults` gives the system prompt and the sampling that a new chat begins with."""
        super().__init__(parent)
        self._store = store
        self._loadout = loadout
        self._defaults = defaults
        self._conversation: Conversation | None = None
        self._tree = MessageTree()
        self._generation: Generation | None = None
        self._errors: dict[int, WeftError] = {}
        self._system, self._sampling = self._begun_with = defaults()
        self._timer = QTimer(self)
        self._timer.setSingleShot(True)
        self._timer.setInterval(SAVE_MS)
        self._timer.timeout.connect(self._save)
        self._save_failed = False
        loadout.changed.connect(self.activity_changed)
        loadout.begun.connect(self._begun)
        loadout.tokens.connect(self._tokens)
        loadout.finished.connect(self._finished)
        loadout.failed.connect(self._failed)

    # What is in view ------------------------------------------------------------------------------

    @property
    def conversation(self) -> Conversation | None:
        """The conversation in view; None while a new chat has no message yet."""
        return self._conversation

    @property
    def conversation_id(self) -> int:
        return self._conversation.id if self._conversation else 0

    @property
    def path(self) -> list[StoredMessage]:
        """The messages in view, oldest first. The text of the one being written is as of its last save: see `text`."""
        return self._tree.path(self._conversation.leaf) if self._conversation else []

    def text(self, message: int) -> str:
        """A message's text, up to the last batch."""
        if self._generation is not None and self._generation.message == message:
            return self._generation.text
        return self._tree[message].content

    def message(self, message: int) -> StoredMessage:
        return self._tree[message]

    def branches(self, message: int) -> tuple[int, int]:
        """Which of how many branches this message is: (1, 1) where there is only one."""
        siblings = self._tree.siblings(message)
        return siblings.index(message) + 1, len(siblings)

    def error(self, message: int) -> WeftError | None:
        """Why this answer broke off, if it did in this session."""
        return self._errors.get(message)

    @property
    def unseen(self) -> int:
        """How many of the messages in view, from the top, the model was not shown for its last answer."""
        path = self.path
        last = next((m.statistics for m in reversed(path) if m.role == "assistant" and m.statistics), None)
        dropped = last.dropped_messages if last is not None else 0
        # Counted were the messages that were sent: a message without text never is.
        sent = [index for index, message in enumerate(path) if _told(message)]
        return sent[dropped] if 0 < dropped < len(sent) else 0

    @property
    def writing(self) -> int:
        """The message in view that is being written, or 0."""
        generation = self._generation
        return generation.message if generation is not None and generation.conversation == self.conversation_id else 0

    @property
    def received(self) -> bool:
        """Whether the answer being written has begun to come."""
        return self._generation is not None and self._generation.received

    @property
    def writing_conversation(self) -> int:
        """The conversation, in view or not, that an answer is being written into; 0 for none."""
        return self._generation.conversation if self._generation else 0

    @property
    def system(self) -> str:
        return self._conversation.system if self._conversation else self._system

    @property
    def sampling(self) -> dict[str, OptionValue]:
        """The changed sampling fields of this conversation."""
        return _decoded(self._conversation.sampling) if self._conversation else dict(self._sampling)

    # Conversations --------------------------------------------------------------------------------

    def open(self, conversation: int) -> None:
        """Bring a conversation into view. Raises WeftError NOT_FOUND."""
        self._conversation = self._store.get(conversation)
        self._tree = MessageTree(self._store.messages(conversation))
        if self._conversation.leaf not in self._tree and len(self._tree):
            self._set_leaf(self._tree.newest_leaf(0))
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
        self._conversation = None
        self._tree = MessageTree()
        self._system, self._sampling = self._begun_with = self._defaults()
        self.opened.emit()
        self.path_changed.emit()
        self.activity_changed.emit()

    def defaults_changed(self) -> None:
        """New chats may begin with something else now: so does the one in view, if it is new and nobody changed it."""
        now = self._defaults()
        if self._conversation is None and (self._system, self._sampling) == self._begun_with != now:
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
        if text == self.system:
            return
        if self._conversation is None:
            self._system = text
        else:
            self._conversation = self._store.set_system(self._conversation.id, text)

    def set_sampling(self, values: Mapping[str, OptionValue]) -> None:
        """Change the sampling of this conversation; only changed fields are given."""
        if self._conversation is None:
            self._sampling = dict(values)
        else:
            self._conversation = self._store.set_sampling(self._conversation.id, json.dumps(dict(values)))

    def draft(self) -> str:
        """What was typed here and not sent."""
        return self._store.draft(self.conversation_id)

    def set_draft(self, text: str, conversation: int | None = None) -> None:
        self._store.set_draft(self.conversation_id if conversation is None else conversation, text)

    def _metadata_changed(self, changed: Conversation) -> None:
        if changed.id == self.conversation_id:
            self._conversation = changed
        self.conversations_changed.emit()

    # Asking ---------------------------------------------------------------------------------------

    def send(self, text: str) -> bool:
        """Send a message at the end of the branch in view. False when it could not be sent: the text is then the caller's to keep."""
        if not text.strip() or self._generation is not None:
            return False
        last = self.path[-1] if self.path else None
        parent = last.id if last else 0
        if last is not None and last.role == "assistant" and not self.text(last.id) and self._errors.get(last.id):
            parent = last.parent  # an answer that failed before its first word is not built upon
        return self._ask(parent, text)

    def edit(self, message: int, text: str) -> bool:
        """Write a message anew as another branch; a user's is answered. False when that could not be done."""
        old = self._tree[message]
        if self._generation is not None or not text.strip():
            return False
        if old.role == "user":
            return self._ask(old.parent, text)
        try:
            edited = self._store.add(old.conversation, old.parent, old.role, text, statistics=old.statistics)
        except WeftError as error:
            self.failed.emit(error)
            return False
        self._put(edited)
        self._show_leaf(edited.id)
        return True

    def regenerate(self, message: int) -> bool:
        """Answer again, as another branch. For a user's message: answer it."""
        old = self._tree[message]
        if self._generation is not None:
            return False
        if old.role == "user":
            return self._answer(old.id)
        if not old.content and not self._tree.children(old.id):
            self._drop(old.id)  # nothing came: no branch worth keeping
        return self._answer(old.parent)

    def continue_(self, message: int) -> bool:
        """Go on with an answer where it ends."""
        old = self._tree[message]
        if self._generation is not None or old.role != "assistant" or self._tree.children(message):
            return False
        if not old.content:
            return self.regenerate(message)
        self._errors.pop(message, None)
        return self._generate(old, continue_last=True)

    def stop(self) -> None:
        """Stop the answer that is being written, wherever it goes."""
        if self._generation is not None and not self._generation.cancelled:
            self._generation.cancelled = True
            self._loadout.cancel(self._generation.id)
            self.activity_changed.emit()

    def _ask(self, parent: int, text: str) -> bool:
        """Store what the user said below `parent` and have it answered; takes it back when that fails at once."""
        began = self._conversation is None
        try:
            with self._store.together():  # a disk that fills up in between leaves no half of it
                conversation = self._conversation or self._begin(text)
                question = self._store.add(conversation.id, parent, "user", text)
                answer = self._begin_answer(conversation, question.id)
            self._conversation = self._store.get(conversation.id)
        except WeftError as error:
            self.failed.emit(error)
            return False
        self._put(question)
        if began:
            self.opened.emit()
        if not self._generate_new(answer):
            self._drop(question.id)
            if began:
                self._forget_begun(conversation.id)
            else:
                self._show_leaf(parent)
            return False
        if began:
            try:
                self._store.set_draft(0, "")  # it became this conversation's first message
            except WeftError as error:
                self.failed.emit(error)
        self.conversations_changed.emit()
        return True

    def _forget_begun(self, conversation: int) -> None:
        """Its first message could not be sent: the chat is as new as before, with its system prompt and sampling."""
        self._system, self._sampling = self.system, self.sampling
        try:
            self._store.delete(conversation)
        except WeftError as error:
            self.failed.emit(error)
        self._conversation, self._tree = None, MessageTree()
        self.opened.emit()
        self.path_changed.emit()

    def _begin(self, text: str) -> Conversation:
        model = self._loadout.model
        return self._store.create(
            title=title_of(text) or "New chat",
            model=model.id if model else "",
            system=self._system,
            sampling=json.dumps(self._sampling),
        )

    def _answer(self, parent: int) -> bool:
        assert self._conversation is not None
        try:
            with self._store.together():
                answer = self._begin_answer(self._conversation, parent)
            self._conversation = self._store.get(self._conversation.id)
        except WeftError as error:
            self.failed.emit(error)
            return False
        return self._generate_new(answer)

    def _begin_answer(self, conversation: Conversation, parent: int) -> StoredMessage:
        """Put an empty answer into the store, and remember which model gives it."""
        answer = self._store.add(conversation.id, parent, "assistant", "", complete=False)
        self._remember_model(conversation)
        return answer

    def _remember_model(self, conversation: Conversation) -> None:
        model = self._loadout.model
        if model is not None and model.id != conversation.model:
            self._store.set_model(conversation.id, model.id)

    def _generate_new(self, answer: StoredMessage) -> bool:
        self._put(answer)
        if self._generate(answer, continue_last=False):
            return True
        self._drop(answer.id)
        self._show_leaf(answer.parent)
        return False

    def _generate(self, answer: StoredMessage, *, continue_last: bool) -> bool:
        """Ask the model for this answer, or for more of it. The store has the message already."""
        model, loader = self._loadout.model, self._loadout.loader
        generation = Generation(
            conversation=answer.conversation,
            message=answer.id,
            before=answer.content,
            statistics=answer.statistics if continue_last else None,
            base=AnswerStatistics(
                model=model.name if model else "",
                loader=loader.title if loader else "",
                stack=self._loadout.stack.title,
            ),
        )
        try:
            if reason := self.cannot_send():
                raise WeftError(ErrorKind.BUSY, reason, "Try again when the model is ready.")
            generation.id = self._loadout.generate(self._request(answer, continue_last))
        except WeftError as error:
            self.failed.emit(error)
            return False
        self._generation = generation
        if continue_last:
            self._mark_continued(answer)
        self._put(msgspec.structs.replace(answer, complete=False))
        self._show_leaf(answer.id)
        self.activity_changed.emit()
        return True

    def _mark_continued(self, answer: StoredMessage) -> None:
        """Only once more of it is really asked for: an answer that was complete else would count as cut short."""
        assert self._conversation is not None
        try:
            with self._store.together():
                # How it ended before no longer holds; if the window is killed now, nothing else would say so.
                before = answer.statistics and msgspec.structs.replace(answer.statistics, finish_reason="")
                self._store.update(answer.id, complete=False, statistics=before)
                self._remember_model(self._conversation)
            self._conversation = self._store.get(self._conversation.id)
        except WeftError as error:  # it is being written all the same; what comes is saved when there is room
            self.failed.emit(error)

    def _request(self, answer: StoredMessage, continue_last: bool) -> Generate:
        told = [Message(role="system", content=self.system)] if self.system.strip() else []
        for message in self._tree.path(answer.parent):
            if content := _told(message):
                told.append(Message(role=message.role, content=content))
        if continue_last:
            told.append(Message(role="assistant", content=answer.content))
        return Generate(messages=tuple(told), continue_last=continue_last, sampling=build(Sampling, self.sampling))

    def cannot_send(self) -> str:
        """Why no message can be sent now, in a sentence; "" when one can."""
        if self._generation is not None:
            if self.writing:
                return "The model is answering."
            return f"The model is answering in “{self._store.get(self._generation.conversation).title}”."
        loadout = self._loadout
        match loadout.state.name:
            case "READY" | "STARTING" | "LOADING":
                return ""  # what is sent while a model loads is answered as soon as it is there
            case "EMPTY" | "FAILED":
                # The next message loads the model, and starts an engine that died again.
                return "" if loadout.model is not None else "No model is loaded."
            case "BUSY":
                return "The model is busy."
            case "UNRESPONSIVE":
                return "The model does not respond at the moment."
            case _:
                return "No model is loaded."

    # Branches -------------------------------------------------------------------------------------

    def switch_branch(self, message: int, step: int) -> None:
        """Show the branch before (-1) or after (+1) this message's."""
        siblings = self._tree.siblings(message)
        at = siblings.index(message) + step
        if 0 <= at < len(siblings):
            self._show_leaf(self._tree.newest_leaf(siblings[at]))

    def delete_message(self, message: int) -> None:
        """Delete a message with all that follows it, and offer to undo that."""
        generation, conversation = self._generation, self.conversation_id
        if generation is not None and any(m.id == generation.message for m in self._below(message)):
            self.stop()
        try:
            self._store.delete_message(message)
        except WeftError as error:
            self.failed.emit(error)
            return
        leaf = self._conversation.leaf if self._conversation else 0
        other = self._tree.remove(message)
        self._show_leaf(leaf if leaf in self._tree else other)

        def undo() -> None:
            self._store.restore_message(message)
            self._store.set_leaf(conversation, leaf)
            self.open(conversation)

        self.undoable.emit("The message and what followed it were deleted.", undo)

    def _below(self, message: int) -> list[StoredMessage]:
        found, pending = list[StoredMessage](), [message]
        while pending:
            found.append(self._tree[pending.pop()])
            pending += self._tree.children(found[-1].id)
        return found

    def _put(self, message: StoredMessage) -> None:
        if message.conversation == self.conversation_id:
            self._tree.put(message)

    def _drop(self, message: int) -> None:
        """Take back a message that came to nothing."""
        try:
            self._store.delete_message(message)
        except WeftError as error:
            self.failed.emit(error)
        if message in self._tree:
            self._tree.remove(message)

    def _set_leaf(self, leaf: int) -> None:
        assert self._conversation is not None
        try:
            self._conversation = self._store.set_leaf(self._conversation.id, leaf)
        except WeftError as error:  # a full disk does not keep anybody from reading
            self._conversation = msgspec.structs.replace(self._conversation, leaf=leaf)
            self.failed.emit(error)

    def _show_leaf(self, leaf: int) -> None:
        if self._conversation is not None:
            if self._conversation.leaf != leaf:
                self._set_leaf(leaf)
            self.path_changed.emit()

    # Answers --------------------------------------------------------------------------------------

    @Slot(int)
    def _begun(self, id: int) -> None:
        if self._generation is not None and id == self._generation.id:
            self._generation.begun()

    @Slot(int, str, int)
    def _tokens(self, id: int, text: str, count: int) -> None:
        generation = self._generation
        if generation is None or id != generation.id:
            return
        first = not generation.received
        generation.take(text, count)
        if first:
            self.activity_changed.emit()
        if not self._timer.isActive():
            self._timer.start()
        if generation.conversation == self.conversation_id:
            self.streamed.emit(generation.message, text)

    @Slot(int, object)
    def _finished(self, id: int, result: object) -> None:
        if self._generation is not None and id == self._generation.id:
            outcome = result if isinstance(result, Generated) else None
            self._end(outcome, outcome.finish_reason if outcome else "stop", None)

    @Slot(int, object)
    def _failed(self, id: int, error: object) -> None:
        generation = self._generation
        if generation is None or id != generation.id:
            return
        assert isinstance(error, WeftError)
        if generation.cancelled or error.kind is ErrorKind.CANCELLED:
            self._end(None, "cancelled", None)
        else:
            self._end(None, "crashed" if error.kind in _CRASHES else "failed", error)

    def _end(self, result: Generated | None, reason: str, error: WeftError | None) -> None:
        generation = self._generation
        assert generation is not None
        self._timer.stop()
        statistics = generation.statistics(result, reason)
        text, message = generation.text, generation.message
        complete = error is None
        self._generation = None
        if error is not None:
            self._errors[message] = error
        try:
            self._store.update(message, content=text, complete=complete, statistics=statistics)
        except WeftError as problem:
            self.failed.emit(problem)
        if message in self._tree:
            stored = self._tree[message]
            self._tree.put(msgspec.structs.replace(stored, content=text, complete=complete, statistics=statistics))
            self.message_changed.emit(message)
        self.activity_changed.emit()
        self.conversations_changed.emit()

    @Slot()
    def _save(self) -> None:
        """Put what came since the last time into the store."""
        generation = self._generation
        if generation is None or not generation.unsaved:
            return
        unsaved = generation.take_unsaved()
        try:
            self._store.append(generation.message, unsaved)
            self._save_failed = False
        except WeftError as error:
            generation.give_back(unsaved)
            self._timer.start()
            if not self._save_failed:  # say it once; the text is kept in memory and tried again
                self._save_failed = True
                self.failed.emit(error)

    def shutdown(self) -> None:
        """The window closes: stop, and save what came."""
        if self._generation is not None:
            self.stop()
            self._end(None, "cancelled", None)


def _told(message: StoredMessage) -> str:
    """What the model is told of a message; "" when there is nothing to tell."""
    content = without_reasoning(message.content) if message.role == "assistant" else message.content
    return content if content.strip() else ""


def _decoded(text: str) -> dict[str, OptionValue]:
    """A conversation's sampling; fields that this Weft does not know, or whose values it does not take, are left out."""
    try:
        values = json.loads(text)
    except ValueError:
        return {}
    known: dict[str, OptionValue] = {}
    for name, value in values.items() if isinstance(values, dict) else ():
        try:
            build(Sampling, {name: value})
        except WeftError:
            continue
        known[name] = value
    return known
