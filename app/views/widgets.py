"""Small controls that several views share."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from PySide6.QtCore import QRectF, QSize, Qt, Signal
from PySide6.QtGui import QAction, QFontMetrics, QPainter, QPainterPath, QPaintEvent, QPalette, QRegion, QResizeEvent
from PySide6.QtWidgets import (
    QAbstractSpinBox,
    QFrame,
    QHBoxLayout,
    QLabel,
    QLineEdit,
    QProgressBar,
    QPushButton,
    QSizePolicy,
    QToolButton,
    QVBoxLayout,
    QWidget,
)

from app.views.icons import icon, pixmap
from app.views.theme import set_property, theme, title_font

GRID = 8
POPUP_RADIUS = 8  # as in the style sheet


def button(
    text: str,
    run: Callable[[], object] | None = None,
    *,
    kind: str = "",
    icon_name: str = "",
    tip: str = "",
    parent: QWidget | None = None,
) -> QPushButton:
    """A push button. `kind` is "", primary, danger or link."""
    made = QPushButton(text, parent)
    if kind:
        made.setProperty("kind", kind)
    if icon_name:
        made.setIcon(icon(icon_name, {"primary": "on_accent", "danger": "negative", "link": "link"}.get(kind, "text")))
    if tip:
        made.setToolTip(tip)
    made.setAutoDefault(False)
    made.setAccessibleName(text)
    if run is not None:
        made.clicked.connect(run)
    return made


def icon_button(
    name: str,
    title: str,
    run: Callable[[], object] | None = None,
    *,
    shortcut: str = "",
    role: str = "muted",
    parent: QWidget | None = None,
) -> QToolButton:
    """A button that shows only an icon; `title` is its tooltip and accessible name."""
    made = QToolButton(parent)
    made.setIcon(icon(name, role, "text"))
    made.setIconSize(QSize(20, 20))
    made.setToolTip(f"{title} ({shortcut})" if shortcut else title)
    made.setAccessibleName(title)
    made.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
    if run is not None:
        made.clicked.connect(run)
    return made


_Spin = TypeVar("_Spin", bound=QAbstractSpinBox)


def spaced(box: _Spin) -> _Spin:
    """A spin box with room before its number: a style sheet's padding does not reach the text there."""
    edit = box.findChild(QLineEdit)
    if edit is not None:
        edit.setTextMargins(6, 0, 0, 0)
    return box


def label(
    text: str = "", *, tone: str = "", wrap: bool = False, selectable: bool = False, parent: QWidget | None = None
) -> QLabel:
    """A label of plain text: what it shows may come from a file, so markup is never read."""
    made = QLabel(parent)
    made.setTextFormat(Qt.TextFormat.PlainText)
    made.setText(text)
    if tone:
        made.setProperty("tone", tone)
    made.setWordWrap(wrap)
    if selectable:
        made.setTextInteractionFlags(
            Qt.TextInteractionFlag.TextSelectableByMouse | Qt.TextInteractionFlag.TextSelectableByKeyboard
        )
    return made


def title(text: str, steps: int = 1, parent: QWidget | None = None) -> QLabel:
    made = label(text, parent=parent)
    made.setFont(title_font(made, steps))
    return made


def breakable(name: str) -> str:
    """A name that a label can wrap: where it has no spaces or hyphens, it may break behind its other marks, or anywhere at last."""
    return re.sub(r"[_./\\:+]|[^\s_./\\:+-]{16}", "\\g<0>\u200b", name)


def rule(parent: QWidget | None = None, *, vertical: bool = False) -> QFrame:
    """A hairline."""
    made = QFrame(parent)
    made.setObjectName("rule")
    if vertical:
        made.setFixedWidth(1)
    else:
        made.setFixedHeight(1)
    return made


def column(
    *items: QWidget | int, spacing: int = GRID, margins: Sequence[int] = (0, 0, 0, 0), parent: QWidget | None = None
) -> QVBoxLayout:
    """A vertical layout; an int is a stretch."""
    made = QVBoxLayout(parent) if parent is not None else QVBoxLayout()
    _fill(made, items, spacing, margins)
    return made


