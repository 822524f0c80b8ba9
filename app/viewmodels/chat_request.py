"""What of a conversation the model is sent."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from app.core.conversation import Message, StoredMessage
from app.core.errors import WeftError
from app.core.library import ModelEntry
from app.core.options import OptionValue, build
from app.core.sampling import Sampling
from app.engine.protocol import Generate
from app.viewmodels.chat_reasoning import without_reasoning


def told(message: StoredMessage) -> str:
    """What the model is told of a message; "" when there is nothing to tell."""
    content = without_reasoning(message.content) if message.role == "assistant" else message.content
    return content if content.strip() else ""


def unseen(path: Sequence[StoredMessage]) -> int:
    """How many of these messages, from the top, the model was not shown for its last answer."""
    last = next((m.statistics for m in reversed(path) if m.role == "assistant" and m.statistics), None)
    dropped = last.dropped_messages if last is not None else 0
    # Counted were the messages that were sent: a message without text never is.
    sent = [index for index, message in enumerate(path) if told(message)]
    return sent[dropped] if 0 < dropped < len(sent) else 0


def own_values(model: ModelEntry | None) -> dict[str, OptionValue]:
    """What an answer of this model is sampled by where nobody chose anything; Weft's own defaults stand for the rest."""
    return model.own_sampling.values() if model is not None else {}


def request(
    system: str, before: Sequence[StoredMessage], sampling: Mapping[str, OptionValue], continued: str | None
) -> Generate:
    """Ask for an answer.

    Args:
        before: the messages that it answers, oldest first.
        sampling: fields that differ from Weft's defaults, the model's own ones among them.
        continued: the answer's own text so far, where it is to go on; None for a new one.
    """
    messages = [Message(role="system", content=system)] if system.strip() else []
    for message in before:
        if content := told(message):
            messages.append(Message(role=message.role, content=content))
    if continued is not None:
        messages.append(Message(role="assistant", content=continued))
    return Generate(
        messages=tuple(messages), continue_last=continued is not None, sampling=build(Sampling, dict(sampling))
    )


def stored_sampling(text: str) -> dict[str, OptionValue]:
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
