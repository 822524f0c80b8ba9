"""Write parsed Markdown into a QTextDocument, block by block at its end.

Text goes in through a cursor with formats, never as HTML: nothing in a message can reach Qt's HTML or CSS
reader, and no resource is ever named.
"""

from __future__ import annotations

from typing import Any

from PySide6.QtGui import QTextCursor, QTextDocument

from app.views.chat.blocks import Block
from app.views.chat.layout import PARAGRAPH
from app.views.chat.parse import parse, parse_inline
from app.views.chat.pen import Pen
from app.views.chat.style import ChatStyle
from app.views.chat.token_writer import TokenWriter


class DocumentWriter(Pen):
    """Appends blocks to a document."""

    def __init__(self, document: QTextDocument, style: ChatStyle, *, breaks: bool = False) -> None:
        super().__init__(document, style, breaks=breaks)
        self._environment: dict[str, Any] = {}  # what links were defined so far

    def write(self, block: Block, *, final: bool = True) -> None:
        """Append one block. What an unfinished one seems to define as a link's target is not kept."""
        self.cursor.beginEditBlock()
        if block.kind == "code":
            self.open_code(block.language)
            self.append_code(block.text)
            self.close_code()
        elif block.kind == "math":
            self.paragraph(self.block_format(0), self.math_char())
            self.cursor.insertText(_math_text(block.text), self.math_char())
        elif block.kind == "plain":
            self._plain(block)
        else:
            self.join(block)
            TokenWriter(self, block).write(parse(block.text, self._scope(final)))
        self.cursor.endEditBlock()

    def _scope(self, final: bool) -> dict[str, Any]:
        if final:
            return self._environment
        return {"references": dict(self._environment.get("references", {}))}

    def write_inline(self, text: str) -> None:
        """Append a piece of a paragraph, with its markup, to the last block."""
        self.cursor.movePosition(QTextCursor.MoveOperation.End)
        self.cursor.beginEditBlock()
        TokenWriter(self, Block(kind="markdown", text=text)).inline(parse_inline(text, self._scope(False)), self.char())
        self.cursor.endEditBlock()

    def append_text(self, text: str) -> None:
        """Append to the last paragraph as it is (the cheap way while it streams)."""
        self.cursor.movePosition(QTextCursor.MoveOperation.End)
        self.cursor.insertText(text.replace("\n", "\u2028"))

    def _plain(self, block: Block) -> None:
        self.join(block)
        self.paragraph(self.block_format(0, top=0 if block.continues else PARAGRAPH), self.char())
        self.cursor.insertText(block.text.replace("\n", "\u2028"), self.char())

    def join(self, block: Block) -> None:
        """Close the gap before the rest of a paragraph that was broken for its length."""
        if block.continues and not self.fresh:
            self.cursor.movePosition(QTextCursor.MoveOperation.End)
            form = self.cursor.blockFormat()
            form.setBottomMargin(0)
            self.cursor.setBlockFormat(form)


def _math_text(text: str) -> str:
    inner = text.strip()
    for opening, closing in (("$$", "$$"), ("\\[", "\\]")):
        if inner.startswith(opening):
            inner = inner[2:]
            if closing in inner:
                before, _, after = inner.rpartition(closing)
                inner = before.rstrip() + ("\n" + after.strip() if after.strip() else "")
            break
    return inner.strip().replace("\n", "\u2028")
