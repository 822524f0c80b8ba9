"""A line chart drawn with QPainter: several series over steps, axes with readable numbers, values under the pointer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
from PySide6.QtCore import QLineF, QPointF, QRectF, QSize, Qt
from PySide6.QtGui import QColor, QFontMetricsF, QMouseEvent, QPainter, QPaintEvent, QPen, QPolygonF
from PySide6.QtWidgets import QSizePolicy, QWidget

from app.views.theme import theme

MOST_POINTS = 600  # drawn of one series; more would only lie on the same pixels
MOST_DASHED = 120
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 28, 26
_HUES = (0, 145, 32, 280, 190, 330, 90, 235)


class Series(msgspec.Struct, frozen=True):
    """One line: its name, points (step, value) in order of step, and whether it is drawn dashed or with dots."""

    name: str
    points: tuple[tuple[float, float], ...]
    dashed: bool = False
    dots: bool = False
    group: int = 0  # series of one group share a colour


class Chart(QWidget):
    """Lines over steps.

    Args:
        title: what the values are, drawn at the upper left. logarithmic: the value axis is. most: points drawn of one series.
    """

    def __init__(
        self, title: str, *, logarithmic: bool = False, most: int = MOST_POINTS, parent: QWidget | None = None
    ) -> None:
        super().__init__(parent)
        self._most = most
        self._title = title
        self._logarithmic = logarithmic
        self._series: list[Series] = []
        self._pointer: float | None = None
        self.setMouseTracking(True)
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Expanding)
        self.setMinimumSize(160, 140)  # three beside each other in the smallest window
        self.setAccessibleName(title)
        theme()  # repaints with the palette

    def sizeHint(self) -> QSize:
        return QSize(420, 220)

    def set_series(self, series: Sequence[Series]) -> None:
        """Show these lines; what is not finite is left out."""
        self._series = [
            msgspec.structs.replace(
                s, points=thinned([p for p in s.points if self._usable(p[1])], MOST_DASHED if s.dashed else self._most)
            )
            for s in series
        ]
        self._series = [s for s in self._series if s.points]
        self.setAccessibleDescription("; ".join(f"{s.name}: {readable(s.points[-1][1])}" for s in self._series))
        self.update()

    def _usable(self, value: float) -> bool:
        return math.isfinite(value) and (value > 0 or not self._logarithmic)

    # Scales ---------------------------------------------------------------------------------------

    def _box(self) -> QRectF:
        return QRectF(_LEFT, _TOP, max(1, self.width() - _LEFT - _RIGHT), max(1, self.height() - _TOP - _BOTTOM))

    def _ranges(self) -> tuple[float, float, float, float]:
        steps = [p[0] for s in self._series for p in s.points]
        values = [self._scaled(p[1]) for s in self._series for p in s.points]
        low, high = min(values), max(values)
        if high - low < 1e-12 * max(1.0, abs(high)):
            low, high = low - abs(low) * 0.1 - 1e-9, high + abs(high) * 0.1 + 1e-9
        margin = (high - low) * 0.05
        return min(steps), max(max(steps), min(steps) + 1), low - margin, high + margin

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self._logarithmic else value

    # Painting -------------------------------------------------------------------------------------

    def paintEvent(self, event: QPaintEvent) -> None:
        painter = QPainter(self)
        painter.setRenderHint(QPainter.RenderHint.Antialiasing)
        look, box = theme(), self._box()
        painter.setPen(look.color("text"))
        painter.drawText(QRectF(12, 4, self.width() - 24, 20), Qt.AlignmentFlag.AlignVCenter, self._title)
        if not self._series:
            painter.setPen(look.color("muted"))
            painter.drawText(box, Qt.AlignmentFlag.AlignCenter, "Nothing measured yet")
            return
        ranges = self._ranges()
        self._axes(painter, box, ranges)
        painter.save()
        painter.setClipRect(box.adjusted(-3, -3, 3, 3))
        for series in self._series:
            self._line(painter, box, ranges, series)
        painter.restore()
        self._legend(painter)
        if self._pointer is not None:
            self._under_pointer(painter, box, ranges)

    def _place(self, box: QRectF, ranges: tuple[float, float, float, float], step: float, value: float) -> QPointF:
        first, last, low, high = ranges
        x = box.left() + (step - first) / (last - first) * box.width()
        y = box.bottom() - (self._scaled(value) - low) / (high - low) * box.height()
        return QPointF(x, y)

    def _axes(self, painter: QPainter, box: QRectF, ranges: tuple[float, float, float, float]) -> None:
        look = theme()
        first, last, low, high = ranges
        metrics = QFontMetricsF(painter.font())
        grid, text = look.color("border"), look.color("muted")
        for value in ticks(low, high, max(2, int(box.height() // 36))):
            y = box.bottom() - (value - low) / (high - low) * box.height()
            painter.setPen(QPen(grid, 1))
            painter.drawLine(QPointF(box.left(), y), QPointF(box.right(), y))
            painter.setPen(text)
            shown = readable(10**value if self._logarithmic else value)
            painter.drawText(
                QRectF(0, y - 8, _LEFT - 8, 16), Qt.AlignmentFlag.AlignRight | Qt.AlignmentFlag.AlignVCenter, shown
            )
        for step in ticks(first, last, max(2, int(box.width() // 90)), whole=True):
            x = box.left() + (step - first) / (last - first) * box.width()
            shown = f"{step:,.0f}"
            width = metrics.horizontalAdvance(shown) + 4
            left = min(max(0.0, x - width / 2), self.width() - width)
            painter.drawText(QRectF(left, box.bottom() + 6, width, 16), Qt.AlignmentFlag.AlignCenter, shown)

    def _line(self, painter: QPainter, box: QRectF, ranges: tuple[float, float, float, float], series: Series) -> None:
        pen = QPen(self._color(series), 1.75)
        if series.dashed:
            pen.setStyle(Qt.PenStyle.DashLine)
        points = [self._place(box, ranges, *point) for point in series.points]
        painter.setPen(pen)
        if series.dashed:
            painter.drawPolyline(QPolygonF(points))
        else:
            # Line by line: a thick polyline of a thousand points is one shape that crosses itself, which takes fifty times as long.
            painter.drawLines([QLineF(a, b) for a, b in zip(points, points[1:], strict=False)])
        if series.dots or len(points) == 1:
            painter.setBrush(self._color(series))
            for point in points:
                painter.drawEllipse(point, 2.5, 2.5)
            painter.setBrush(Qt.BrushStyle.NoBrush)

    def _color(self, series: Series) -> QColor:
        if series.group == 0:
            return theme().color("accent") if not series.dashed else theme().color("positive")
        color = QColor(theme().color("accent"))
        return QColor.fromHsl(
            (color.hslHue() + _HUES[series.group % len(_HUES)]) % 360,
            max(90, color.hslSaturation()),
            max(90, min(170, color.lightness())),
        )

    def _legend(self, painter: QPainter) -> None:
        if len(self._series) < 2 and not any(series.dashed for series in self._series):
            return  # the title says what a lone line is
        metrics = QFontMetricsF(painter.font())
        right = float(self.width() - _RIGHT)
        for series in reversed(self._series[:6]):
            shown = metrics.elidedText(series.name, Qt.TextElideMode.ElideRight, 160)
            width = metrics.horizontalAdvance(shown)
            if right - width < self.width() * 0.3:
                return
            painter.setPen(theme().color("muted"))
            painter.drawText(QRectF(right - width, 4, width + 2, 20), Qt.AlignmentFlag.AlignVCenter, shown)
            pen = QPen(self._color(series), 2)
            pen.setStyle(Qt.PenStyle.DashLine if series.dashed else Qt.PenStyle.SolidLine)
            painter.setPen(pen)
            painter.drawLine(QPointF(right - width - 20, 14), QPointF(right - width - 6, 14))
            right -= width + 34

    def _under_pointer(self, painter: QPainter, box: QRectF, ranges: tuple[float, float, float, float]) -> None:
        look = theme()
        assert self._pointer is not None
        first, last, _, _ = ranges
        step = first + (self._pointer - box.left()) / box.width() * (last - first)
        lines: list[str] = []
        shown = step
        for series in self._series:
            nearest = min(series.points, key=lambda point: abs(point[0] - step))
            lines.append(f"{series.name} {readable(nearest[1])}")
            shown = nearest[0]
            painter.setPen(Qt.PenStyle.NoPen)
            painter.setBrush(self._color(series))
            painter.drawEllipse(self._place(box, ranges, *nearest), 3.5, 3.5)
        lines.insert(0, f"Step {shown:,.0f}")
        metrics = QFontMetricsF(painter.font())
        width = max(metrics.horizontalAdvance(line) for line in lines) + 16
        height = len(lines) * metrics.lineSpacing() + 10
        left = self._pointer + 12 if self._pointer + 12 + width < self.width() else self._pointer - 12 - width
        tip = QRectF(left, box.top(), width, height)
        painter.setPen(QPen(look.color("border"), 1))
        painter.setBrush(look.color("base"))
        painter.drawRoundedRect(tip, 6, 6)
        painter.setPen(look.color("text"))
        for number, line in enumerate(lines):
            painter.drawText(
                QPointF(tip.left() + 8, tip.top() + 4 + metrics.ascent() + number * metrics.lineSpacing()), line
            )

    # The pointer ----------------------------------------------------------------------------------

    def mouseMoveEvent(self, event: QMouseEvent) -> None:
        box = self._box()
        x = event.position().x()
        self._pointer = x if self._series and box.left() <= x <= box.right() else None
        self.update()

    def leaveEvent(self, event: object) -> None:
        self._pointer = None
        self.update()


def thinned(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> tuple[tuple[float, float], ...]:
    """At most about `most` points: of each stretch the lowest and the highest, so that no peak is lost."""
    if len(points) <= most:
        return tuple(points)
    size = len(points) / (most / 2)
    kept: list[tuple[float, float]] = [points[0]]
    for number in range(int(most / 2)):
        stretch = points[int(number * size) : max(int(number * size) + 1, int((number + 1) * size))]
        low, high = min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])
        kept += sorted({low, high})
    kept.append(points[-1])
    return tuple(dict.fromkeys(kept))


def ticks(low: float, high: float, most: int, *, whole: bool = False) -> list[float]:
    """Round numbers within a range, about `most` of them; `whole` ones where asked for."""
    if not high > low:
        return [low]
    raw = (high - low) / most
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    step = max(1.0, step) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def readable(value: float) -> str:
    """2.31, 0.0002, 1.2e-05, 12,400."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 10_000:
        return f"{value:,.0f}"
    if size >= 0.001:
        return f"{value:.4g}"
    return f"{value:.1e}"
