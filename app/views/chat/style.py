"""Colours, fonts and distances of the chat, derived from the application's palette."""

from __future__ import annotations

import msgspec
from PySide6.QtGui import QColor, QFont, QFontDatabase, QFontMetricsF
from PySide6.QtWidgets import QApplication

from app.views.theme import theme

GRID = 8
INSET = GRID  # left and right of everything in a message, where the focus frame stands
COLUMN_CHARACTERS = 80  # the longest line of an answer
_SAMPLE = "How do I add a LoRA to a model, and what does its weight mean for the answers?"


def mix(a: QColor, b: QColor, share: float) -> QColor:
    """`share` of b in a, opaque."""
    return QColor.fromRgbF(
        a.redF() + (b.redF() - a.redF()) * share,
        a.greenF() + (b.greenF() - a.greenF()) * share,
        a.blueF() + (b.blueF() - a.blueF()) * share,
    )


class ChatStyle(msgspec.Struct, frozen=True, kw_only=True):
    """What the chat paints with; made anew when the palette or the font changes."""

    dark: bool
    base: QColor
    text: QColor
    muted: QColor
    border: QColor
    accent: QColor
    link: QColor
    bubble: QColor
    code_background: QColor
    inline_code: QColor
    match: QColor
    danger: QColor
    font: QFont
    mono: QFont
    column: int  # pixels of the text column

    def syntax(self) -> dict[str, QColor]:
        """Colours of highlighted code by kind."""
        return {kind: QColor(dark if self.dark else light) for kind, (light, dark) in _SYNTAX.items()}


_SYNTAX = {  # kind: on light, on dark; each at least 4.5:1 on the code background
    "comment": ("#667080", "#8b96a5"),
    "keyword": ("#8b2fa8", "#d19af0"),
    "string": ("#2a6f2a", "#9fd08a"),
    "number": ("#a04a00", "#e8b06a"),
    "function": ("#1f5fb0", "#84b8f5"),
    "class": ("#8a5a00", "#e3c77a"),
    "builtin": ("#0b6e75", "#74cdd0"),
    "inserted": ("#1d6f37", "#8fd6a4"),
    "deleted": ("#b02a37", "#f29aa3"),
}


def chat_style(font: QFont | None = None) -> ChatStyle:
    """The style for the theme in use and a font; the application's when none is given."""
    colors = theme()
    font = QFont(font or QApplication.font())
    base, text = colors.color("base"), colors.color("text")
    mono = QFontDatabase.systemFont(QFontDatabase.SystemFont.FixedFont)
    if font.pointSizeF() > 0:
        mono.setPointSizeF(font.pointSizeF() * 0.95)
    mono.setStyleHint(QFont.StyleHint.Monospace)
    average = QFontMetricsF(font).horizontalAdvance(_SAMPLE) / len(_SAMPLE)
    return ChatStyle(
        dark=colors.dark,
        base=base,
        text=text,
        muted=colors.color("muted"),
        border=colors.color("border"),
        accent=colors.color("accent"),
        link=colors.color("link"),
        bubble=mix(base, colors.color("selection"), 0.75),
        code_background=colors.color("code"),
        inline_code=mix(base, text, 0.13 if colors.dark else 0.07),
        match=QColor("#7a6200" if colors.dark else "#ffe08a"),
        danger=colors.color("negative"),
        font=font,
        mono=mono,
        column=round(average * COLUMN_CHARACTERS),
    )
