"""Conversations as files: Markdown, JSON with all branches, and ShareGPT; written and read back.

JSON keeps everything. Markdown and ShareGPT keep the branch that is shown. Reading is strict: a file is
understood as a whole or refused with the place that is wrong.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import msgspec

from app.core.conversation import AnswerStatistics, Conversation, Role, StoredMessage
from app.core.errors import ErrorKind, WeftError

TranscriptFormat = Literal["markdown", "json", "sharegpt"]
SUFFIXES: dict[TranscriptFormat, str] = {"markdown": ".md", "json": ".json", "sharegpt": ".json"}

MAX_BYTES = 256 * 1024 * 1024
MAX_MESSAGES = 1_000_000
_VERSION = 1
_HINT = "Weft reads its own JSON and Markdown exports, ShareGPT and `messages` lists (JSON or JSONL)."
_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "bot": "assistant",
}
_NAMES: dict[Role, str] = {"system": "System", "user": "You", "assistant": "Assistant"}
_SHAREGPT: dict[Role, str] = {"system": "system", "user": "human", "assistant": "gpt"}
_MARK = re.compile(r"^<!-- weft:(system|user|assistant) -->$")
_ESCAPED = re.compile(r"<!-- (\\*)weft:")


class TranscriptMessage(msgspec.Struct, frozen=True, kw_only=True):
    """One message; `parent` is its parent's index in the transcript, -1 for none, and always smaller than its own."""

    role: Role
    content: str
    parent: int = -1
    created: float = 0.0
    complete: bool = True
    statistics: AnswerStatistics | None = None


