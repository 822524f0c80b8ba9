"""Asking the model: what is said goes into the store together with an empty answer, which is then asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from PySide6.QtCore import QObject, Signal

from app.core.conversation import AnswerStatistics, Conversation, StoredMessage
from app.core.errors import ErrorKind, WeftError
from app.store.chats import ChatStore
from app.viewmodels.chat_answers import AnswerWriter
from app.viewmodels.chat_generation import Generation
from app.viewmodels.chat_open import OpenChat
from app.viewmodels.chat_request import own_values, request

if TYPE_CHECKING:
    from app.viewmodels.loadout import Loadout


class Asker(QObject):
    """Asks for answers in the conversation in view, one at a time.

    Signals:
        as the controller's of the same names.
    """

    opened = Signal()
    path_changed = Signal()
    activity_changed = Signal()
    conversations_changed = Signal()
    failed = Signal(object)

    def __init__(
        self, store: ChatStore, loadout: Loadout, chat: OpenChat, writer: AnswerWriter, parent: QObject | None = None
    ) -> None:
        super().__init__(parent)
        self._store = store
        self._loadout = loadout
        self._chat = chat
        self._writer = writer

    @property
    def _model_id(self) -> str:
        return self._loadout.model.id if self._loadout.model is not None else ""

    def send(self, text: str) -> bool:
        """Send a message at the end of the branch in view. False when it could not be sent: the text is then the caller's to keep."""
        if not text.strip() or self._writer.conversation:
            return False
        path = self._chat.path
        parent = path[-1].id if path else 0
        if path and path[-1].role == "assistant" and not path[-1].content and self._chat.errors.get(parent):
            parent = path[-1].parent  # an answer that failed before its first word is not built upon
        return self._ask(parent, text)

    def edit(self, message: int, text: str) -> bool:
        """Write a message anew as another branch; a user's is answered. False when that could not be done."""
        old = self._chat.tree[message]
        if self._writer.conversation or not text.strip():
            return False
        if old.role == "user":
            return self._ask(old.parent, text)
        try:
            edited = self._store.add(old.conversation, old.parent, old.role, text, statistics=old.statistics)
        except WeftError as error:
            self.failed.emit(error)
            return False
        self._chat.put(edited)
        self.show_leaf(edited.id)
        return True

    def regenerate(self, message: int) -> bool:
        """Answer again, as another branch. For a user's message: answer it."""
        old = self._chat.tree[message]
        if self._writer.conversation:
            return False
        if old.role == "user":
            return self._answer(old.id)
        if not self._answer(old.parent):
            return False
        if not old.content and not self._chat.tree.children(old.id):
            self._chat.drop(old.id)  # nothing came: no branch worth keeping
            self.path_changed.emit()
        return True

    def continue_(self, message: int) -> bool:
        """Go on with an answer where it ends."""
        old = self._chat.tree[message]
        if self._writer.conversation or old.role != "assistant" or self._chat.tree.children(message):
            return False
        if not old.content:
            return self.regenerate(message)
        self._chat.errors.pop(message, None)
        return self._generate(old, continue_last=True)

    def _ask(self, parent: int, text: str) -> bool:
        """Store what the user said below `parent` and have it answered; takes it back when that fails at once."""
        began, before = self._chat.conversation is None, self._chat.leaf
        try:
            with self._store.together():  # a disk that fills up in between leaves no half of it
                conversation = self._chat.conversation or self._chat.create(text, self._model_id)
                question = self._store.add(conversation.id, parent, "user", text)
                answer = self._begin_answer(conversation, question.id)
            self._chat.read_again(conversation.id)
        except WeftError as error:
            self.failed.emit(error)
            return False
        self._chat.put(question)
        if began:
            self.opened.emit()
        if not self._generate_new(answer, before):
            self._chat.drop(question.id)
            if began:
                self._chat.forget(conversation.id)
                self.opened.emit()
            self.path_changed.emit()
            return False
        if began:
            try:
                self._store.set_draft(0, "")  # it became this conversation's first message
            except WeftError as error:
                self.failed.emit(error)
        self.conversations_changed.emit()
        return True

    def _answer(self, parent: int) -> bool:
        assert self._chat.conversation is not None
        before = self._chat.leaf
        try:
            with self._store.together():
                answer = self._begin_answer(self._chat.conversation, parent)
            self._chat.read_again(self._chat.id)
        except WeftError as error:
            self.failed.emit(error)
            return False
        return self._generate_new(answer, before)

    def _begin_answer(self, conversation: Conversation, parent: int) -> StoredMessage:
        """Put an empty answer into the store, and remember which model gives it."""
        answer = self._store.add(conversation.id, parent, "assistant", "", complete=False)
        self._remember_model(conversation)
        return answer

    def _remember_model(self, conversation: Conversation) -> None:
        if self._model_id and self._model_id != conversation.model:
            self._store.set_model(conversation.id, self._model_id)

    def _generate_new(self, answer: StoredMessage, before: int) -> bool:
        """Have a new answer written. When that fails at once, the branch that ends in `before` is in view again."""
        self._chat.put(answer)
        if self._generate(answer, continue_last=False):
            return True
        self._chat.drop(answer.id)
        self.show_leaf(before)
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
            before = self._chat.tree.path(answer.parent)
            continued = answer.content if continue_last else None
            sampling = {**own_values(model), **self._chat.sampling}
            generation.id = self._loadout.generate(request(self._chat.system, before, sampling, continued))
        except WeftError as error:
            self.failed.emit(error)
            return False
        self._writer.begin(generation)
        if continue_last:
            self._mark_continued(answer)
        self._chat.put(msgspec.structs.replace(answer, complete=False))
        self.show_leaf(answer.id)
        self.activity_changed.emit()
        return True

    def _mark_continued(self, answer: StoredMessage) -> None:
        """Only once more of it is really asked for: an answer that was complete else would count as cut short."""
        assert self._chat.conversation is not None
        try:
            with self._store.together():
                # How it ended before no longer holds; if the window is killed now, nothing else would say so.
                before = answer.statistics and msgspec.structs.replace(answer.statistics, finish_reason="")
                self._store.update(answer.id, complete=False, statistics=before)
                self._remember_model(self._chat.conversation)
            self._chat.read_again(self._chat.id)
        except WeftError as error:  # it is being written all the same; what comes is saved when there is room
            self.failed.emit(error)

    def cannot_send(self) -> str:
        """Why no message can be sent now, in a sentence; "" when one can."""
        if self._writer.conversation:
            if self._writer.conversation == self._chat.id:
                return "The model is answering."
            return f"The model is answering in “{self._store.get(self._writer.conversation).title}”."
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

    def show_leaf(self, leaf: int) -> None:
        """Have the branch that ends there in view."""
        if self._chat.conversation is not None:
            self._chat.set_leaf(leaf)
            self.path_changed.emit()
