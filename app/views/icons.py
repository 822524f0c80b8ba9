"""Weft's own icons: SVG on a 24 px grid with one stroke width, tinted from the palette and drawn sharp at any scale."""

from __future__ import annotations

import functools

from PySide6.QtCore import QByteArray, QRect, QRectF, QSize, Qt
from PySide6.QtGui import QIcon, QIconEngine, QPainter, QPixmap
from PySide6.QtSvg import QSvgRenderer

from app.core.paths import resources
from app.views.theme import theme


@functools.cache
def _source(name: str) -> bytes:
    return (resources() / "icons" / f"{name}.svg").read_bytes()


@functools.lru_cache(maxsize=256)
def _renderer(name: str, color: str) -> QSvgRenderer:
    return QSvgRenderer(QByteArray(_source(name).replace(b"currentColor", color.encode())))


class _Engine(QIconEngine):
    """Draws one icon in the palette's colour of the moment, so that a theme switch needs no new icons."""

    def __init__(self, name: str, role: str, on_role: str) -> None:
        super().__init__()
        self._name, self._role, self._on_role = name, role, on_role

    def clone(self) -> QIconEngine:
        return _Engine(self._name, self._role, self._on_role)

    def paint(self, painter: QPainter, rect: QRect, mode: QIcon.Mode, state: QIcon.State) -> None:
        role = "disabled" if mode == QIcon.Mode.Disabled else self._on_role if state == QIcon.State.On else self._role
        side = min(rect.width(), rect.height())
        box = QRectF(rect.x() + (rect.width() - side) / 2, rect.y() + (rect.height() - side) / 2, side, side)
        painter.setRenderHint(QPainter.RenderHint.Antialiasing)
        _renderer(self._name, theme().color(role).name()).render(painter, box)

    def pixmap(self, size: QSize, mode: QIcon.Mode, state: QIcon.State) -> QPixmap:
        pixmap = QPixmap(size)
        if size.isEmpty():  # a button that has no room yet
            return pixmap
        pixmap.fill(Qt.GlobalColor.transparent)
        painter = QPainter(pixmap)
        self.paint(painter, QRect(0, 0, size.width(), size.height()), mode, state)
        painter.end()
        return pixmap


@functools.cache
def icon(name: str, role: str = "text", on_role: str = "") -> QIcon:
    """The icon of this name (a file of resources/icons), in the palette's colour `role`; `on_role` when checked."""
    theme()  # not first in paint(): installing a style sheet while a widget paints itself is a crash
    return QIcon(_Engine(name, role, on_role or role))


def pixmap(name: str, size: int, ratio: float, role: str = "text") -> QPixmap:
    """The icon as a pixmap of `size` logical pixels for a screen of this device pixel ratio."""
    side = round(size * ratio)
    image = QPixmap(side, side)
    image.fill(Qt.GlobalColor.transparent)
    painter = QPainter(image)
    painter.setRenderHint(QPainter.RenderHint.Antialiasing)
    _renderer(name, theme().color(role).name()).render(painter, QRectF(0, 0, side, side))
    painter.end()
    image.setDevicePixelRatio(ratio)
    return image


def window_icon() -> QIcon:
    """The program's own mark; not tinted."""
    return QIcon(str(resources() / "icons" / "weft.svg"))
