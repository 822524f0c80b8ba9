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
    """Colours one code block of a document, a slice at a time; start again when its text has grown."""

    def __init__(
        self, document: QTextDocument, position: int, text: str, language: str, colors: dict[str, QColor]
    ) -> None:
        self._document = document
        self._position = position
        lexer = lexer_for(language) if len(text) <= MAX_HIGHLIGHTED else None
        self._tokens: Iterator[tuple[int, _TokenType, str]] = (
            iter(lexer.get_tokens_unprocessed(text)) if lexer is not None else iter(())
        )
        self._formats: dict[str, QTextCharFormat] = {}
        for kind, color in colors.items():
            self._formats[kind] = QTextCharFormat()
            self._formats[kind].setForeground(color)
        self._block = document.findBlock(position)
        self._start = 0  # offset of the block's line in the text
        self._ranges: list[QTextLayout.FormatRange] = []
        self._read_line()
        self._colored = lexer is not None

    def step(self, deadline: float) -> bool:
        """Work until `deadline` (time.perf_counter). Returns whether it is finished."""
        if not self._colored:
            return True
        dirty = self._block.position()
        for offset, token, value in self._tokens:
            self._take(offset, _kind(token), value)
            if time.perf_counter() > deadline:
                self._dirty(dirty)
                return False
        self._apply()
        self._dirty(dirty)
        return True

    def _take(self, offset: int, kind: str, value: str) -> None:
        lines = value.split("\n")
        for index, line in enumerate(lines):
            if index:
                self._apply()
                self._block = self._block.next()
                self._start = offset
                self._read_line()
            if kind and line.strip() and self._block.isValid():
                span = QTextLayout.FormatRange()
                before = offset - self._start
                span.start = before if self._plain else _utf16(self._line[:before])
                span.length = len(line) if self._plain else _utf16(line)
                span.format = self._formats[kind]
                self._ranges.append(span)
            offset += len(line) + 1

    def _read_line(self) -> None:
        self._line = self._block.text()
        self._plain = len(self._line) == self._block.length() - 1  # Qt counts UTF-16 units, Python code points

    def _apply(self) -> None:
        if self._block.isValid():
            self._block.layout().setFormats(self._ranges)
        self._ranges = []

    def _dirty(self, start: int) -> None:
        end = (
            self._block.position() + self._block.length() if self._block.isValid() else self._document.characterCount()
        )
        self._document.markContentsDirty(start, max(1, end - start - 1))


def _utf16(text: str) -> int:
    return len(text.encode("utf-16-le", "surrogatepass")) // 2
