"""Write parsed Markdown into a QTextDocument, block by block at its end.

Text goes in through a cursor with formats, never as HTML: nothing in a message can reach Qt's HTML or CSS
reader, and no resource is ever named. The end can be rolled back to a mark, so that the unfinished block of
a streaming answer is rewritten alone.
"""

from __future__ import annotations

import html
from typing import Any

import msgspec
from markdown_it.token import Token
from PySide6.QtCore import Qt
from PySide6.QtGui import (
    QFont,
    QTextBlockFormat,
    QTextCharFormat,
    QTextCursor,
    QTextDocument,
    QTextFormat,
    QTextFrameFormat,
    QTextLength,
    QTextListFormat,
    QTextTable,
    QTextTableFormat,
)

from app.views.chat.blocks import Block
from app.views.chat.parse import parse, parse_inline, safe_link, split_links
from app.views.chat.style import ChatStyle, mix

CODE_ID = QTextFormat.Property.UserProperty.value + 1  # of a code line: which code block it belongs to
QUOTE_DEPTH = QTextFormat.Property.UserProperty.value + 2
RULE = QTextFormat.Property.UserProperty.value + 3
CODE_HEADER = 28  # pixels above the first line, where the language and the copy button stand
CODE_PADDING = 8
PARAGRAPH = 10  # pixels between paragraphs
INDENT = 24
LINE = 4000  # characters of a line of code, before it is broken
_HEADING_SCALE = {1: 1.45, 2: 1.28, 3: 1.14, 4: 1.0, 5: 1.0, 6: 1.0}
_ALIGN = {
    "text-align:center": Qt.AlignmentFlag.AlignHCenter,
    "text-align:right": Qt.AlignmentFlag.AlignRight,
}


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


