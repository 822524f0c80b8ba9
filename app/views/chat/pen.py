"""The end of a QTextDocument to write at: new blocks, their formats, and code, which is written as it comes.

The end can be rolled back to a mark, so that the unfinished block of a streaming answer is rewritten alone.
"""

from __future__ import annotations

from typing import Any

import msgspec
from PySide6.QtCore import Qt
from PySide6.QtGui import QTextBlockFormat, QTextCharFormat, QTextCursor, QTextDocument

from app.views.chat.layout import CODE_HEADER, CODE_ID, CODE_PADDING, PARAGRAPH, QUOTE_DEPTH
from app.views.chat.style import ChatStyle

LINE = 4000  # characters of a line of code, before it is broken


class CodeBlock(msgspec.Struct, kw_only=True):
    """A code block in the document: its number, language, source, and where its first line starts and its last one ends."""

    id: int
    language: str
    text: str
    position: int
    end: int = 0
    highlightable: bool = True
    column: int = 0  # characters in its last line as shown


class Mark(msgspec.Struct, frozen=True, kw_only=True):
    """A state of the document's end to go back to."""

    position: int
    fresh: bool
    codes: int
    last_format: Any


class Pen:
    """Writes at the end of a document.

    Args:
        document: written to at its end only.
        style: colours and fonts.
        breaks: a single line break in a paragraph breaks the line.

    Attributes:
        cursor: where the next text goes. fresh: the last block of the document is empty and not yet used.
        codes: the code blocks, from top to bottom. decorated: there are quotes or rules to paint.
    """

    def __init__(self, document: QTextDocument, style: ChatStyle, *, breaks: bool = False) -> None:
        self.document = document
        self.style = style
        self.codes: list[CodeBlock] = []
        self.decorated = False
        self.breaks = breaks
        self.fresh = True
        self._open_code: CodeBlock | None = None
        self.cursor = QTextCursor(document)

    # -- marks ------------------------------------------------------------------------------------

    def mark(self) -> Mark:
        """The present end."""
        self.cursor.movePosition(QTextCursor.MoveOperation.End)
        return Mark(
            position=self.cursor.position(),
            fresh=self.fresh,
            codes=len(self.codes),
            last_format=QTextBlockFormat(self.cursor.blockFormat()),
        )

    def rollback(self, mark: Mark) -> None:
        """Remove everything that was written after the mark."""
        cursor = self.cursor
        cursor.setPosition(mark.position)
        cursor.movePosition(QTextCursor.MoveOperation.End, QTextCursor.MoveMode.KeepAnchor)
        cursor.removeSelectedText()
        cursor.movePosition(QTextCursor.MoveOperation.End)
        if (block_list := cursor.currentList()) is not None and mark.fresh:
            block_list.remove(cursor.block())
        cursor.setBlockFormat(mark.last_format)
        if mark.fresh:
            cursor.setBlockCharFormat(self.char())
        self.fresh = mark.fresh
        self._open_code = None
        del self.codes[mark.codes :]

    @property
    def empty(self) -> bool:
        """Nothing is written yet."""
        return self.fresh and self.document.blockCount() == 1

    # -- code -------------------------------------------------------------------------------------

    def open_code(self, language: str, indent: int = 0) -> None:
        """Start a code block at the end."""
        form = QTextBlockFormat()
        form.setLayoutDirection(Qt.LayoutDirection.LeftToRight)
        form.setLeftMargin(indent + CODE_PADDING + 2)
        form.setRightMargin(CODE_PADDING)
        form.setTopMargin(CODE_HEADER + CODE_PADDING + (0 if self.empty else PARAGRAPH))
        form.setBottomMargin(CODE_PADDING + PARAGRAPH)
        form.setProperty(CODE_ID, len(self.codes) + 1)
        self._room_below_table(form.topMargin())
        self.paragraph(form, self._code_char())
        code = CodeBlock(id=len(self.codes) + 1, language=language, text="", position=self.cursor.position())
        code.end = code.position
        self.codes.append(code)
        self._open_code = code

    def _room_below_table(self, room: float) -> None:
        """Where a table ends, Qt gives the block below it no margin: the table has to keep the room."""
        above = self.document.lastBlock().previous()
        table = QTextCursor(above).currentTable() if self.fresh and above.isValid() else None
        if table is not None:
            form = table.format()
            form.setBottomMargin(room)
            table.setFormat(form)

    def append_code(self, text: str) -> None:
        """Append source to the open code block."""
        code, cursor = self._open_code, self.cursor
        assert code is not None
        code.text += text
        shown = self._broken(code, text)
        cursor.movePosition(QTextCursor.MoveOperation.End)
        cursor.beginEditBlock()
        first, *rest = shown.split("\n")
        cursor.insertText(first, self._code_char())
        if rest:
            form = cursor.blockFormat()
            last = QTextBlockFormat(form)
            last.setTopMargin(0)
            form.setBottomMargin(0)
            cursor.setBlockFormat(form)
            middle = QTextBlockFormat(last)
            middle.setBottomMargin(0)
            if len(rest) > 1:
                cursor.insertBlock(middle, self._code_char())
                cursor.insertText("\n".join(rest[:-1]), self._code_char())
            cursor.insertBlock(last, self._code_char())
            cursor.insertText(rest[-1], self._code_char())
        cursor.endEditBlock()
        code.end = cursor.position()

    def _broken(self, code: CodeBlock, text: str) -> str:
        """Break overlong lines for the eye; the same way however the text arrives."""
        lines: list[str] = []
        for number, line in enumerate(text.split("\n")):
            if number:
                code.column = 0
            pieces: list[str] = []
            while code.column + len(line) > LINE:
                room = LINE - code.column
                pieces.append(line[:room])
                line, code.column = line[room:], 0
                code.highlightable = False
            code.column += len(line)
            lines.append("\n".join([*pieces, line]))
        return "\n".join(lines)

    def close_code(self) -> None:
        """The open code block is complete."""
        self._open_code = None

    # -- formats ----------------------------------------------------------------------------------

    def paragraph(self, form: QTextBlockFormat, char: QTextCharFormat) -> None:
        """Go to a new block at the end of the document."""
        cursor = self.cursor
        cursor.movePosition(QTextCursor.MoveOperation.End)
        if self.empty and not form.hasProperty(CODE_ID):
            form.setTopMargin(0)
        if self.fresh:
            cursor.setBlockFormat(form)
            cursor.setBlockCharFormat(char)
        else:
            cursor.insertBlock(form, char)
        self.fresh = False

    def block_format(
        self, indent: int, *, top: float = PARAGRAPH, bottom: float = PARAGRAPH, quote: int = 0
    ) -> QTextBlockFormat:
        """Of a block of text: margins in pixels, and how many quotations deep it is."""
        form = QTextBlockFormat()
        form.setLeftMargin(indent)
        form.setTopMargin(top)
        form.setBottomMargin(bottom)
        form.setLineHeight(132, QTextBlockFormat.LineHeightTypes.ProportionalHeight.value)
        if quote:
            form.setProperty(QUOTE_DEPTH, quote)
            self.decorated = True
        return form

    def char(self) -> QTextCharFormat:
        """Of plain text."""
        form = QTextCharFormat()
        form.setForeground(self.style.text)
        return form

    def _code_char(self) -> QTextCharFormat:
        form = QTextCharFormat()
        form.setFont(self.style.mono)
        form.setForeground(self.style.text)
        return form

    def math_char(self) -> QTextCharFormat:
        """Of a formula's source."""
        form = self._code_char()
        form.setFontItalic(True)
        return form
