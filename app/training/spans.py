"""Where in a rendered conversation the assistant's answers stand: what is trained, from the first character to the end of turn.

Four ways, each checked before it is believed:

1. The template says so itself (`{% generation %}`).
2. Prefixes: the conversation up to the answer, with the generation prompt, and the conversation up to its end are both
   beginnings of the whole. That is what the model sees, and has to write, when it is used.
3. Templates that write earlier turns otherwise than the last (they drop reasoning, move the system prompt): the answers are
   replaced by marks, and the whole has to be, letter for letter, what stands between the marks with the answers in their places.
4. The last answer alone, by prefix.

A turn ends with its end-of-turn mark; what a template writes behind that (a line break, an end-of-text mark for the whole
conversation) is never asked of a model, and is not trained.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from app.core.errors import ErrorKind, WeftError
from app.generation.hf_prompt import TURN_ENDS
from app.generation.renderer import Renderer, TemplateRefusal
from app.generation.template import LARGEST_SOURCE, ROLES_JOINED, SYSTEM_MOVED
from app.training.formats import BadRowError, Message

SECONDS = 5.0  # that a template may take for one rendering
ONLY_LAST = "This chat template writes earlier answers otherwise than the last one: only the last answer is trained."

_GENERATION = re.compile(r"\{%[-+]?\s*generation\b")


class Rendered(NamedTuple):
    """A conversation as text.

    Attributes:
        spans: [start, end) in characters of what is trained, in order, not overlapping.
        notes: what was changed or could not be done, in sentences.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    notes: tuple[str, ...] = ()


class Turn(NamedTuple):
    """A message and whether it is to be learnt."""

    message: Message
    trained: bool


