"""Norms of an adapter's changes, layer by layer, a line for each kind of module; what is amiss is marked."""

from __future__ import annotations

import math

from PySide6.QtCore import QEvent, QPointF, QRectF, QSize, Qt
from PySide6.QtGui import QBrush, QColor, QHelpEvent, QMouseEvent, QPainter, QPaintEvent, QPen
from PySide6.QtWidgets import QToolTip, QWidget

from app.core.adapter_plans import HealthReport, ModuleNorm
from app.views.theme import theme

_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 8, 8, 22
_LEGEND = 18
_HUES = (211, 32, 145, 280, 0, 180, 55, 320, 95, 240)
_MARKS = {"zero": "warning", "broken": "negative", "rank": "warning", "odd": "warning"}


class NormChart(QWidget):
    """x: layer, y: Frobenius norm of s·B·A. Hover tells a point; the accessible description tells all in words."""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._report: HealthReport | None = None
        self._series: dict[str, list[ModuleNorm]] = {}
        self._points: list[tuple[QPointF, ModuleNorm]] = []
        self.setMouseTracking(True)
        self.setAccessibleName("Norms of the adapter's changes by layer")
        self.setFocusPolicy(Qt.FocusPolicy.NoFocus)

    def show_report(self, report: HealthReport | None) -> None:
        """Draw these; None clears the chart."""
        self._report = report
        self._series = {}
        for one in report.modules if report is not None else ():
            self._series.setdefault(one.tail, []).append(one)
        for points in self._series.values():
            points.sort(key=lambda one: one.layer)
        self.setAccessibleDescription(self.words())
        self.updateGeometry()
        self.update()

    def words(self) -> str:
        """The chart in a sentence a series."""
        told: list[str] = []
        for tail, points in self._series.items():
            norms = [one.norm for one in points if one.norm is not None]
            if norms:
                bad = sum(1 for one in points if one.kind)
                amiss = f", {bad} marked" if bad else ""
                told.append(f"{tail}: {min(norms):.3g} to {max(norms):.3g} over {len(points)} modules{amiss}.")
        return " ".join(told)

    def sizeHint(self) -> QSize:
        return QSize(280, 166 + self._legend_rows(280) * _LEGEND)

    def minimumSizeHint(self) -> QSize:
        return QSize(160, self.sizeHint().height())

    # Painting

    def _color(self, place: int) -> QColor:
        dark = theme().dark
        hue = _HUES[place % len(_HUES)]
        return QColor.fromHsl(hue, 150 if dark else 170, 165 if dark else 105)

    def _legend_rows(self, width: int) -> int:
        rows, left = 1, 0
        for tail in self._series:
            room = 22 + self.fontMetrics().horizontalAdvance(_short(tail)) + 10
            if left and left + room > width - 8:
                rows, left = rows + 1, 0
            left += room
        return rows if self._series else 0

    def paintEvent(self, event: QPaintEvent) -> None:
        painter = QPainter(self)
        painter.setRenderHint(QPainter.RenderHint.Antialiasing)
        self._points = []
        legend = self._legend_rows(self.width()) * _LEGEND + 6
        plot = QRectF(
            _LEFT, _TOP, max(10, self.width() - _LEFT - _RIGHT), max(10, self.height() - _TOP - _BOTTOM - legend)
        )
        norms = [one.norm for one in self._report.modules if one.norm is not None] if self._report else []
        if not norms:
            return
        top = _nice(max(norms))
        layers = [one.layer for one in self._report.modules] if self._report else []
        low, high = min(layers), max(layers)
        self._axes(painter, plot, top, low, high)
        for place, points in enumerate(self._series.values()):
            self._line(painter, plot, points, self._color(place), top, low, high)
        self._draw_legend(painter, self.height() - legend)

    def _axes(self, painter: QPainter, plot: QRectF, top: float, low: int, high: int) -> None:
        look = theme()
        metrics = painter.fontMetrics()
        for part in range(5):
            y = plot.bottom() - plot.height() * part / 4
            painter.setPen(QPen(look.color("border"), 1))
            painter.drawLine(QPointF(plot.left(), y), QPointF(plot.right(), y))
            if part % 2 == 0:
                painter.setPen(look.color("muted"))
                box = QRectF(0, y - 8, _LEFT - 6, 16)
                painter.drawText(
                    box, Qt.AlignmentFlag.AlignRight | Qt.AlignmentFlag.AlignVCenter, f"{top * part / 4:.3g}"
                )
        painter.setPen(look.color("muted"))
        step = max(1, math.ceil((high - low + 1) / max(1, int(plot.width() // 36))))
        for layer in range(low, high + 1, step):
            text = "–" if layer < 0 else str(layer)
            x = self._x(plot, layer, low, high)
            width = metrics.horizontalAdvance(text)
            painter.drawText(QPointF(x - width / 2, plot.bottom() + 15), text)

    def _x(self, plot: QRectF, layer: int, low: int, high: int) -> float:
        span = high - low
        return plot.left() + 6 + (plot.width() - 12) * ((layer - low) / span if span else 0.5)

    def _line(
        self, painter: QPainter, plot: QRectF, points: list[ModuleNorm], color: QColor, top: float, low: int, high: int
    ) -> None:
        look = theme()
        before: QPointF | None = None
        for one in points:
            x = self._x(plot, one.layer, low, high)
            y = plot.bottom() - plot.height() * ((one.norm or 0.0) / top if top else 0.0)
            here = QPointF(x, plot.top() + 4 if one.norm is None else y)
            self._points.append((here, one))
            if one.norm is None:
                before = None
                continue
            if before is not None:
                painter.setPen(QPen(color, 1.5))
                painter.drawLine(before, here)
            before = here
        for here, one in self._points[-len(points) :]:
            if one.kind in _MARKS:
                painter.setPen(QPen(look.color(_MARKS[one.kind]), 2))
                for dx in (-4, 4):
                    painter.drawLine(here + QPointF(-dx, -4), here + QPointF(dx, 4))
            else:
                painter.setPen(Qt.PenStyle.NoPen)
                painter.setBrush(QBrush(color))
                painter.drawEllipse(here, 2.5, 2.5)

    def _draw_legend(self, painter: QPainter, top: int) -> None:
        left, y = 4, top + 4
        for place, tail in enumerate(self._series):
            text = _short(tail)
            width = painter.fontMetrics().horizontalAdvance(text)
            if left > 4 and left + 22 + width + 10 > self.width() - 4:
                left, y = 4, y + _LEGEND
            painter.setPen(QPen(self._color(place), 2))
            painter.drawLine(left, y + 8, left + 14, y + 8)
            painter.setPen(theme().color("text"))
            painter.drawText(QPointF(left + 20, y + 12), text)
            left += 22 + width + 10

    # Telling

    def nearest(self, place: QPointF) -> ModuleNorm | None:
        """The module whose point lies under the mouse."""
        best = min(self._points, key=lambda each: (each[0] - place).manhattanLength(), default=None)
        return best[1] if best is not None and (best[0] - place).manhattanLength() < 16 else None

    def mouseMoveEvent(self, event: QMouseEvent) -> None:
        found = self.nearest(event.position())
        QToolTip.showText(event.globalPosition().toPoint(), point_words(found) if found is not None else "", self)

    def event(self, event: QEvent) -> bool:
        if event.type() == QEvent.Type.ToolTip and isinstance(event, QHelpEvent):
            return True  # mouseMoveEvent has shown it
        return super().event(event)


def point_words(one: ModuleNorm) -> str:
    """A module, its norm, its rank, and what is wrong with it."""
    norm = "no number" if one.norm is None else f"{one.norm:.4g}"
    used = f", {one.used} of them used" if one.used != one.rank else ""
    trouble = f"\n{one.trouble}" if one.trouble else ""
    return f"{one.module}\nnorm {norm}, rank {one.rank}{used}{trouble}"


def _short(tail: str) -> str:
    return tail.rpartition(".")[2] or tail


def _nice(value: float) -> float:
    """The next round number, for the axis."""
    if value <= 0 or not math.isfinite(value):
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if step * power >= value * 0.999)
