"""The conversation in view: which it is, its branches, and what its next answer is asked with."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import msgspec

from app.core.conversation import Conversation, StoredMessage
from app.core.errors import WeftError
from app.core.options import OptionValue
from app.core.transcripts import title_of
from app.store.chats import ChatStore
from app.viewmodels.chat_request import stored_sampling
from app.viewmodels.chat_tree import MessageTree

Defaults = Callable[[], tuple[str, dict[str, OptionValue]]]


class OpenChat:
    """A conversation of the store, or a new one that is stored with its first message.

    Args:
        defaults: system prompt and sampling that a new chat begins with.
        failed: told of what could not be written although the chat goes on.

    Attributes:
        conversation: None while a new chat has no message yet. tree: its messages.
        errors: why answers broke off, in this session, by message and in whichever conversation.
    """

    def __init__(self, store: ChatStore, defaults: Defaults, failed: Callable[[WeftError], object]) -> None:
        self._store = store
        self._defaults = defaults
        self._failed = failed
        self.conversation: Conversation | None = None
        self.tree = MessageTree()
        self.errors: dict[int, WeftError] = {}
        self._system, self._sampling = self._begun_with = defaults()

    @property
    def id(self) -> int:
        """The conversation's, 0 for a new chat."""
        return self.conversation.id if self.conversation else 0

    @property
    def leaf(self) -> int:
        return self.conversation.leaf if self.conversation else 0

    @property
    def path(self) -> list[StoredMessage]:
        """The branch in view, oldest first."""
        return self.tree.path(self.leaf)

    # Which it is ----------------------------------------------------------------------------------

    def open(self, conversation: int) -> None:
        """Take another conversation. Raises WeftError NOT_FOUND."""
        self.conversation = self._store.get(conversation)
        self.tree = MessageTree(self._store.messages(conversation))
        if self.conversation.leaf not in self.tree and len(self.tree):
            self.set_leaf(self.tree.newest_leaf(0))

    def renew(self) -> None:
        """Begin a new chat."""
        self.conversation, self.tree = None, MessageTree()
        self._system, self._sampling = self._begun_with = self._defaults()

    @property
    def outdated(self) -> bool:
        """Whether this is a new chat that nobody changed, and new chats begin with something else by now."""
        return self.conversation is None and (self._system, self._sampling) == self._begun_with != self._defaults()

    def create(self, text: str, model: str) -> Conversation:
        """Store a new chat, named after its first message. `read_again` brings it into view."""
        return self._store.create(
            title=title_of(text) or "New chat",
            model=model,
            system=self._system,
            sampling=json.dumps(self._sampling),
        )

    def read_again(self, conversation: int) -> None:
        """Something of it was written to the store."""
        self.conversation = self._store.get(conversation)

    def forget(self, conversation: int) -> None:
        """Its first message could not be sent: the chat is as new as before, with its system prompt and sampling."""
        self._system, self._sampling = self.system, self.sampling
        try:
            self._store.delete(conversation)
        except WeftError as error:
            self._failed(error)
        self.conversation, self.tree = None, MessageTree()

    # What its answers are asked with ----------------------------------------------------------------

    @property
    def system(self) -> str:
        return self.conversation.system if self.conversation else self._system

    @property
    def sampling(self) -> dict[str, OptionValue]:
        """The changed sampling fields."""
        return stored_sampling(self.conversation.sampling) if self.conversation else dict(self._sampling)

    def set_system(self, text: str) -> None:
        if text == self.system:
            return
        if self.conversation is None:
            self._system = text
        else:
            self.conversation = self._store.set_system(self.conversation.id, text)

    def set_sampling(self, values: Mapping[str, OptionValue]) -> None:
        if self.conversation is None:
            self._sampling = dict(values)
        else:
            self.conversation = self._store.set_sampling(self.conversation.id, json.dumps(dict(values)))

    # Its messages ---------------------------------------------------------------------------------

    def branches(self, message: int) -> tuple[int, int]:
        """Which of how many branches this message is: (1, 1) where there is only one."""
        siblings = self.tree.siblings(message)
        return siblings.index(message) + 1, len(siblings)

    def below(self, message: int) -> list[StoredMessage]:
        """A message and all that follows it, on every branch."""
        found, pending = list[StoredMessage](), [message]
        while pending:
            found.append(self.tree[pending.pop()])
            pending += self.tree.children(found[-1].id)
        return found

    def put(self, message: StoredMessage) -> None:
        """A message was added or changed, here or in a conversation that is not in view."""
        if message.conversation == self.id:
            self.tree.put(message)

    def drop(self, message: int) -> None:
        """Take back a message that came to nothing."""
        try:
            self._store.delete_message(message)
        except WeftError as error:
            self._failed(error)
        if message in self.tree:
            self.tree.remove(message)

    def set_leaf(self, leaf: int) -> None:
        """Have another branch in view."""
        if self.conversation is None or self.conversation.leaf == leaf:
            return
        try:
            self.conversation = self._store.set_leaf(self.conversation.id, leaf)
        except WeftError as error:  # a full disk does not keep anybody from reading
            self.conversation = msgspec.structs.replace(self.conversation, leaf=leaf)
            self._failed(error)