class SpanFinder:
    """Renders conversations through one template and finds the answers in them. `close` ends the template's process.

    Args:
        source: the template. special_tokens: name -> token, as the template sees them (`bos_token`, …).

    Raises:
        WeftError: HOSTILE when the source is absurdly long.
    """

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        if len(source) > LARGEST_SOURCE:
            raise WeftError(
                ErrorKind.HOSTILE,
                f"The chat template has {len(source):,} characters; that is none.",
                "Choose another template in the data section.",
            )
        self._renderer = Renderer(source)
        self._variables: dict[str, Any] = {"tools": None, "documents": None, **special_tokens}
        self._known: dict[bytes, str | WeftError] = {}  # renderings made ahead
        self._marked = bool(_GENERATION.search(source))
        ends = {*TURN_ENDS, special_tokens.get("eos_token", "")} - {""}
        self._ends = "|".join(re.escape(end) for end in sorted(ends, key=len, reverse=True))
        self._tail = re.compile(rf"(?:\s|{self._ends})*\Z")
        self._end = re.compile(self._ends)
        self._soon = re.compile(rf"\s*(?:{self._ends})")

    def __enter__(self) -> SpanFinder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the template's process."""
        self._renderer.close()

    def render(self, messages: Sequence[Message], opened: bool, **variables: Any) -> str:
        """The conversation as text; `opened`: with what stands before the next answer.

        Raises:
            TemplateRefusal: the template does not take it. WeftError: CORRUPT, HOSTILE.
        """
        known = None if variables else self._known.get(_key(messages, opened))
        if isinstance(known, WeftError):
            raise known
        if known is not None:
            return known
        return self._renderer.render(
            list(messages), {**self._variables, "add_generation_prompt": opened, **variables}, SECONDS
        )

    def prepare(self, conversations: Sequence[tuple[Sequence[Message], Sequence[int]]]) -> None:
        """Render in one go what `find` will most likely want for these; forgets what was rendered ahead before.

        Raises:
            WeftError: CORRUPT (no template), HOSTILE.
        """
        wanted: dict[bytes, tuple[list[Message], bool]] = {}
        for messages, trained in conversations:
            spoken = list(messages)
            wanted[_key(spoken, False)] = (spoken, False)
            for number in () if self._marked else trained:
                wanted[_key(spoken[:number], True)] = (spoken[:number], True)
                if number + 1 < len(spoken):
                    wanted[_key(spoken[: number + 1], False)] = (spoken[: number + 1], False)
        asked = [(part, {**self._variables, "add_generation_prompt": opened}) for part, opened in wanted.values()]
        found = self._renderer.render_many(asked, SECONDS + 0.01 * len(asked)) if asked else []
        self._known = {key: text for key, text in zip(wanted, found, strict=True) if text is not None}

    def find(self, messages: Sequence[Message], trained: Sequence[int]) -> Rendered:
        """Render, and find the messages numbered in `trained` (at least one, all of the assistant).

        Raises:
            BadRowError: the template refuses the conversation, or the answers cannot be found for sure.
            WeftError: CORRUPT (no template), HOSTILE (it attacks, or does not end).
        """
        turns = [Turn(message, number in trained) for number, message in enumerate(messages)]
        refusal = ""
        for form, notes in _forms(turns):
            try:
                text = self.render([t.message for t in form], False)
            except TemplateRefusal as error:
                refusal = refusal or error.message
                continue
            if any(t.message["role"] == "system" and t.message["content"].strip() not in text for t in form):
                if not notes:
                    continue  # it drops the system prompt; the next form puts it where it is seen
            found = self._in(form, text)
            return found._replace(notes=(*notes, *found.notes))
        raise BadRowError(refusal or "The chat template drops the system prompt.")

    def _in(self, turns: list[Turn], text: str) -> Rendered:
        for way in (self._by_marks, self._by_prefixes, self._by_stand_ins):
            try:
                spans = way(turns, text)
            except TemplateRefusal:
                continue  # it does not take the beginning of the conversation, or a changed answer
            if spans is not None:
                return Rendered(text, tuple(spans))
        last = turns[-1]
        if last.trained:
            try:
                opened = self.render([t.message for t in turns[:-1]], True)
            except TemplateRefusal:
                opened = ""
            if opened and text.startswith(opened) and len(opened) < len(text):
                notes = (ONLY_LAST,) if sum(t.trained for t in turns) > 1 else ()
                return Rendered(text, (self._closed(text, len(opened), len(text)),), notes)
        raise BadRowError("The chat template rewrites the answers, so that they cannot be found in its text.")

    def _closed(self, text: str, start: int, end: int) -> tuple[int, int]:
        """The span without what stands behind its end-of-turn mark."""
        tail = self._tail.search(text, start, end)
        mark = self._end.search(text, tail.start(), end) if tail else None
        return start, mark.end() if mark else end

    def _by_marks(self, turns: list[Turn], text: str) -> list[tuple[int, int]] | None:
        if not self._marked:
            return None
        opening, closing = f"[{secrets.token_hex(12)}]", f"[{secrets.token_hex(12)}]"
        marked = self.render(
            [t.message for t in turns], False, weft_generation_open=opening, weft_generation_close=closing
        )
        spans: list[tuple[int, int]] = []
        plain = ""
        for piece in marked.split(opening):
            inside, closed, outside = piece.partition(closing)
            if closed:
                start = len(plain)
                plain += inside + outside
                end = start + len(inside)
                soon = self._soon.match(plain, end)
                has_end = self._closed(plain, start, end)[1] < end or self._end.search(plain, max(start, end - 64), end)
                spans.append(self._closed(plain, start, soon.end() if soon and not has_end else end))
            else:
                plain += piece
        spoken = [t for t in turns if t.message["role"] == "assistant"]
        if plain != text or len(spans) != len(spoken):
            return None
        return [span for span, turn in zip(spans, spoken, strict=True) if turn.trained and span[0] < span[1]]

    def _by_prefixes(self, turns: list[Turn], text: str) -> list[tuple[int, int]] | None:
        spans: list[tuple[int, int]] = []
        for number, turn in enumerate(turns):
            if not turn.trained:
                continue
            before = self.render([t.message for t in turns[:number]], True)
            if not text.startswith(before):
                return None
            whole = text
            if number + 1 < len(turns):
                whole = self.render([t.message for t in turns[: number + 1]], False)
                end = self._closed(whole, len(before), len(whole))[1]
                whole = whole if text.startswith(whole) else whole[:end]
            if not text.startswith(whole) or len(whole) <= len(before):
                return None
            spans.append(self._closed(text, len(before), len(whole)))
        return spans

    def _by_stand_ins(self, turns: list[Turn], text: str) -> list[tuple[int, int]] | None:
        mark = f"WEFT{secrets.token_hex(12)}"
        changed = [
            {**t.message, "content": f"{mark}{number:06d}"} if t.trained else t.message
            for number, t in enumerate(turns)
        ]
        shown = self.render(changed, False)
        pieces = re.split(rf"{mark}\d{{6}}", shown)
        trained = [number for number, t in enumerate(turns) if t.trained]
        in_order = [int(found) for found in re.findall(rf"{mark}(\d{{6}})", shown)] == trained
        if not in_order or not text.startswith(pieces[0]):
            return None
        spans: list[tuple[int, int]] = []
        at = len(pieces[0])
        for index, number in enumerate(trained):
            behind = pieces[index + 1]
            last = index + 1 == len(trained)
            content = next(
                (c for c in _as_written(turns[number].message["content"]) if text.startswith(c + behind, at)), None
            )
            if content is None or (last and at + len(content) + len(behind) != len(text)):
                return None
            soon = self._soon.match(behind)
            start = at - self._blank_before(turns[:number], pieces[index])
            spans.append((start, at + len(content) + (soon.end() if soon else 0)))
            at += len(content) + len(behind)
        return spans

    def _blank_before(self, turns: list[Turn], before: str) -> int:
        """How many blanks stand between the generation prompt and the answer: the model writes them."""
        try:
            opened = self.render([t.message for t in turns], True)
        except TemplateRefusal:
            return 0
        if opened.rstrip()[-8:] != before.rstrip()[-8:]:
            return 0  # the prompt ends with something that stands in no finished conversation
        return max(0, len(before) - len(before.rstrip()) - len(opened) + len(opened.rstrip()))


