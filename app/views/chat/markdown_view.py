"""One message's text: a read-only rich text view that takes Markdown whole or as a stream.

All work happens in slices of a few milliseconds, so that neither a flood of tokens nor a megabyte of text
holds up the window. It never loads a resource and never opens a link by itself.
"""

from __future__ import annotations

import re
import time
from collections import deque
from typing import Any

import msgspec
from PySide6.QtCore import QEvent, QRectF, QSizeF, Qt, QTimer, QUrl, Signal, Slot
from PySide6.QtGui import (
    QGuiApplication,
    QPainter,
    QPaintEvent,
    QResizeEvent,
    QTextCursor,
    QTextDocument,
    QWheelEvent,
)
from PySide6.QtWidgets import QFrame, QSizePolicy, QTextBrowser, QTextEdit, QWidget

from app.views.chat.blocks import Block, BlockSplitter, fold_at, safe_cut
from app.views.chat.code_block import CodeHeader
from app.views.chat.highlight import CodeHighlighter
from app.views.chat.style import GRID, ChatStyle
from app.views.chat.writer import (
    CODE_HEADER,
    CODE_ID,
    CODE_PADDING,
    PARAGRAPH,
    QUOTE_DEPTH,
    RULE,
    CodeBlock,
    DocumentWriter,
    Mark,
)

SLICE = 0.004  # seconds of work at a time
STREAM_SLICE = 0.002  # while text streams: somebody scrolls and types meanwhile
FRAME = 33  # milliseconds between renderings of a streaming tail
CODE_SLICE = 6000  # characters of code inserted at a time
LONG = 700  # characters of a paragraph from where only its end is written again
_PROSE = re.compile(r"[^\s>|#\-+*=\d`~$\\<]")


