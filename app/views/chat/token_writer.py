"""Write the tokens of one block of Markdown: lists, quotations, headings, tables, and the text within them.

Text goes in through a pen's cursor with formats, never as HTML.
"""

from __future__ import annotations

import html
from typing import Any

from markdown_it.token import Token
from PySide6.QtCore import Qt
from PySide6.QtGui import (
    QFont,
    QTextBlockFormat,
    QTextCharFormat,
    QTextCursor,
    QTextFrameFormat,
    QTextLength,
    QTextListFormat,
    QTextTable,
    QTextTableFormat,
)

from app.views.chat.blocks import Block
from app.views.chat.layout import CODE_ID, CODE_PADDING, INDENT, PARAGRAPH, RULE
from app.views.chat.parse import safe_link, split_links
from app.views.chat.pen import Pen
from app.views.chat.style import mix

_HEADING_SCALE = {1: 1.45, 2: 1.28, 3: 1.14, 4: 1.0, 5: 1.0, 6: 1.0}
_ALIGN = {
    "text-align:center": Qt.AlignmentFlag.AlignHCenter,
    "text-align:right": Qt.AlignmentFlag.AlignRight,
}


class TokenWriter:
    """Writes the tokens of one block."""

    def __init__(self, pen: Pen, block: Block) -> None:
        self._pen = pen
        self._block = block
        self._lists: list[QTextListFormat] = []
        self._list_objects: list[Any] = []
        self._quote = 0
        self._item_starts = False
        self._in_list_item = 0

    def write(self, tokens: list[Token]) -> None:
        """Write a block's tokens at the end of the document."""
        index = 0
        while index < len(tokens):
            token = tokens[index]
            if token.type == "table_open":
                end = next(i for i in range(index, len(tokens)) if tokens[i].type == "table_close")
                self._table(tokens[index + 1 : end])
                index = end
            elif token.type == "inline":
                self._inline_block(token, tokens[index - 1])
            else:
                self._structure(token)
            index += 1

    def _structure(self, token: Token) -> None:
        kind = token.type
        if kind in ("bullet_list_open", "ordered_list_open"):
            self._open_list(token)
        elif kind in ("bullet_list_close", "ordered_list_close"):
            self._lists.pop()
            self._list_objects.pop()
        elif kind == "list_item_open":
            self._item_starts = True
        elif kind == "list_item_close" and self._item_starts:
            self._text_block(None)  # an empty item still has its bullet
        elif kind == "blockquote_open":
            self._quote += 1
        elif kind == "blockquote_close":
            self._quote -= 1
        elif kind in ("fence", "code_block"):
            self._item_starts = False
            self._pen.open_code(token.info.strip().split(" ")[0], indent=self._indent())
            self._pen.append_code(token.content.rstrip("\n"))
            self._pen.close_code()
        elif kind == "hr":
            form = self._pen.block_format(0, top=PARAGRAPH / 2, bottom=PARAGRAPH)
            form.setProperty(RULE, True)
            self._pen.decorated = True
            self._pen.paragraph(form, self._pen.char())

    def _indent(self) -> int:
        return INDENT * len(self._lists) + 16 * self._quote

    def _open_list(self, token: Token) -> None:
        form = QTextListFormat()
        depth = len(self._lists) + 1
        if token.type == "ordered_list_open":
            form.setStyle(QTextListFormat.Style.ListDecimal)
            start = int(token.attrs.get("start", 1))
            if self._block.ordinal is not None and depth == 1:
                start = self._block.ordinal
            form.setStart(start)
            form.setNumberSuffix(".")
        else:
            styles = (
                QTextListFormat.Style.ListDisc,
                QTextListFormat.Style.ListCircle,
                QTextListFormat.Style.ListSquare,
            )
            form.setStyle(styles[(depth - 1) % 3])
        form.setIndent(depth)
        self._lists.append(form)
        self._list_objects.append(None)

    def _text_block(self, parent: Token | None) -> QTextCharFormat:
        """Start a block for text in the present containers; returns its character format."""
        pen, style = self._pen, self._pen.style
        char = pen.char()
        form = pen.block_format(16 * self._quote, quote=self._quote)
        if self._quote:
            char.setForeground(mix(style.text, style.base, 0.25))
        if parent is not None and parent.type == "heading_open":
            level = int(parent.tag[1])
            font = QFont(style.font)
            font.setPointSizeF(max(1.0, style.font.pointSizeF()) * _HEADING_SCALE[level])
            font.setWeight(QFont.Weight.DemiBold)
            char.setFont(font)
            form.setTopMargin(PARAGRAPH if level < 3 else PARAGRAPH / 2)
            form.setBottomMargin(6)
            form.setHeadingLevel(level)
        if self._block.continues:
            form.setTopMargin(0)
        if self._lists:
            form.setTopMargin(4)
            form.setBottomMargin(4)
            if not self._item_starts:
                form.setIndent(len(self._lists))
        pen.paragraph(form, char)
        if self._lists and self._item_starts:
            self._item_starts = False
            if self._list_objects[-1] is None:
                self._list_objects[-1] = pen.cursor.createList(self._lists[-1])
            else:
                self._list_objects[-1].add(pen.cursor.block())
        return char

    def _inline_block(self, token: Token, parent: Token) -> None:
        marker = None
        children = list(token.children or [])
        if self._lists and self._item_starts and children and children[0].type == "text":
            head = children[0].content[:4].lower()
            if head in ("[ ] ", "[x] "):
                marker = (
                    QTextBlockFormat.MarkerType.Checked if head == "[x] " else QTextBlockFormat.MarkerType.Unchecked
                )
                children[0].content = children[0].content[4:]
        char = self._text_block(parent)
        if marker is not None:
            form = self._pen.cursor.blockFormat()
            form.setMarker(marker)
            self._pen.cursor.setBlockFormat(form)
        self.inline(children, char)

    def inline(self, children: list[Token], char: QTextCharFormat) -> None:
        """Write inline tokens at the cursor."""
        cursor, style = self._pen.cursor, self._pen.style
        stack = [char]
        for token in children:
            kind, form = token.type, stack[-1]
            if kind.endswith("_open"):
                form = QTextCharFormat(form)
                if kind == "em_open":
                    form.setFontItalic(True)
                elif kind == "strong_open":
                    form.setFontWeight(QFont.Weight.Bold)
                elif kind == "s_open":
                    form.setFontStrikeOut(True)
                elif kind == "link_open":
                    self._link(form, str(token.attrs.get("href", "")))
                stack.append(form)
            elif kind.endswith("_close"):
                if len(stack) > 1:
                    stack.pop()
            elif kind == "text":
                self._text(token.content, form)
            elif kind == "code_inline":
                code = QTextCharFormat(form)
                code.setFontFamilies(style.mono.families())
                code.setFontFixedPitch(True)
                code.setBackground(style.inline_code)
                cursor.insertText(token.content, code)
            elif kind == "math":
                math = QTextCharFormat(form)
                math.setFontFamilies(style.mono.families())
                math.setFontItalic(True)
                cursor.insertText(token.content, math)
            elif kind == "hardbreak" or (kind == "softbreak" and self._pen.breaks):
                cursor.insertText("\u2028", form)
            elif kind == "softbreak":
                cursor.insertText(" ", form)
            elif kind == "image":
                image = QTextCharFormat(form)
                self._link(image, str(token.attrs.get("src", "")))
                cursor.insertText(f"Image: {token.content or 'without a description'}", image)

    def _text(self, text: str, form: QTextCharFormat) -> None:
        cursor = self._pen.cursor
        for broken, part in enumerate(text.replace("<br/>", "<br>").replace("<br />", "<br>").split("<br>")):
            if broken:
                cursor.insertText("\u2028", form)
            if form.isAnchor():
                cursor.insertText(part, form)
                continue
            for piece, link in split_links(part):
                styled = form
                if link:
                    styled = QTextCharFormat(form)
                    self._link(styled, link)
                cursor.insertText(piece, styled)

    def _link(self, form: QTextCharFormat, target: str) -> None:
        if safe := safe_link(target):
            form.setAnchor(True)
            form.setAnchorHref(safe)
            form.setToolTip(f"<qt>{html.escape(safe)}</qt>")  # else it might be read as HTML
            form.setForeground(self._pen.style.link)
            form.setFontUnderline(True)

    def _table(self, tokens: list[Token]) -> None:
        rows: list[list[tuple[Token, Token]]] = []
        for index, token in enumerate(tokens):
            if token.type == "tr_open":
                rows.append([])
            elif token.type == "inline":
                rows[-1].append((tokens[index - 1], token))
        columns = max((len(row) for row in rows), default=0)
        if not columns:
            return
        pen, cursor = self._pen, self._pen.cursor
        cursor.movePosition(QTextCursor.MoveOperation.End)
        if pen.fresh:  # a table needs a block before it; make that one vanish
            cursor.setBlockFormat(_tiny_block())
            cursor.setBlockCharFormat(_tiny_char())
        table: QTextTable = cursor.insertTable(len(rows), columns, self._table_format(columns))
        for r, row in enumerate(rows):
            for c, (parent, inline) in enumerate(row):
                self._cell(table, r, c, parent, inline)
        cursor.movePosition(QTextCursor.MoveOperation.End)
        cursor.setBlockFormat(_tiny_block())
        cursor.setBlockCharFormat(_tiny_char())
        pen.fresh = True

    def _table_format(self, columns: int) -> QTextTableFormat:
        pen = self._pen
        form = QTextTableFormat()
        form.setBorder(1)
        form.setBorderBrush(pen.style.border)
        form.setBorderStyle(QTextFrameFormat.BorderStyle.BorderStyle_Solid)
        form.setBorderCollapse(True)
        form.setCellPadding(6)
        form.setCellSpacing(0)
        # A frame's margin does not merge with that of the block before, which Qt leaves out before a frame.
        after_code = pen.cursor.block().blockFormat().hasProperty(CODE_ID)
        form.setTopMargin(2 if pen.empty else PARAGRAPH + (CODE_PADDING if after_code else 0))
        form.setBottomMargin(PARAGRAPH)
        form.setHeaderRowCount(1)
        form.setColumnWidthConstraints([QTextLength()] * columns)
        return form

    def _cell(self, table: QTextTable, row: int, column: int, parent: Token, inline: Token) -> None:
        pen = self._pen
        cell = table.cellAt(row, column)
        char = pen.char()
        if row == 0:
            char.setFontWeight(QFont.Weight.DemiBold)
            form = cell.format()
            form.setBackground(pen.style.code_background)
            cell.setFormat(form)
        saved = pen.cursor
        pen.cursor = cell.firstCursorPosition()
        align = QTextBlockFormat()
        align.setAlignment(_ALIGN.get(str(parent.attrs.get("style", "")), Qt.AlignmentFlag.AlignLeft))
        pen.cursor.setBlockFormat(align)
        pen.cursor.setBlockCharFormat(char)
        self.inline(list(inline.children or []), char)
        pen.cursor = saved


def _tiny_block() -> QTextBlockFormat:
    form = QTextBlockFormat()
    form.setLineHeight(1, QTextBlockFormat.LineHeightTypes.FixedHeight.value)
    return form


def _tiny_char() -> QTextCharFormat:
    form = QTextCharFormat()
    form.setFontPointSize(1)
    return form
