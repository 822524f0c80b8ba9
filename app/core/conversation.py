"""A conversation as a tree of messages: editing and regenerating make branches, nothing is overwritten."""

from __future__ import annotations

from typing import Literal

import msgspec

Role = Literal["system", "user", "assistant"]


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """One message as an engine takes it."""

    role: Role
    content: str


class AnswerStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """What stands in small under an answer.

    Attributes:
        model, loader, stack: what answered.
        tokens: tokens generated; prompt_tokens: tokens of the prompt; reused_tokens: of those, not read again.
        tokens_per_second: of the generation alone; seconds_to_first_token: from send to the first text.
        finish_reason: `stop`, `length`, `cancelled`, `crashed`, `failed`.
        dropped_messages: how many of the oldest messages no longer fitted into the context.
        reasoning_seconds: how long it thought before it answered; 0 when it did not, or not visibly.
    """

    model: str = ""
    loader: str = ""
    stack: str = "base"
    tokens: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    tokens_per_second: float = 0.0
    seconds_to_first_token: float = 0.0
    finish_reason: str = ""
    dropped_messages: int = 0
    seed: int = 0
    reasoning_seconds: float = 0.0


class StoredMessage(msgspec.Struct, frozen=True, kw_only=True):
    """A node of a conversation's tree. `parent` 0 is the root; siblings are branches."""

    id: int
    conversation: int
    parent: int
    role: Role
    content: str
    created: float
    statistics: AnswerStatistics | None = None
    complete: bool = True  # false while streaming, and for ever when that was cut short


class Conversation(msgspec.Struct, frozen=True, kw_only=True):
    """One chat.

    Attributes:
        leaf: id of the message at the end of the branch now shown; 0 for none.
        system: the system prompt. sampling: JSON of the changed sampling fields. model: library id last used.
    """

    id: int
    title: str
    created: float
    modified: float
    pinned: bool = False
    system: str = ""
    sampling: str = "{}"
    model: str = ""
    leaf: int = 0
