"""JSON and JSONL as records with line numbers, read as a stream: one row in memory. Standard library and msgspec."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, BinaryIO

import msgspec

from app.training.records import BLOCK, LONGEST_ROW, Record, Unreadable, numbered_lines, too_large

_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{},"]', re.DOTALL)
_BLANKS = b" \t\r\n"


def read_jsonl(file: BinaryIO) -> Iterator[Record]:
    """A row a line."""
    for number, line in numbered_lines(file):
        if line is None:
            yield Record(number, None, too_large())
        elif line.strip():
            yield _decode(number, line)


def _decode(line: int, text: bytes | bytearray) -> Record:
    try:
        value = msgspec.json.decode(text)
    except RecursionError:
        return Record(line, None, "It is nested absurdly deep.")
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        if not _is_utf8(text):
            return Record(line, None, "It is not UTF-8 text.")
        return Record(line, None, f"It is not JSON: {str(error).removeprefix('JSON is malformed: ')[:200]}.")
    if not isinstance(value, dict):
        return Record(line, None, f"It is {_kind(value)}, not an object with fields.")
    return Record(line, value)


def _is_utf8(text: bytes | bytearray) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _kind(value: Any) -> str:
    names = {str: "a text", list: "a list", dict: "an object", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def read_json(file: BinaryIO) -> Iterator[Record]:
    """The elements of one big list, or objects one after another; an object that holds one list of objects is that list."""
    alone: Record | None = None  # a first object, which may turn out to be the only one
    count = 0
    try:
        for record in _Splitter(file).elements():
            count += 1
            if count == 1:
                alone = record
                continue
            if alone is not None:
                yield alone
                alone = None
            yield record
    except Unreadable:
        if alone is not None:
            yield alone
        raise
    if alone is None:
        return
    lists = [v for v in (alone.value or {}).values() if isinstance(v, list) and v and isinstance(v[0], dict)]
    wrapped = len(lists) == 1 and not {"messages", "conversations", "conversation"} & set(alone.value or {})
    if not wrapped or any(key in (alone.value or {}) for key in ("chosen", "rejected", "completion")):
        yield alone
        return
    for element in lists[0]:  # their lines are not known: the object was read whole
        yield Record(
            alone.line,
            element if isinstance(element, dict) else None,
            "" if isinstance(element, dict) else "It is not an object with fields.",
        )


class _Splitter:
    """Splits JSON text at its outermost elements without building it. Memory: one element."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._buffer = bytearray()
        self._line = 1  # of the buffer's first byte
        self._at = 0  # scanned up to here
        self._start = -1  # where the element begins that is being read; -1: none
        self._depth = 0
        self._floor = -1  # depth at which elements stand: 1 in a list, 0 one after another; -1: not known yet
        self._size = BLOCK
        self._closed = False  # the list has ended

    def elements(self) -> Iterator[Record]:
        """All of them.

        Raises:
            Unreadable: what follows is no JSON, too large, or cut off.
        """
        while block := self._file.read(self._size):
            self._buffer += block
            yield from self._scan()
            if self._closed:
                return
            self._forget()
        left = self._buffer[max(self._start, 0) :].strip(_BLANKS)
        if left or self._floor == 1:
            where = self._line_at(max(self._start, 0))
            raise Unreadable(f"Line {where}: the JSON text ends in the middle. The file is cut off or damaged.")

    def _scan(self) -> Iterator[Record]:
        """The elements that end in the buffer."""
        self._size = BLOCK
        position = self._at
        for token in _TOKEN.finditer(self._buffer, self._at):
            mark = token[0][:1]
            if len(token[0]) == 1 and mark == b'"':  # a string whose end is not here yet
                self._size = max(BLOCK, len(self._buffer))
                break
            begin, position = token.span()
            if self._floor < 0 and self._begins_list(mark, begin):
                self._start = position
            elif self._floor == self._depth == 0 and mark != b"{":
                raise Unreadable(f"Line {self._line_at(begin)}: this is not JSON with rows in it.")
            elif mark in b"[{":
                self._open(begin)
            elif mark in b"]}":
                self._depth -= 1
                if self._depth == self._floor == 0:
                    yield self._element(position)
                    self._start = position
                elif self._depth < self._floor:
                    yield from self._close(begin, position)
                    return
            elif mark == b"," and self._depth == self._floor == 1:
                yield self._element(begin)
                self._start = position
        self._at = position

    def _begins_list(self, mark: bytes, begin: int) -> bool:
        """The first token of all tells whether elements stand in a list."""
        inside = mark == b"[" and not self._buffer[:begin].strip(_BLANKS)
        self._floor = self._depth = 1 if inside else 0
        return inside

    def _open(self, begin: int) -> None:
        if self._depth == self._floor == 0:
            if self._buffer[max(self._start, 0) : begin].strip(_BLANKS):
                raise Unreadable(f"Line {self._line_at(max(self._start, 0))}: this is not JSON.")
            self._start = begin
        self._depth += 1

    def _close(self, begin: int, position: int) -> Iterator[Record]:
        """The end of the list: its last element, and nothing behind it."""
        self._closed = True
        if self._buffer[self._start : begin].strip(_BLANKS):
            yield self._element(begin)
        rest = self._buffer[position:] + self._file.read(BLOCK)
        if rest.strip(_BLANKS):
            raise Unreadable(f"Line {self._line_at(position)}: something stands after the list's end.")

    def _element(self, end: int) -> Record:
        return _decode(self._line_at(self._start), self._buffer[self._start : end].strip(_BLANKS))

    def _forget(self) -> None:
        """What was read goes, up to the element that is being read."""
        done = max(0, min(self._start if self._start >= 0 else self._at, self._at))
        self._line += self._buffer.count(b"\n", 0, done)
        del self._buffer[:done]
        self._at -= done
        self._start -= done if self._start >= 0 else 0
        if len(self._buffer) > LONGEST_ROW + BLOCK:
            raise Unreadable(f"Line {self._line}: {too_large()} The rest was not read.")

    def _line_at(self, position: int) -> int:
        """The line of the first character behind `position` that is not blank."""
        buffer = self._buffer
        while position < len(buffer) and buffer[position] in _BLANKS:
            position += 1
        return self._line + buffer.count(b"\n", 0, position)