class MarkdownView(QTextBrowser):
    """Shows Markdown at its full height; the transcript scrolls.

    Signals:
        height_changed: the height needed at the present width is another.
        link_activated: a link was clicked; its target, already checked to be a web or mail address.
        finished: all text is rendered.
    """

    height_changed = Signal()
    link_activated = Signal(str)
    finished = Signal()

    def __init__(self, style: ChatStyle, *, markup: bool = True, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._style = style
        self._markup = markup
        self.setFrameShape(QFrame.Shape.NoFrame)
        self.setOpenLinks(False)
        self.setOpenExternalLinks(False)
        self.setUndoRedoEnabled(False)
        self.setVerticalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAsNeeded)
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        self.setTextInteractionFlags(Qt.TextInteractionFlag.TextBrowserInteraction)
        self.viewport().setAutoFillBackground(False)
        self.setObjectName("messageText")
        self.setFocusPolicy(Qt.FocusPolicy.ClickFocus)
        document = self.document()
        document.setDocumentMargin(0)
        document.setIndentWidth(24)
        # A document that is first laid out at no width keeps wrong sizes afterwards.
        self.resize(style.column, GRID)
        document.setTextWidth(style.column)
        document.setUndoRedoEnabled(False)
        self.anchorClicked.connect(self._clicked)
        document.documentLayout().documentSizeChanged.connect(self._size_changed)
        self._timer = QTimer(self)
        self._timer.setSingleShot(True)
        self._timer.timeout.connect(self._work)
        self._headers: dict[int, CodeHeader] = {}
        self._height = 0
        self._reset()

    def _reset(self) -> None:
        self._splitter = BlockSplitter(markup=self._markup)
        self._writer = DocumentWriter(self.document(), self._style)
        self._queue: deque[Block] = deque()
        self._code_rest: str | None = None  # of a long code block that is inserted in slices
        self._tail_mark: Mark | None = None
        self._tail_text = ""
        self._tail_code = False
        self._tail_due = 0.0
        self._inline_mark: Mark | None = None  # in a long paragraph: behind what is written for now
        self._inline_at = 0
        self._changed = 0  # where in the document this slice begins to change it
        self._colored_due = 0.0
        self._streaming = False
        self._hidden = ""
        self._highlights: deque[tuple[int, CodeHighlighter]] = deque()
        self._highlighted: dict[int, int] = {}  # code id: length of the text last coloured
        self._applied: dict[int, dict[int, tuple[tuple[int, int, str], ...]]] = {}
        for header in self._headers.values():
            header.deleteLater()
        self._headers = {}

    # -- text -------------------------------------------------------------------------------------

    def set_markdown(self, text: str, *, folded: bool = True) -> None:
        """Show a whole text. Long ones appear piece by piece, and of very long ones the beginning: see `hidden`."""
        self._restart()
        cut = fold_at(text) if folded else len(text)
        self._hidden = text[cut:]
        self._splitter.feed(text[:cut])
        self._splitter.finish()
        self._queue.extend(self._splitter.take())
        self._work()

    @property
    def hidden(self) -> str:
        """The rest of a very long text, not shown."""
        return self._hidden

    def show_more(self) -> None:
        """Show the next part of what is hidden."""
        rest, self._hidden = self._hidden, ""
        cut = fold_at(rest)
        self._hidden = rest[cut:]
        self._splitter = BlockSplitter(markup=self._markup)
        self._splitter.feed(rest[:cut])
        self._splitter.finish()
        self._queue.extend(self._splitter.take())
        self._work()

    def begin_stream(self, text: str = "") -> None:
        """Expect text piece by piece, after `text`."""
        self._restart()
        self._streaming = True
        if text:
            self.feed(text)
            self._work()

    def feed(self, text: str) -> None:
        """Take the next piece of a stream."""
        self._splitter.feed(text)
        self._queue.extend(self._splitter.take())
        if not self._timer.isActive():
            self._timer.start(FRAME // 2)

    def finish(self) -> None:
        """The stream has ended."""
        if self._streaming:
            self._streaming = False
            self._splitter.finish()
            self._queue.extend(self._splitter.take())
            self._work()

    def set_style(self, style: ChatStyle) -> None:
        """Take other colours or fonts; the text must be set again."""
        self._style = style
        self.document().setDefaultFont(style.font)

    @property
    def busy(self) -> bool:
        """Whether text or colour is still to come to the screen."""
        return bool(self._queue or self._highlights or self._code_rest is not None or self._streaming)

    @property
    def has_code(self) -> bool:
        """Whether there is a code block, which takes the whole width."""
        return bool(self._writer.codes)

    def _restart(self) -> None:
        self._timer.stop()
        self.clear()
        self.document().setDefaultFont(self._style.font)
        self._reset()

    def render_all(self) -> None:
        """Write what is still to come at once (somebody looks for a place in it)."""
        while self._queue or self._code_rest is not None:
            self._work()

    def mark_matches(self, found: list[QTextCursor], current: int) -> None:
        """Colour what was found, and the one that is shown more strongly."""
        selections: list[QTextEdit.ExtraSelection] = []
        for nth, cursor in enumerate(found[:500]):
            selection = QTextEdit.ExtraSelection()
            selection.cursor = cursor
            selection.format.setBackground(self._style.accent if nth == current else self._style.match)
            if nth == current:
                selection.format.setForeground(self._style.base)
            selections.append(selection)
        self.setExtraSelections(selections)

    # -- work in slices ---------------------------------------------------------------------------

    @Slot()
    def _work(self) -> None:
        deadline = time.perf_counter() + (STREAM_SLICE if self._streaming else SLICE)
        self._changed = self.document().characterCount() - 1
        self.document().documentLayout().blockSignals(True)  # one size change per slice
        try:
            more = self._write_blocks(deadline)
            if not more and self._streaming:
                more = time.perf_counter() > deadline
                if not more:
                    self._write_tail()
            if time.perf_counter() < deadline or not self._streaming:
                more = self._highlight(deadline) or more
            else:
                more = bool(self._highlights) or more
        finally:
            self.document().documentLayout().blockSignals(False)
        self._show_changes()
        if more:
            self._timer.start(0 if not self._streaming else FRAME // 2)
        elif self._streaming and self._tail_due > time.perf_counter():
            self._timer.start(FRAME)
        elif not self._streaming:
            self.finished.emit()

    def _show_changes(self) -> None:
        """Ask for a repaint from the first change on, and for the height needed now.

        The layout's own requests were blocked, so text on a line that was there already would stay unseen.
        """
        document = self.document()
        size = document.size()  # lays out what is not yet
        first = document.findBlock(min(self._changed, document.characterCount() - 1))
        top = document.documentLayout().blockBoundingRect(first).top() - CODE_HEADER - CODE_PADDING - PARAGRAPH
        before = self._height
        self._take_height(size)
        top = max(0, int(top))
        self.viewport().update(0, top, self.viewport().width(), max(before, self._height) - top + 1)
        self._place_headers(self._changed)

    def _roll_back(self, mark: Mark) -> None:
        self._changed = min(self._changed, mark.position)
        self._writer.rollback(mark)

    def _write_blocks(self, deadline: float) -> bool:
        """Write finished blocks. Returns whether some are left."""
        while self._queue or self._code_rest is not None:
            if self._code_rest is not None:
                self._write_code_slice()
            else:
                self._write_finished(self._queue.popleft())
            if time.perf_counter() > deadline:
                break
        return bool(self._queue or self._code_rest is not None)

    def _write_finished(self, block: Block) -> None:
        if self._tail_mark is not None and self._tail_code and block.kind == "code":
            # The open code block was streamed in as it is: add what is missing instead of writing it again.
            self._code_rest = block.text[len(self._tail_text) :]
            self._tail_mark, self._tail_code = None, False
            self._write_code_slice()
            return
        self._drop_tail()
        if block.kind == "code":
            self._writer.open_code(block.language)
            self._code_rest = block.text
            self._write_code_slice()
        else:
            self._writer.write(block)
            self._watch_codes()

    def _write_code_slice(self) -> None:
        assert self._code_rest is not None
        piece, self._code_rest = self._code_rest[:CODE_SLICE], self._code_rest[CODE_SLICE:]
        if self._code_rest and "\n" in piece:
            cut = piece.rindex("\n") + 1
            piece, self._code_rest = piece[:cut], piece[cut:] + self._code_rest
        self._writer.append_code(piece)
        if not self._code_rest:
            self._code_rest = None
            self._writer.close_code()
            self._watch_codes()

    # -- the unfinished end -----------------------------------------------------------------------

    def _drop_tail(self) -> None:
        self._inline_mark = None
        if self._tail_mark is not None:
            self._roll_back(self._tail_mark)
            for gone in [id for id in self._headers if id > self._tail_mark.codes]:
                self._headers.pop(gone).deleteLater()
                self._highlighted.pop(gone, None)
                self._applied.pop(gone, None)
            self._highlights = deque(entry for entry in self._highlights if entry[0] <= self._tail_mark.codes)
            self._tail_mark = None
            self._tail_code = False

    def _write_tail(self) -> None:
        """Bring the unfinished block to the screen as cheaply as it allows."""
        tail = self._splitter.tail
        if tail is None:
            self._drop_tail()
            return
        if tail.kind == "code":
            self._write_tail_code(tail)
            return
        now = time.perf_counter()
        if self._tail_mark is not None and tail.text == self._tail_text:
            return
        if self._tail_mark is not None and tail.text.startswith(self._tail_text):
            if self._inline_mark is not None:
                self._write_tail_inline(tail.text)
                return
            # Rewriting may take a tenth of the time at most; in between, text is just appended.
            if now < self._tail_due:
                return
        self._drop_tail()
        self._tail_mark = self._writer.mark()
        self._writer.write(tail, final=False)
        self._watch_codes()
        self._tail_text = tail.text
        self._tail_due = now + max(FRAME / 1000, 10 * (time.perf_counter() - now))
        if len(tail.text) > LONG and tail.kind == "markdown" and _PROSE.match(tail.text):
            self._inline_at = safe_cut(tail.text, 0)
            if self._inline_at:
                self._roll_back(self._tail_mark)
                self._writer.write(
                    msgspec.structs.replace(tail, text=tail.text[: self._inline_at].rstrip()), final=False
                )
                self._inline_mark = self._writer.mark()
                self._tail_text = ""
                self._write_tail_inline(tail.text)

    def _write_tail_inline(self, text: str) -> None:
        """A long paragraph: only its last sentences are written again."""
        assert self._inline_mark is not None
        self._roll_back(self._inline_mark)
        if cut := safe_cut(text, self._inline_at):
            self._writer.write_inline(" " + text[self._inline_at : cut].strip())
            self._inline_mark = self._writer.mark()
            self._inline_at = cut
        if rest := text[self._inline_at :].strip():
            self._writer.write_inline(" " + rest)
        self._tail_text = text

    def _write_tail_code(self, tail: Block) -> None:
        if self._tail_mark is None or not self._tail_code:
            self._drop_tail()
            self._tail_mark = self._writer.mark()
            self._tail_code = True
            self._tail_text = ""
            self._writer.open_code(tail.language)
        if len(tail.text) > len(self._tail_text):
            self._writer.append_code(tail.text[len(self._tail_text) :])
            self._tail_text = tail.text
        self._watch_codes()

    # -- code blocks ------------------------------------------------------------------------------

    def _watch_codes(self) -> None:
        for code in self._writer.codes:
            if code.id not in self._headers:
                header = CodeHeader(self._style, code.language, self.viewport())
                header.copy_requested.connect(self._copy_code)
                header.code = code
                self._headers[code.id] = header
                header.show()
            if code.highlightable and self._highlighted.get(code.id) != len(code.text):
                self._color(code)

    def _color(self, code: CodeBlock) -> None:
        if any(id == code.id for id, _ in self._highlights):
            return  # when that run ends, the next one starts
        now = time.perf_counter()
        if self._tail_code and code is self._writer.codes[-1]:
            if now < self._colored_due:
                return  # it still grows: lexing it all again for each batch would be quadratic
            self._colored_due = now + 0.2 + len(code.text) / 30_000
        self._highlighted[code.id] = len(code.text)
        applied = self._applied.setdefault(code.id, {})
        self._highlights.append(
            (
                code.id,
                CodeHighlighter(
                    self.document(), code.position, code.text, code.language, self._style.syntax(), applied
                ),
            )
        )

    def _highlight(self, deadline: float) -> bool:
        # Layout is the dear part: colour only where the layout has room left in this slice.
        deadline = max(deadline, time.perf_counter() + 0.001)
        while self._highlights:
            self._changed = min(self._changed, self._highlights[0][1].position)
            if not self._highlights[0][1].step(deadline):
                return True
            self._highlights.popleft()
            self._watch_codes()
            if time.perf_counter() > deadline:
                break
        return bool(self._highlights)

    @Slot(str)
    def _copy_code(self, text: str) -> None:
        QGuiApplication.clipboard().setText(text)

    def _place_headers(self, changed: int = 0) -> None:
        """Put the strips above code blocks where they belong; of those that end before `changed`, none has moved."""
        offset = self.horizontalScrollBar().value()
        for header in reversed(self._headers.values()):
            if header.code.end < changed:
                break
            rect = self._code_rect(header.code)
            header.setGeometry(
                round(rect.x()) - offset + 1, round(rect.y()) + 1, max(60, round(rect.width()) - 2), CODE_HEADER - 1
            )

    def _code_rect(self, code: CodeBlock) -> QRectF:
        """Where a code block is painted, in document coordinates."""
        layout = self.document().documentLayout()
        first, last = self.document().findBlock(code.position), self.document().findBlock(code.end)
        top = layout.blockBoundingRect(first).top() - CODE_HEADER - CODE_PADDING
        bottom = layout.blockBoundingRect(last).bottom() + CODE_PADDING
        left = first.blockFormat().leftMargin() - CODE_PADDING - 2
        return QRectF(left, top, self.document().textWidth() - left, bottom - top)

    # -- geometry and painting --------------------------------------------------------------------

    def height_for(self, width: int) -> int:
        """Pixels needed at this width; lays the text out for it."""
        if round(self.document().textWidth()) != width:
            self.document().setTextWidth(width)
        return self._needed_height(self.document().size())

    def _needed_height(self, size: QSizeF) -> int:
        bar = self.horizontalScrollBar().sizeHint().height() if size.width() > self.document().textWidth() + 1 else 0
        # The last block's margin does not count in a document's size.
        end = CODE_PADDING + 2 if self.document().lastBlock().blockFormat().hasProperty(CODE_ID) else 2
        return max(1, round(size.height()) + end + bar)

    @Slot(QSizeF)
    def _size_changed(self, size: QSizeF) -> None:
        self._take_height(size)
        self._place_headers()

    def _take_height(self, size: QSizeF) -> None:
        height = self._needed_height(size)
        if height != self._height:
            self._height = height
            self.height_changed.emit()

    def resizeEvent(self, event: QResizeEvent) -> None:
        super().resizeEvent(event)
        self._place_headers()

    def scrollContentsBy(self, dx: int, dy: int) -> None:
        super().scrollContentsBy(dx, dy)
        self._place_headers()

    def wheelEvent(self, event: QWheelEvent) -> None:
        if abs(event.angleDelta().x()) > abs(event.angleDelta().y()):
            super().wheelEvent(event)
        else:
            event.ignore()  # the transcript scrolls

    def paintEvent(self, event: QPaintEvent) -> None:
        painter = QPainter(self.viewport())
        painter.setRenderHint(QPainter.RenderHint.Antialiasing)
        painter.translate(-self.horizontalScrollBar().value(), 0)
        self._paint_backgrounds(painter, event.rect().top(), event.rect().bottom())
        painter.end()
        super().paintEvent(event)

    def _paint_backgrounds(self, painter: QPainter, top: int, bottom: int) -> None:
        layout = self.document().documentLayout()
        style = self._style
        for code in self._writer.codes:
            rect = self._code_rect(code).adjusted(0.5, 0.5, -0.5, -0.5)
            if rect.bottom() < top or rect.top() > bottom:
                continue
            painter.setPen(style.border)
            painter.setBrush(style.code_background)
            painter.drawRoundedRect(rect, 6, 6)
        if self._writer.decorated:
            block = self.document().begin()
            while block.isValid():
                form = block.blockFormat()
                if depth := form.property(QUOTE_DEPTH):
                    rect = layout.blockBoundingRect(block)
                    joined = block.next().isValid() and block.next().blockFormat().property(QUOTE_DEPTH)
                    height = rect.height() + (form.bottomMargin() if joined else 0)
                    for level in range(int(depth)):
                        painter.fillRect(QRectF(16 * level, rect.top(), 3, height), style.border)
                elif form.property(RULE):
                    rect = layout.blockBoundingRect(block)
                    painter.fillRect(QRectF(0, rect.center().y(), self.document().textWidth(), 1), style.border)
                block = block.next()

    # -- safety -----------------------------------------------------------------------------------

    def loadResource(self, kind: int, name: QUrl | str) -> Any:
        """Nothing is ever loaded, from wherever."""
        return None

    def doSetSource(
        self, name: QUrl | str, type: QTextDocument.ResourceType = QTextDocument.ResourceType.UnknownResource
    ) -> None:
        """Links lead nowhere inside this view."""

    @Slot(QUrl)
    def _clicked(self, target: QUrl) -> None:
        self.link_activated.emit(target.toString(QUrl.ComponentFormattingOption.FullyEncoded))

    def changeEvent(self, event: QEvent) -> None:
        super().changeEvent(event)
        if event.type() == QEvent.Type.LayoutDirectionChange:
            self._place_headers()