class DocumentWriter:
    """Appends blocks to a document.

    Args:
        document: written to at its end only.
        style: colours and fonts.
        breaks: a single line break in a paragraph breaks the line.
    """

    def __init__(self, document: QTextDocument, style: ChatStyle, *, breaks: bool = False) -> None:
        self.document = document
        self.style = style
        self.codes: list[CodeBlock] = []
        self.decorated = False  # there are quotes or rules to paint
        self._breaks = breaks
        self._environment: dict[str, Any] = {}
        self._fresh = True  # the last block of the document is empty and not yet used
        self._open_code: CodeBlock | None = None
        self._cursor = QTextCursor(document)

    # -- marks ------------------------------------------------------------------------------------

    def mark(self) -> Mark:
        """The present end."""
        self._cursor.movePosition(QTextCursor.MoveOperation.End)
        return Mark(
            position=self._cursor.position(),
            fresh=self._fresh,
            codes=len(self.codes),
            last_format=QTextBlockFormat(self._cursor.blockFormat()),
        )

    def rollback(self, mark: Mark) -> None:
        """Remove everything that was written after the mark."""
        cursor = self._cursor
        cursor.setPosition(mark.position)
        cursor.movePosition(QTextCursor.MoveOperation.End, QTextCursor.MoveMode.KeepAnchor)
        cursor.removeSelectedText()
        cursor.movePosition(QTextCursor.MoveOperation.End)
        if (block_list := cursor.currentList()) is not None and mark.fresh:
            block_list.remove(cursor.block())
        cursor.setBlockFormat(mark.last_format)
        if mark.fresh:
            cursor.setBlockCharFormat(self._char())
        self._fresh = mark.fresh
        self._open_code = None
        del self.codes[mark.codes :]

    # -- blocks -----------------------------------------------------------------------------------

    def write(self, block: Block, *, final: bool = True) -> None:
        """Append one block. What an unfinished one seems to define as a link's target is not kept."""
        self._cursor.beginEditBlock()
        if block.kind == "code":
            self.open_code(block.language)
            self.append_code(block.text)
            self.close_code()
        elif block.kind == "math":
            self._paragraph(self._block_format(0), self._math_char())
            self._cursor.insertText(_math_text(block.text), self._math_char())
        elif block.kind == "plain":
            self._plain(block)
        else:
            self.join(block)
            _TokenWriter(self, block).write(parse(block.text, self._scope(final)))
        self._cursor.endEditBlock()

    def _scope(self, final: bool) -> dict[str, Any]:
        if final:
            return self._environment
        return {"references": dict(self._environment.get("references", {}))}

    def write_inline(self, text: str) -> None:
        """Append a piece of a paragraph, with its markup, to the last block."""
        self._cursor.movePosition(QTextCursor.MoveOperation.End)
        self._cursor.beginEditBlock()
        _TokenWriter(self, Block(kind="markdown", text=text)).inline(
            parse_inline(text, self._scope(False)), self._char()
        )
        self._cursor.endEditBlock()

    def append_text(self, text: str) -> None:
        """Append to the last paragraph as it is (the cheap way while it streams)."""
        self._cursor.movePosition(QTextCursor.MoveOperation.End)
        self._cursor.insertText(text.replace("\n", "\u2028"))

    def _plain(self, block: Block) -> None:
        self.join(block)
        self._paragraph(self._block_format(0, top=0 if block.continues else PARAGRAPH), self._char())
        self._cursor.insertText(block.text.replace("\n", "\u2028"), self._char())

    def join(self, block: Block) -> None:
        """Close the gap before the rest of a paragraph that was broken for its length."""
        if block.continues and not self._fresh:
            self._cursor.movePosition(QTextCursor.MoveOperation.End)
            form = self._cursor.blockFormat()
            form.setBottomMargin(0)
            self._cursor.setBlockFormat(form)

    @property
    def _empty(self) -> bool:
        """Nothing is written yet."""
        return self._fresh and self.document.blockCount() == 1

    # -- code -------------------------------------------------------------------------------------

    def open_code(self, language: str, indent: int = 0) -> None:
        """Start a code block at the end."""
        form = QTextBlockFormat()
        form.setLayoutDirection(Qt.LayoutDirection.LeftToRight)
        form.setLeftMargin(indent + CODE_PADDING + 2)
        form.setRightMargin(CODE_PADDING)
        form.setTopMargin(CODE_HEADER + CODE_PADDING + (0 if self._empty else PARAGRAPH))
        form.setBottomMargin(CODE_PADDING + PARAGRAPH)
        form.setProperty(CODE_ID, len(self.codes) + 1)
        self._paragraph(form, self._code_char())
        code = CodeBlock(id=len(self.codes) + 1, language=language, text="", position=self._cursor.position())
        code.end = code.position
        self.codes.append(code)
        self._open_code = code

    def append_code(self, text: str) -> None:
        """Append source to the open code block."""
        code, cursor = self._open_code, self._cursor
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

    def _paragraph(self, form: QTextBlockFormat, char: QTextCharFormat) -> None:
        """Go to a new block at the end of the document."""
        cursor = self._cursor
        cursor.movePosition(QTextCursor.MoveOperation.End)
        if self._empty and not form.hasProperty(CODE_ID):
            form.setTopMargin(0)
        if self._fresh:
            cursor.setBlockFormat(form)
            cursor.setBlockCharFormat(char)
        else:
            cursor.insertBlock(form, char)
        self._fresh = False

    def _block_format(
        self, indent: int, *, top: float = PARAGRAPH, bottom: float = PARAGRAPH, quote: int = 0
    ) -> QTextBlockFormat:
        form = QTextBlockFormat()
        form.setLeftMargin(indent)
        form.setTopMargin(top)
        form.setBottomMargin(bottom)
        form.setLineHeight(132, QTextBlockFormat.LineHeightTypes.ProportionalHeight.value)
        if quote:
            form.setProperty(QUOTE_DEPTH, quote)
            self.decorated = True
        return form

    def _char(self) -> QTextCharFormat:
        form = QTextCharFormat()
        form.setForeground(self.style.text)
        return form

    def _code_char(self) -> QTextCharFormat:
        form = QTextCharFormat()
        form.setFont(self.style.mono)
        form.setForeground(self.style.text)
        return form

    def _math_char(self) -> QTextCharFormat:
        form = self._code_char()
        form.setFontItalic(True)
        return form