def row(
    *items: QWidget | int, spacing: int = GRID, margins: Sequence[int] = (0, 0, 0, 0), parent: QWidget | None = None
) -> QHBoxLayout:
    """A horizontal layout; an int is a stretch."""
    made = QHBoxLayout(parent) if parent is not None else QHBoxLayout()
    _fill(made, items, spacing, margins)
    return made


def _fill(
    made: QVBoxLayout | QHBoxLayout, items: Sequence[QWidget | int], spacing: int, margins: Sequence[int]
) -> None:
    made.setContentsMargins(*margins)
    made.setSpacing(spacing)
    for item in items:
        if isinstance(item, int):
            made.addStretch(item)
        else:
            made.addWidget(item)


class ElidedLabel(QLabel):
    """One line of text that is shortened in the middle or at the end instead of widening the window."""

    def __init__(
        self, text: str = "", mode: Qt.TextElideMode = Qt.TextElideMode.ElideRight, parent: QWidget | None = None
    ) -> None:
        super().__init__(parent)
        self._mode = mode
        self.setTextFormat(Qt.TextFormat.PlainText)
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        self.setText(text)

    def setText(self, text: str) -> None:
        super().setText(" ".join(text.split("\n")))
        self._explain()

    def minimumSizeHint(self) -> QSize:
        return QSize(24, super().sizeHint().height())

    def resizeEvent(self, event: QResizeEvent) -> None:
        super().resizeEvent(event)
        self._explain()

    def _explain(self) -> None:
        cut = QFontMetrics(self.font()).horizontalAdvance(self.text()) > self.contentsRect().width()
        # Escaped: a tooltip that looks like HTML is read as HTML, local images included.
        self.setToolTip(f"<qt>{html.escape(self.text())}</qt>" if cut else "")

    @property
    def shown(self) -> str:
        """What of the text there is room for."""
        return self.fontMetrics().elidedText(self.text(), self._mode, self.contentsRect().width())

    def paintEvent(self, event: QPaintEvent) -> None:
        colour = QPalette.ColorRole.WindowText
        self.style().drawItemText(
            QPainter(self), self.contentsRect(), int(self.alignment()), self.palette(), self.isEnabled(), self.shown, colour
        )  # fmt: skip