def _key(messages: Sequence[Message], opened: bool) -> bytes:
    return msgspec.json.encode((opened, messages))


def _as_written(content: str) -> tuple[str, ...]:
    """What templates make of an answer: as it is, trimmed, or without the reasoning before it."""
    answer = content.rpartition("</think>")[2]
    forms = (content, content.strip(), content.lstrip(), content.rstrip(), answer, answer.lstrip("\n"), answer.strip())
    return tuple(dict.fromkeys(forms))


def _forms(turns: list[Turn]) -> list[tuple[list[Turn], tuple[str, ...]]]:
    """The conversation as it is, then forms that stricter templates take, each with what was changed."""
    moved, joined = _move_system(turns), _join_neighbours(turns)
    forms = [
        (turns, ()),
        (moved, (SYSTEM_MOVED,)),
        (joined, (ROLES_JOINED,)),
        (_join_neighbours(moved), (SYSTEM_MOVED, ROLES_JOINED)),
    ]
    found: list[tuple[list[Turn], tuple[str, ...]]] = []
    for form, notes in forms:
        if form not in [other for other, _ in found]:
            found.append((form, notes))
    return found


def _move_system(turns: list[Turn]) -> list[Turn]:
    system = "\n\n".join(t.message["content"] for t in turns if t.message["role"] == "system")
    rest = [t for t in turns if t.message["role"] != "system"]
    if not system.strip():
        return rest
    for at, turn in enumerate(rest):
        if turn.message["role"] == "user":
            content = f"{system}\n\n{turn.message['content']}"
            rest[at] = Turn({**turn.message, "content": content}, False)
            return rest
    return [Turn({"role": "user", "content": system}, False), *rest]


def _join_neighbours(turns: list[Turn]) -> list[Turn]:
    joined: list[Turn] = []
    for turn in turns:
        before = joined[-1] if joined else None
        if before and before.message["role"] == turn.message["role"] and before.trained == turn.trained:
            content = f"{before.message['content']}\n\n{turn.message['content']}"
            joined[-1] = Turn({**before.message, "content": content}, turn.trained)
        else:
            joined.append(turn)
    return joined
