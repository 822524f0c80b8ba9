"""The tree of a conversation's messages: paths, branches, and what comes next on each."""

from __future__ import annotations

from collections.abc import Iterable

from app.core.conversation import StoredMessage


class MessageTree:
    """Messages by id, with their children in the order of writing."""

    def __init__(self, messages: Iterable[StoredMessage] = ()) -> None:
        self._messages: dict[int, StoredMessage] = {}
        self._children: dict[int, list[int]] = {0: []}
        for message in messages:
            self.put(message)

    def __contains__(self, message: int) -> bool:
        return message in self._messages

    def __getitem__(self, message: int) -> StoredMessage:
        return self._messages[message]

    def __len__(self) -> int:
        return len(self._messages)

    def put(self, message: StoredMessage) -> None:
        """Add a message, or replace the one with its id."""
        if message.id not in self._messages:
            self._children.setdefault(message.parent, []).append(message.id)
            self._children.setdefault(message.id, [])
        self._messages[message.id] = message

    def children(self, message: int) -> list[int]:
        return list(self._children.get(message, ()))

    def siblings(self, message: int) -> list[int]:
        """The branches at this place, itself included, oldest first."""
        return self.children(self._messages[message].parent)

    def path(self, leaf: int) -> list[StoredMessage]:
        """From the first message to `leaf`; as far as a parent is known."""
        path: list[StoredMessage] = []
        while leaf in self._messages:
            path.append(self._messages[leaf])
            leaf = path[-1].parent
        return path[::-1] if leaf == 0 else []

    def newest_leaf(self, message: int) -> int:
        """The end of the newest branch below a message (0: of the whole conversation)."""
        while children := self._children.get(message):
            message = max(children)
        return message

    def remove(self, message: int) -> int:
        """Take out a message and all below it. Returns the leaf to show instead: a neighbouring branch, else the parent."""
        parent = self._messages[message].parent
        siblings = self._children[parent]
        at = siblings.index(message)
        siblings.remove(message)
        self._drop(message)
        if siblings:
            return self.newest_leaf(siblings[min(at, len(siblings) - 1)])
        return parent

    def _drop(self, message: int) -> None:
        pending = [message]
        while pending:
            dropped = pending.pop()
            pending += self._children.pop(dropped, [])
            self._messages.pop(dropped, None)
