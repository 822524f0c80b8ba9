"""What lies behind a message's text: the boxes of code blocks, the bars of quotations, rules."""

from __future__ import annotations

from PySide6.QtCore import QRect, QRectF
from PySide6.QtGui import QPainter, QTextBlock, QTextDocument

from app.views.chat.code_strips import CodeStrips
from app.views.chat.layout import QUOTE_DEPTH, RULE
from app.views.chat.pen import Pen
from app.views.chat.style import ChatStyle

RADIUS = 6
BAR, STEP = 3, 16  # pixels: how broad a quotation's bar is, and how far from the next level's


def paint_backgrounds(painter: QPainter, pen: Pen, strips: CodeStrips, style: ChatStyle, wanted: QRect) -> None:
    """Paint what lies between the upper and the lower end of what is wanted, in document coordinates."""
    for code in pen.codes:
        rect = strips.rect(code).adjusted(0.5, 0.5, -0.5, -0.5)
        if rect.bottom() < wanted.top() or rect.top() > wanted.bottom():
            continue
        painter.setPen(style.border)
        painter.setBrush(style.code_background)
        painter.drawRoundedRect(rect, RADIUS, RADIUS)
    if pen.decorated:
        block = pen.document.begin()
        while block.isValid():
            _paint_block(painter, block, pen.document, style)
            block = block.next()


def _paint_block(painter: QPainter, block: QTextBlock, document: QTextDocument, style: ChatStyle) -> None:
    form = block.blockFormat()
    if depth := form.property(QUOTE_DEPTH):
        rect = document.documentLayout().blockBoundingRect(block)
        joined = block.next().isValid() and block.next().blockFormat().property(QUOTE_DEPTH)
        height = rect.height() + (form.bottomMargin() if joined else 0)
        for level in range(int(depth)):
            painter.fillRect(QRectF(STEP * level, rect.top(), BAR, height), style.border)
    elif form.property(RULE):
        rect = document.documentLayout().blockBoundingRect(block)
        painter.fillRect(QRectF(0, rect.center().y(), document.textWidth(), 1), style.border)
