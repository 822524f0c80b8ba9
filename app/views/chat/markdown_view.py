"""One message's text: a read-only rich text view that takes Markdown whole or as a stream.

All work happens in slices of a few milliseconds, so that neither a flood of tokens nor a megabyte of text
holds up the window. It never loads a resource and never opens a link by itself.
"""

from __future__ import annotations

import time
from typing import Any

from PySide6.QtCore import QEvent, QSizeF, Qt, QTimer, QUrl, Signal, Slot
from PySide6.QtGui import QPainter, QPaintEvent, QResizeEvent, QTextCursor, QTextDocument, QWheelEvent
from PySide6.QtWidgets import QFrame, QSizePolicy, QTextBrowser, QTextEdit, QWidget

from app.views.chat.backgrounds import paint_backgrounds
from app.views.chat.block_stream import FRAME, BlockStream
from app.views.chat.code_strips import CodeStrips, Progress
from app.views.chat.layout import CODE_HEADER, CODE_ID, CODE_PADDING, PARAGRAPH
from app.views.chat.style import GRID, ChatStyle
from app.views.chat.writer import DocumentWriter

SLICE = 0.004  # seconds of work at a time
STREAM_SLICE = 0.002  # while text streams: somebody scrolls and types meanwhile


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
        self._strips = CodeStrips(self)
        self._height = 0
        self._reset()

    def _reset(self) -> None:
        self._writer = DocumentWriter(self.document(), self._style)
        self._progress = Progress()
        self._strips.reset(self._writer, self._style, self._progress)
        self._stream = BlockStream(self._writer, self._strips, self._progress, markup=self._markup)
        self._streaming = False

    # -- text -------------------------------------------------------------------------------------

    def set_markdown(self, text: str, *, folded: bool = True) -> None:
        """Show a whole text. Long ones appear piece by piece, and of very long ones the beginning: see `hidden`."""
        self._restart()
        self._stream.take_whole(text, folded=folded)
        self._work()

    @property
    def hidden(self) -> str:
        """The rest of a very long text, not shown."""
        return self._stream.hidden

    def show_more(self) -> None:
        """Show the next part of what is hidden."""
        self._stream.take_whole(self._stream.hidden)
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
        self._stream.feed(text)
        if not self._timer.isActive():
            self._timer.start(FRAME // 2)

    def finish(self) -> None:
        """The stream has ended."""
        if self._streaming:
            self._streaming = False
            self._stream.finish()
            self._work()

    def set_style(self, style: ChatStyle) -> None:
        """Take other colours or fonts; the text must be set again."""
        self._style = style
        self.document().setDefaultFont(style.font)

    @property
    def busy(self) -> bool:
        """Whether text or colour is still to come to the screen."""
        return self._stream.waiting or self._strips.busy or self._streaming

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
        while self._stream.waiting:
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
        self._progress.changed = self.document().characterCount() - 1
        self.document().documentLayout().blockSignals(True)  # one size change per slice
        try:
            more = self._stream.write(deadline)
            if not more and self._streaming:
                more = time.perf_counter() > deadline
                if not more:
                    self._stream.write_tail()
            if time.perf_counter() < deadline or not self._streaming:
                more = self._strips.work(deadline) or more
            else:
                more = self._strips.busy or more
        finally:
            self.document().documentLayout().blockSignals(False)
        self._show_changes()
        if more:
            self._timer.start(0 if not self._streaming else FRAME // 2)
        elif self._streaming and self._stream.tail_due > time.perf_counter():
            self._timer.start(FRAME)
        elif not self._streaming:
            self.finished.emit()

    def _show_changes(self) -> None:
        """Ask for a repaint from the first change on, and for the height needed now.

        The layout's own requests were blocked, so text on a line that was there already would stay unseen.
        """
        document = self.document()
        size = document.size()  # lays out what is not yet
        first = document.findBlock(min(self._progress.changed, document.characterCount() - 1))
        top = document.documentLayout().blockBoundingRect(first).top() - CODE_HEADER - CODE_PADDING - PARAGRAPH
        before = self._height
        self._take_height(size)
        top = max(0, int(top))
        self.viewport().update(0, top, self.viewport().width(), max(before, self._height) - top + 1)
        self._strips.place(self._progress.changed)

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
        self._strips.place()

    def _take_height(self, size: QSizeF) -> None:
        height = self._needed_height(size)
        if height != self._height:
            self._height = height
            self.height_changed.emit()

    def resizeEvent(self, event: QResizeEvent) -> None:
        super().resizeEvent(event)
        self._strips.place()

    def scrollContentsBy(self, dx: int, dy: int) -> None:
        super().scrollContentsBy(dx, dy)
        self._strips.place()

    def wheelEvent(self, event: QWheelEvent) -> None:
        if abs(event.angleDelta().x()) > abs(event.angleDelta().y()):
            super().wheelEvent(event)
        else:
            event.ignore()  # the transcript scrolls

    def paintEvent(self, event: QPaintEvent) -> None:
        painter = QPainter(self.viewport())
        painter.setRenderHint(QPainter.RenderHint.Antialiasing)
        painter.translate(-self.horizontalScrollBar().value(), 0)
        paint_backgrounds(painter, self._writer, self._strips, self._style, event.rect())
        painter.end()
        super().paintEvent(event)

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
            self._strips.place()
