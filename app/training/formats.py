"""Records as rows of one of four kinds, whatever format they came in; and which format a file has."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from app.training.data_config import FIELDS, RowKind

Message = dict[str, Any]  # role, content, and whatever else a template may want (tool_calls, name, …)

ROLES: dict[str, str] = {
    **dict.fromkeys(("user", "human", "prompter", "question"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot", "answer", "function_call"), "assistant"
    ),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
}
# Other names that columns have in well-known data sets.
ALIASES: dict[str, tuple[str, ...]] = {
    "conversations": ("conversation", "dialogue"),
    "prompt": ("question", "query"),
    "completion": ("response", "answer"),
    "output": ("response",),
    "input": ("context",),
    "system": ("system_prompt",),
    "text": ("content",),
}


class BadRowError(Exception):
    """A row that cannot be used; the message says why."""


@dataclass(slots=True)
class Row:
    """One example.

    Attributes:
        file: number of its file in the report. line: see `records.Record`.
        kind: `chat`: messages, of which those numbered in `trained` are learnt. `pair`: a prompt and an answer, plain.
            `text`: raw text (`prompt`). `preference`: prompt, chosen and rejected, all plain or all messages.
        prompt, answers: what the kind says; a chat's messages are its prompt.
        more: raw text that goes on in the next row.
        system: of a pair or preference row, for the case that it is rendered as a conversation.
    """

    file: int
    line: int
    kind: RowKind
    prompt: str | list[Message]
    answers: tuple[str | list[Message], ...] = ()
    trained: tuple[int, ...] = ()
    more: bool = False
    system: str = ""

    def size(self) -> int:
        """Characters of its texts."""
        parts = (self.prompt, *self.answers)
        return sum(len(p) if isinstance(p, str) else sum(len(m["content"]) for m in p) for p in parts)

    def digest(self) -> bytes:
        """Equal for rows of equal content."""
        content = msgspec.json.encode((self.kind, self.prompt, self.answers, self.trained, self.system))
        return hashlib.blake2b(content, digest_size=16).digest()


def recognise(columns: Iterable[str], chosen: str, mapping: Mapping[str, str]) -> tuple[str, dict[str, str], str]:
    """The format of a file with these columns.

    Args:
        chosen: a format, or `auto`. mapping: field -> column as the user has it; wins over names.

    Returns:
        The format ("" for none), field -> column, and why there is none.
    """
    there = list(dict.fromkeys(columns))
    tried = [chosen] if chosen != "auto" else list(FIELDS)
    for name in tried:
        needed, optional = FIELDS[name]
        found: dict[str, str] = {}
        for field in (*needed, *optional):
            column = _column(field, there, mapping)
            if column is not None:
                found[field] = column
        missing = [field for field in needed if field not in found]
        if name == "preference" and missing == ["prompt"]:
            missing = []  # chosen and rejected may be whole conversations
        if not missing:
            return name, found, ""
    columns_text = ", ".join(there[:12]) or "no columns"
    if chosen != "auto":
        needed, _ = FIELDS[chosen]
        missing = [field for field in needed if _column(field, there, mapping) is None]
        return "", {}, f"It has no column for {' and '.join(missing)} (it has: {columns_text}). Say which one it is."
    return (
        "",
        {},
        f"Its format is not recognised from its columns ({columns_text}). Choose the format and say which column is what.",
    )


def _column(field: str, columns: list[str], mapping: Mapping[str, str]) -> str | None:
    if field in mapping:
        return mapping[field] if mapping[field] in columns else None
    return next((name for name in (field, *ALIASES.get(field, ())) if name in columns), None)


def make_row(name: str, values: Mapping[str, Any], default_system: str = "") -> Row:
    """A row of format `name` from its fields (file and line still 0).

    Raises:
        BadRowError: with the reason.
    """
    if name == "text":
        return Row(0, 0, "text", _text(values, "text"))
    if name == "messages":
        return _chat(messages(values.get("messages"), "messages"), default_system)
    if name == "sharegpt":
        spoken = messages(values.get("conversations"), "conversations")
        return _chat(_with_system(spoken, _text(values, "system", optional=True)), default_system)
    if name == "alpaca":
        return _alpaca(values, default_system)
    if name == "prompt_completion":
        return _pair(values, default_system)
    return _preference(values, default_system)


def _text(values: Mapping[str, Any], field: str, optional: bool = False, empty: bool = False) -> str:
    value = values.get(field)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if value is None and (optional or empty):
        return ""
    if not isinstance(value, str):
        raise BadRowError(f"{field} is missing." if value is None else f"{field} is not a text.")
    if "\0" in value:
        raise BadRowError(f"{field} holds NUL characters.")
    if not value.strip() and not (optional or empty):
        raise BadRowError(f"{field} is empty.")
    return value


def messages(value: Any, field: str) -> list[Message]:
    """A list of messages with standard roles, from role/content or from/value.

    Raises:
        BadRowError: with the reason and the message's number.
    """
    if isinstance(value, str):  # a CSV or Parquet cell may hold them as JSON
        try:
            value = msgspec.json.decode(value)
        except (msgspec.DecodeError, RecursionError) as error:
            raise BadRowError(f"{field} is a text, not a list of messages.") from error
    if not isinstance(value, list) or not value:
        raise BadRowError(f"{field} is missing or empty." if not value else f"{field} is not a list of messages.")
    return [_message(message, number, field) for number, message in enumerate(value, 1)]


def _message(message: Any, number: int, field: str) -> Message:
    where = f"{field}, message {number}"
    if not isinstance(message, Mapping):
        raise BadRowError(f"{where} is not an object.")
    said = message.get("role", message.get("from"))
    role = ROLES.get(said.strip().lower()) if isinstance(said, str) else None
    if role is None:
        raise BadRowError(f"{where} has the unknown role {said!r}." if said is not None else f"{where} has no role.")
    content = message.get("content", message.get("value", message.get("text")))
    if isinstance(content, list):  # parts, of which only text can be learnt here
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise BadRowError(f"{where} holds something other than text.")
        content = "".join(part for part in parts if isinstance(part, str))
    if content is None and message.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise BadRowError(f"{where} has no content." if content is None else f"{where}: its content is not a text.")
    if "\0" in content:
        raise BadRowError(f"{where} holds NUL characters.")
    known = ("role", "from", "content", "value", "text")
    rest = {key: value for key, value in message.items() if key not in known and value is not None}
    return {"role": role, "content": content, **rest}


def _with_system(spoken: list[Message], system: str) -> list[Message]:
    if not system.strip() or (spoken and spoken[0]["role"] == "system"):
        return spoken
    return [{"role": "system", "content": system}, *spoken]


def _chat(spoken: list[Message], default_system: str, first_trained: int = 0) -> Row:
    while spoken and spoken[-1]["role"] != "assistant":
        spoken = spoken[:-1]  # nothing follows it that could be learnt
    shift = len(spoken)
    spoken = _with_system(spoken, default_system)
    shift = len(spoken) - shift
    trained = tuple(
        number
        for number, message in enumerate(spoken)
        if message["role"] == "assistant"
        and number - shift >= first_trained
        and message.get("weight", 1) != 0
        and (message["content"].strip() or message.get("tool_calls"))
    )
    if not trained:
        raise BadRowError("It has no answer of the assistant.")
    for message in spoken:
        message.pop("weight", None)
    return Row(0, 0, "chat", spoken, trained=trained)


def _alpaca(values: Mapping[str, Any], default_system: str) -> Row:
    question = _text(values, "instruction", empty=True)
    extra = _text(values, "input", optional=True)
    if not question.strip() and not extra.strip():
        raise BadRowError("instruction is empty.")
    question = "\n".join(part for part in (question, extra) if part.strip())
    spoken: list[Message] = []
    history = values.get("history")
    if isinstance(history, str):
        try:
            history = msgspec.json.decode(history) if history.strip() else None
        except (msgspec.DecodeError, RecursionError) as error:
            raise BadRowError("history is not a list of questions and answers.") from error
    for turn in history or ():
        if not isinstance(turn, (list, tuple)) or len(turn) != 2 or not all(isinstance(part, str) for part in turn):
            raise BadRowError("history is not a list of questions and answers.")
        spoken += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    spoken += [{"role": "user", "content": question}, {"role": "assistant", "content": _text(values, "output")}]
    return _chat(_with_system(spoken, _text(values, "system", optional=True)), default_system)


def _pair(values: Mapping[str, Any], default_system: str) -> Row:
    prompt, completion = values.get("prompt"), values.get("completion")
    system = _text(values, "system", optional=True)
    if isinstance(prompt, list) or isinstance(completion, list):
        before = messages(prompt, "prompt") if isinstance(prompt, list) else [_said("user", _text(values, "prompt"))]
        after = (
            messages(completion, "completion")
            if isinstance(completion, list)
            else [_said("assistant", _text(values, "completion"))]
        )
        before = _with_system(before, system)
        return _chat(before + after, default_system, first_trained=len(before))
    prompt = _text(values, "prompt", empty=True)
    return Row(0, 0, "pair", prompt, (_text(values, "completion"),), system=system or default_system)


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _preference(values: Mapping[str, Any], default_system: str) -> Row:
    answers = [values.get("chosen"), values.get("rejected")]
    system = _text(values, "system", optional=True) or default_system
    prompt: Any = values.get("prompt")
    if not any(isinstance(part, list) for part in (prompt, *answers)):
        plain = tuple(_text(values, field) for field in ("chosen", "rejected"))
        return _differ(Row(0, 0, "preference", _text(values, "prompt"), plain, system=system))
    spoken = [
        messages(answer, field) if isinstance(answer, list) else [_said("assistant", _text(values, field))]
        for answer, field in zip(answers, ("chosen", "rejected"), strict=True)
    ]
    if prompt is None:  # both are whole conversations: what they share is the prompt
        shared = 0
        while shared < min(len(part) for part in spoken) - 1 and spoken[0][shared] == spoken[1][shared]:
            shared += 1
        before, spoken = spoken[0][:shared], [part[shared:] for part in spoken]
        if not before:
            raise BadRowError("prompt is missing, and chosen and rejected begin differently.")
    else:
        before = messages(prompt, "prompt") if isinstance(prompt, list) else [_said("user", _text(values, "prompt"))]
        spoken = [part[len(before) :] if part[: len(before)] == before else part for part in spoken]
    if any(not part or part[-1]["role"] != "assistant" for part in spoken):
        raise BadRowError("chosen and rejected have to end with an answer of the assistant.")
    return _differ(Row(0, 0, "preference", _with_system(before, system), tuple(spoken)))


def _differ(row: Row) -> Row:
    if row.answers[0] == row.answers[1]:
        raise BadRowError("chosen and rejected are equal.")
    return row