class IconLabel(QLabel):
    """An icon that stands for itself, tinted from the palette."""

    def __init__(self, name: str, size: int = 20, role: str = "muted", parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._name, self._size, self._role = name, size, role
        theme()  # see icons.icon
        self.setFixedSize(size, size)

    def set_icon(self, name: str, role: str = "") -> None:
        self._name, self._role = name, role or self._role
        self.update()

    def paintEvent(self, event: QPaintEvent) -> None:
        painter = QPainter(self)
        painter.drawPixmap(0, 0, pixmap(self._name, self._size, self.devicePixelRatioF(), self._role))


class Banner(QFrame):
    """A sentence across a page, with an optional bar and buttons. `tone` is info, warning, negative or positive."""

    def __init__(self, tone: str = "info", *, slim: bool = False, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setProperty("banner", tone)
        if slim:
            self.setObjectName("slim")
        self._icon = IconLabel("info", 20)
        self.text = label(wrap=True)
        self.text.setMinimumWidth(80)
        self.bar = QProgressBar()
        self.bar.setTextVisible(False)
        self.bar.setFixedWidth(160)
        self.bar.hide()
        self._row = row(
            self._icon, self.text, self.bar, margins=(16, 8, 16, 8) if slim else (12, 8, 12, 8), spacing=12, parent=self
        )
        self._row.setStretch(1, 1)
        self.set_tone(tone)

    def set_tone(self, tone: str) -> None:
        names = {
            "info": ("info", "on_selection"),
            "warning": ("warning",) * 2,
            "negative": ("error", "negative"),
            "positive": ("done", "positive"),
        }
        self._icon.set_icon(*names[tone])
        set_property(self, "banner", tone)
        self.text.style().unpolish(self.text)
        self.text.style().polish(self.text)

    def add(self, widget: QWidget) -> None:
        self._row.addWidget(widget)


class EmptyState(QWidget):
    """One sentence and at most one button. The page around it takes drops."""

    def __init__(
        self,
        icon_name: str,
        heading: str,
        sentence: str,
        action: QPushButton | None = None,
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(parent)
        self.sentence = label(sentence, tone="muted", wrap=True)
        self.sentence.setFixedWidth(440)
        self.sentence.setAlignment(Qt.AlignmentFlag.AlignHCenter)
        layout = column(parent=self, spacing=12, margins=(24, 24, 24, 24))
        layout.addStretch(2)
        layout.addWidget(IconLabel(icon_name, 48, "control"), 0, Qt.AlignmentFlag.AlignHCenter)
        layout.addWidget(title(heading), 0, Qt.AlignmentFlag.AlignHCenter)
        # In a row of its own: an alignment flag would take the label's height for another width.
        layout.addLayout(row(1, self.sentence, 1))
        if action is not None:
            layout.addWidget(action, 0, Qt.AlignmentFlag.AlignHCenter)
        layout.addStretch(3)


class Fold(QWidget):
    """A heading that opens and closes what is below it."""

    toggled = Signal(bool)

    def __init__(self, text: str, content: QWidget, *, opened: bool = False, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.header = QToolButton()
        self.header.setObjectName("foldHeader")
        self.header.setText(text)
        self.header.setAccessibleName(text)
        self.header.setCheckable(True)
        self.header.setToolButtonStyle(Qt.ToolButtonStyle.ToolButtonTextBesideIcon)
        self.header.setIconSize(QSize(16, 16))
        self.header.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
        self.header.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        self.header.setFont(title_font(self.header, 0))
        self.content = content
        column(self.header, content, spacing=4, parent=self)
        self.header.toggled.connect(self._show)
        self.header.setChecked(opened)
        self._show(opened)

    def _show(self, opened: bool) -> None:
        self.header.setIcon(icon("chevron-down" if opened else "chevron-right", "muted"))
        self.content.setVisible(opened)
        self.toggled.emit(opened)


class Chip(QLabel):
    """A word on a coloured ground. `tone` is plain, positive, warning or negative."""

    def __init__(self, text: str = "", tone: str = "plain", parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setTextFormat(Qt.TextFormat.PlainText)
        self.setProperty("chip", tone)
        self.setAlignment(Qt.AlignmentFlag.AlignCenter)
        self.setSizePolicy(QSizePolicy.Policy.Maximum, QSizePolicy.Policy.Fixed)
        self.setText(text)

    def set(self, text: str, tone: str = "plain") -> None:
        self.setText(text)
        set_property(self, "chip", tone)
        self.setVisible(bool(text))


def cut_corners(popup: QWidget) -> None:
    """Take the corners off a popup of fixed size, for screens without a compositor: there they would be black."""
    path = QPainterPath()
    path.addRoundedRect(QRectF(popup.rect()), POPUP_RADIUS, POPUP_RADIUS)
    popup.setMask(QRegion(path.toFillPolygon().toPolygon()))


def local_paths(urls: Sequence[object]) -> list[Path]:
    """The local files among dropped URLs (QUrl), absolute."""
    return [Path(url.toLocalFile()).absolute() for url in urls if url.isLocalFile()]  # type: ignore[attr-defined]


def action(parent: QWidget, text: str, run: Callable[[], object], shortcut: str = "", icon_name: str = "") -> QAction:
    """A QAction of `parent`, active while the parent's window is; shortcuts work without a menu bar."""
    made = QAction(text, parent)
    if shortcut:
        made.setShortcut(shortcut)
    if icon_name:
        made.setIcon(icon(icon_name))
    made.triggered.connect(lambda _checked=False: run())
    parent.addAction(made)
    return made