class Transcript(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation without database ids. `leaf` is the index of the last message of the branch that is shown."""

    title: str = ""
    created: float = 0.0
    modified: float = 0.0
    pinned: bool = False
    system: str = ""
    sampling: str = "{}"
    model: str = ""
    messages: tuple[TranscriptMessage, ...] = ()
    leaf: int = 0


class _File(msgspec.Struct, frozen=True, kw_only=True, tag="weft conversations", tag_field="kind"):
    version: int
    conversations: tuple[Transcript, ...]


def transcript_of(conversation: Conversation, messages: Sequence[StoredMessage]) -> Transcript:
    """A stored conversation with all its branches. Messages whose parent is missing are left out."""
    index: dict[int, int] = {}
    kept: list[TranscriptMessage] = []
    for message in sorted(messages, key=lambda message: message.id):
        if message.parent and message.parent not in index:
            continue
        index[message.id] = len(kept)
        kept.append(
            TranscriptMessage(
                role=message.role,
                content=message.content,
                parent=index.get(message.parent, -1),
                created=message.created,
                complete=message.complete,
                statistics=message.statistics,
            )
        )
    return Transcript(
        title=conversation.title,
        created=conversation.created,
        modified=conversation.modified,
        pinned=conversation.pinned,
        system=conversation.system,
        sampling=conversation.sampling,
        model=conversation.model,
        messages=tuple(kept),
        leaf=index.get(conversation.leaf, max(0, len(kept) - 1)),
    )


def branch(transcript: Transcript) -> list[TranscriptMessage]:
    """The messages of the branch that is shown, oldest first."""
    path: list[TranscriptMessage] = []
    index = transcript.leaf if transcript.messages else -1
    while index >= 0:
        path.append(transcript.messages[index])
        index = path[-1].parent
    return path[::-1]


# Writing --------------------------------------------------------------------------------------------


def export(transcripts: Sequence[Transcript], form: TranscriptFormat) -> str:
    """The text of a file in this format."""
    if form == "markdown":
        # Every turn ends in an empty line, the last one too: so no line break of a message is taken for it.
        return "\n".join(_to_markdown(transcript) for transcript in transcripts) + "\n"
    if form == "sharegpt":
        return json.dumps([_to_sharegpt(t) for t in transcripts], ensure_ascii=False, indent=2) + "\n"
    file = _File(version=_VERSION, conversations=tuple(transcripts))
    return msgspec.json.format(msgspec.json.encode(file), indent=2).decode() + "\n"


def _to_markdown(transcript: Transcript) -> str:
    parts = [f"# {' '.join(transcript.title.split()) or 'Conversation'}\n"]
    for role, content in _turns(transcript) or [("system", "")]:  # a conversation without any turn is one all the same
        # A message may itself contain such a mark: one backslash more tells them apart.
        text = _ESCAPED.sub(r"<!-- \1\\weft:", content)
        parts.append(f"<!-- weft:{role} -->\n## {_NAMES[role]}\n\n{text}\n")
    return "\n".join(parts)


def _to_sharegpt(transcript: Transcript) -> dict[str, Any]:
    turns = [{"from": _SHAREGPT[role], "value": content} for role, content in _turns(transcript)]
    return {"title": transcript.title, "conversations": turns}


def _turns(transcript: Transcript) -> list[tuple[Role, str]]:
    """The branch that is shown, with the system prompt before it. A first turn by "system" is always the system prompt."""
    shown: list[tuple[Role, str]] = [(message.role, message.content) for message in branch(transcript)]
    if transcript.system or (shown and shown[0][0] == "system"):
        shown.insert(0, ("system", transcript.system))
    return shown


# Reading --------------------------------------------------------------------------------------------


def read(data: bytes, name: str) -> list[Transcript]:
    """The conversations of a file.

    Args:
        data: its bytes.
        name: its name, for messages; a `.md` ending makes it Markdown.

    Raises:
        WeftError: BAD_INPUT, naming the file and the place, when any part of it cannot be understood.
    """
    if len(data) > MAX_BYTES:
        raise _bad(name, f"it is larger than {MAX_BYTES // 2**20} MiB")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _bad(name, f"it is not UTF-8 text (byte {error.start})") from error
    if name.lower().endswith((".md", ".markdown")):
        transcripts = _from_markdown(text, name)
    else:
        transcripts = _from_json(text, name)
    if not transcripts:
        raise _bad(name, "there is no message in it")
    if sum(len(transcript.messages) for transcript in transcripts) > MAX_MESSAGES:
        raise _bad(name, f"it has more than {MAX_MESSAGES:,} messages")
    return transcripts


def _from_json(text: str, name: str) -> list[Transcript]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        value = _json_lines(text)
        if value is None:
            reason = str(error) if isinstance(error, ValueError) else "it is nested too deeply"
            raise _bad(name, f"it is not JSON ({reason})") from error
    table = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
    if table.get("kind") == "weft conversations":
        return _from_weft(table, name)
    items = cast("list[Any]", value if isinstance(value, list) else [value])
    if items and all(isinstance(item, dict) and ("from" in item or "role" in item) for item in items):
        items = [{"messages": items}]  # one bare list of turns
    found = [_from_turns(item, name, f"conversation {number}") for number, item in enumerate(items, 1)]
    # Data sets hold empty conversations too. One with a title or a system prompt may be a chat of ours that is not begun.
    return [transcript for transcript in found if transcript.messages or transcript.title or transcript.system]


def _json_lines(text: str) -> list[Any] | None:
    """JSONL, or None when it is not."""
    lines = [line for line in text.splitlines() if line.strip()]
    try:
        return [json.loads(line) for line in lines] if len(lines) > 1 else None
    except (ValueError, RecursionError):
        return None


def _from_weft(value: Mapping[str, Any], name: str) -> list[Transcript]:
    if value.get("version") != _VERSION:
        raise _bad(name, f"it was written by another version of Weft (format {value.get('version')!r})")
    try:
        file = msgspec.convert(value, _File)
    except msgspec.ValidationError as error:
        raise _bad(name, str(error)) from error
    for number, transcript in enumerate(file.conversations, 1):
        for index, message in enumerate(transcript.messages):
            if not -1 <= message.parent < index:
                raise _bad(name, f"message {index + 1} of conversation {number} has no valid parent")
        if transcript.messages and not 0 <= transcript.leaf < len(transcript.messages):
            raise _bad(name, f"conversation {number} ends at a message that is not there")
        try:
            sampling = json.loads(transcript.sampling)
        except (ValueError, RecursionError) as error:
            raise _bad(name, f"the sampling of conversation {number} is not JSON") from error
        if not isinstance(sampling, dict):
            raise _bad(name, f"the sampling of conversation {number} is not an object")
    return list(file.conversations)


def _from_turns(item: object, name: str, where: str) -> Transcript:
    """ShareGPT (`conversations` of from/value) or OpenAI's shape (`messages` of role/content)."""
    if not isinstance(item, dict):
        raise _bad(name, f"{where} is not an object")
    table = cast("dict[str, Any]", item)
    turns = next((table[key] for key in ("conversations", "messages", "conversation") if key in table), None)
    if not isinstance(turns, list):
        raise _bad(name, f"{where} has neither `conversations` nor `messages`")
    system = str(table.get("system") or "")
    messages: list[TranscriptMessage] = []
    for number, turn in enumerate(cast("list[object]", turns), 1):
        role, content = _turn(turn, name, f"turn {number} of {where}")
        if role == "system" and number == 1 and not system:
            system = content
            continue
        messages.append(TranscriptMessage(role=role, content=content, parent=len(messages) - 1))
    title = table.get("title")
    return Transcript(
        title=" ".join(title.split()) if isinstance(title, str) and title.strip() else title_from(messages),
        system=system,
        messages=tuple(messages),
        leaf=max(0, len(messages) - 1),
    )


def _turn(turn: object, name: str, where: str) -> tuple[Role, str]:
    if not isinstance(turn, dict):
        raise _bad(name, f"{where} is not an object")
    table = cast("dict[str, Any]", turn)
    speaker = table.get("from", table.get("role"))
    content = table.get("value", table.get("content"))
    role = _ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise _bad(name, f"{where} is by {speaker!r}, which is no known role")
    if isinstance(content, list):  # OpenAI's parts: only text can be taken over
        parts = [
            cast("dict[str, Any]", part) if isinstance(part, dict) else {} for part in cast("list[object]", content)
        ]
        if not all(part.get("type") == "text" for part in parts):
            raise _bad(name, f"{where} holds something other than text")
        content = "".join(str(part.get("text", "")) for part in parts)
    if not isinstance(content, str):
        raise _bad(name, f"{where} has no text")
    return role, content


def _from_markdown(text: str, name: str) -> list[Transcript]:
    found: list[Transcript] = []
    title, system, messages = "", "", list[TranscriptMessage]()
    turns = 0  # of this conversation
    role: Role | None = None
    lines: list[str] = []

    def end_turn() -> None:
        nonlocal role, system, turns
        if role is not None:
            turns += 1
            # The writer adds a heading with an empty line, and one line break after the text.
            body = "\n".join(lines[2:] if lines[:1] == [f"## {_NAMES[role]}"] and lines[1:2] == [""] else lines)
            content = re.sub(r"<!-- (\\*)\\weft:", r"<!-- \1weft:", body.removesuffix("\n"))
            if role == "system" and turns == 1:
                system = content
            else:
                messages.append(TranscriptMessage(role=role, content=content, parent=len(messages) - 1))
        role = None
        lines.clear()

    source = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    for number, line in enumerate(source):
        mark = _MARK.match(line)
        following = source[number + 1 : number + 4]
        new_file = (
            line.startswith("# ") and following[:1] == [""] and len(following) > 1 and bool(_MARK.match(following[1]))
        )
        if mark:
            end_turn()
            role = cast("Role", mark[1])
        elif new_file:
            end_turn()
            if turns:
                found.append(_linear(title, system, messages))
            title, system, messages, turns = line[2:], "", [], 0
        elif role is not None:
            lines.append(line)
        elif line.strip() and not turns:
            raise _bad(name, f"line {number + 1} stands before the first `<!-- weft:… -->` mark")
    end_turn()
    if turns:
        found.append(_linear(title, system, messages))
    return found


def _linear(title: str, system: str, messages: list[TranscriptMessage]) -> Transcript:
    return Transcript(title=title, system=system, messages=tuple(messages), leaf=max(0, len(messages) - 1))


def title_from(messages: Sequence[TranscriptMessage | StoredMessage]) -> str:
    """A conversation's title, from the first thing the user said."""
    first = next((message.content for message in messages if message.role == "user" and message.content.strip()), "")
    return title_of(first)


def title_of(text: str) -> str:
    """One short line that names a conversation: the first line of a prompt, without markup, cut at a word."""
    line = next((line for line in text[:4000].split("\n") if line.strip(" #>*`~-\t")), "")
    words = " ".join(re.sub(r"[`*~#>]+", "", line).split())
    if len(words) <= 56:
        return words
    cut = words[:55].rsplit(" ", 1)[0]
    return (cut if len(cut) > 24 else words[:55]) + "…"


def _bad(name: str, reason: str) -> WeftError:
    return WeftError(ErrorKind.BAD_INPUT, f"{name} cannot be imported: {reason}. Nothing was imported.", _HINT)
