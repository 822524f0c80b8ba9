"""Colour code with Pygments in small slices, so that no block, however long, holds up the window."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator

from pygments.lexer import Lexer
from pygments.lexers import get_lexer_by_name
from pygments.token import Comment, Generic, Keyword, Name, Number, Operator, String, _TokenType
from pygments.util import ClassNotFound
from PySide6.QtGui import QColor, QTextCharFormat, QTextDocument, QTextLayout

MAX_HIGHLIGHTED = 200_000  # characters; more stays plain

_KINDS: tuple[tuple[_TokenType, str], ...] = (
    (Comment, "comment"),
    (Keyword.Constant, "number"),
    (Keyword.Type, "class"),
    (Keyword, "keyword"),
    (Operator.Word, "keyword"),
    (String, "string"),
    (Number, "number"),
    (Name.Function, "function"),
    (Name.Class, "class"),
    (Name.Decorator, "function"),
    (Name.Builtin, "builtin"),
    (Name.Tag, "keyword"),
    (Name.Attribute, "function"),
    (Generic.Inserted, "inserted"),
    (Generic.Deleted, "deleted"),
    (Generic.Heading, "function"),
    (Generic.Subheading, "function"),
)


@functools.lru_cache(maxsize=64)
def lexer_for(language: str) -> Lexer | None:
    """Pygments' lexer for a fence's language, or None."""
    if not language:
        return None
    try:
        return get_lexer_by_name(language.lower(), ensurenl=False, stripnl=False)
    except ClassNotFound:
        return None


@functools.lru_cache(maxsize=512)
def _kind(token: _TokenType) -> str:
    return next((name for parent, name in _KINDS if token in parent), "")


class CodeHighlighter:
    """Colours one code block of a document, a slice at a time; start again when its text has grown.

    Args:
        applied: what earlier runs gave each line; lines that come out the same are not laid out again.
    """

    def __init__(
        self,
        document: QTextDocument,
        position: int,
        text: str,
        language: str,
        colors: dict[str, QColor],
        applied: dict[int, tuple[tuple[int, int, str], ...]],
    ) -> None:
        self._document = document
        self.position = position
        lexer = lexer_for(language) if len(text) <= MAX_HIGHLIGHTED else None
        self._tokens: Iterator[tuple[int, _TokenType, str]] = (
            iter(lexer.get_tokens_unprocessed(text)) if lexer is not None else iter(())
        )
        self._formats: dict[str, QTextCharFormat] = {}
        for kind, color in colors.items():
            self._formats[kind] = QTextCharFormat()
            self._formats[kind].setForeground(color)
        self._block = document.findBlock(position)
        self._number = 0
        self._start = 0  # offset of the block's line in the text
        self._applied = applied
        self._spans: list[tuple[int, int, str]] = []
        self._changed: tuple[int, int] | None = None  # positions between which lines got other colours
        self._colored = lexer is not None
        self._read_line()

    def step(self, deadline: float) -> bool:
        """Work until `deadline` (time.perf_counter). Returns whether it is finished."""
        if not self._colored:
            return True
        for offset, token, value in self._tokens:
            self._take(offset, _kind(token), value)
            if time.perf_counter() > deadline:
                self._show()
                return False
        self._apply()
        self._show()
        return True

    def _take(self, offset: int, kind: str, value: str) -> None:
        for index, line in enumerate(value.split("\n")):
            if index:
                self._apply()
                self._block = self._block.next()
                self._number += 1
                self._start = offset
                self._read_line()
            if kind and line.strip():
                before = offset - self._start
                if self._plain:
                    self._spans.append((before, len(line), kind))
                else:
                    self._spans.append((_utf16(self._line[:before]), _utf16(line), kind))
            offset += len(line) + 1

    def _read_line(self) -> None:
        self._line = self._block.text()
        self._plain = len(self._line) == self._block.length() - 1  # Qt counts UTF-16 units, Python code points

    def _apply(self) -> None:
        """Give the line at hand its colours, if they are not the ones it has."""
        key, self._spans = tuple(self._spans), []
        if not self._block.isValid() or self._applied.get(self._number, ()) == key:
            return
        self._applied[self._number] = key
        ranges: list[QTextLayout.FormatRange] = []
        for start, length, kind in key:
            span = QTextLayout.FormatRange()
            span.start, span.length, span.format = start, length, self._formats[kind]
            ranges.append(span)
        self._block.layout().setFormats(ranges)
        first = self._changed[0] if self._changed else self._block.position()
        self._changed = (first, self._block.position() + self._block.length() - 1)

    def _show(self) -> None:
        if self._changed is not None:
            self._document.markContentsDirty(self._changed[0], max(1, self._changed[1] - self._changed[0]))
            self._changed = None


def warm_up() -> None:
    """Import the lexers that chats use most; called in a thread of its own when the window is idle."""
    for language in ("python", "bash", "json", "javascript", "html", "c", "rust", "yaml", "sql"):
        lexer_for(language)


def _utf16(text: str) -> int:
    return len(text.encode("utf-16-le", "surrogatepass")) // 2