class _TokenWriter:
    """Writes the tokens of one block."""

    def __init__(self, writer: DocumentWriter, block: Block) -> None:
        self._writer = writer
        self._block = block
        self._lists: list[QTextListFormat] = []
        self._list_objects: list[Any] = []
        self._quote = 0
        self._item_starts = False
        self._in_list_item = 0

    def write(self, tokens: list[Token]) -> None:
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
            self._writer.open_code(token.info.strip().split(" ")[0], indent=self._indent())
            self._writer.append_code(token.content.rstrip("\n"))
            self._writer.close_code()
        elif kind == "hr":
            form = self._writer._block_format(0, top=PARAGRAPH / 2, bottom=PARAGRAPH)
            form.setProperty(RULE, True)
            self._writer.decorated = True
            self._writer._paragraph(form, self._writer._char())

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
        writer, style = self._writer, self._writer.style
        char = writer._char()
        form = writer._block_format(16 * self._quote, quote=self._quote)
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
        writer._paragraph(form, char)
        if self._lists and self._item_starts:
            self._item_starts = False
            if self._list_objects[-1] is None:
                self._list_objects[-1] = writer._cursor.createList(self._lists[-1])
            else:
                self._list_objects[-1].add(writer._cursor.block())
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
            form = self._writer._cursor.blockFormat()
            form.setMarker(marker)
            self._writer._cursor.setBlockFormat(form)
        self.inline(children, char)

    def inline(self, children: list[Token], char: QTextCharFormat) -> None:
        """Write inline tokens at the cursor."""
        cursor, style = self._writer._cursor, self._writer.style
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
            elif kind == "hardbreak" or (kind == "softbreak" and self._writer._breaks):
                cursor.insertText("\u2028", form)
            elif kind == "softbreak":
                cursor.insertText(" ", form)
            elif kind == "image":
                image = QTextCharFormat(form)
                self._link(image, str(token.attrs.get("src", "")))
                cursor.insertText(f"Image: {token.content or 'without a description'}", image)

    def _text(self, text: str, form: QTextCharFormat) -> None:
        cursor = self._writer._cursor
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
            form.setForeground(self._writer.style.link)
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
        writer, cursor, style = self._writer, self._writer._cursor, self._writer.style
        cursor.movePosition(QTextCursor.MoveOperation.End)
        if writer._fresh:  # a table needs a block before it; make that one vanish
            cursor.setBlockFormat(_tiny_block())
            cursor.setBlockCharFormat(_tiny_char())
        form = QTextTableFormat()
        form.setBorder(1)
        form.setBorderBrush(style.border)
        form.setBorderStyle(QTextFrameFormat.BorderStyle.BorderStyle_Solid)
        form.setBorderCollapse(True)
        form.setCellPadding(6)
        form.setCellSpacing(0)
        # A frame's margin does not merge with that of the block before, which Qt leaves out before a frame.
        before = cursor.block()
        after_code = before.blockFormat().hasProperty(CODE_ID)
        form.setTopMargin(2 if writer._empty else PARAGRAPH + (CODE_PADDING if after_code else 0))
        form.setBottomMargin(PARAGRAPH)
        form.setHeaderRowCount(1)
        form.setColumnWidthConstraints([QTextLength()] * columns)
        table: QTextTable = cursor.insertTable(len(rows), columns, form)
        for r, row in enumerate(rows):
            for c, (parent, inline) in enumerate(row):
                self._cell(table, r, c, parent, inline)
        cursor.movePosition(QTextCursor.MoveOperation.End)
        cursor.setBlockFormat(_tiny_block())
        cursor.setBlockCharFormat(_tiny_char())
        writer._fresh = True

    def _cell(self, table: QTextTable, row: int, column: int, parent: Token, inline: Token) -> None:
        writer = self._writer
        cell = table.cellAt(row, column)
        char = writer._char()
        if row == 0:
            char.setFontWeight(QFont.Weight.DemiBold)
            form = cell.format()
            form.setBackground(writer.style.code_background)
            cell.setFormat(form)
        saved = writer._cursor
        writer._cursor = cell.firstCursorPosition()
        align = QTextBlockFormat()
        align.setAlignment(_ALIGN.get(str(parent.attrs.get("style", "")), Qt.AlignmentFlag.AlignLeft))
        writer._cursor.setBlockFormat(align)
        writer._cursor.setBlockCharFormat(char)
        self.inline(list(inline.children or []), char)
        writer._cursor = saved


def _tiny_block() -> QTextBlockFormat:
    form = QTextBlockFormat()
    form.setLineHeight(1, QTextBlockFormat.LineHeightTypes.FixedHeight.value)
    return form


def _tiny_char() -> QTextCharFormat:
    form = QTextCharFormat()
    form.setFontPointSize(1)
    return form


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
