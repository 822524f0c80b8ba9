"""The look: two explicit palettes over Fusion, following the system or chosen; `theme().color("accent")` for painters.

`QStyleHints.setColorScheme` alone changes nothing on bare X11, so both palettes are ours.
"""

from __future__ import annotations

import string
import tomllib
from typing import Literal

from PySide6.QtCore import QObject, Qt, Signal, Slot
from PySide6.QtGui import QColor, QFont, QGuiApplication, QPalette
from PySide6.QtWidgets import QApplication, QWidget

from app.core.paths import resources

Appearance = Literal["system", "light", "dark"]

_ROLES = {
    QPalette.ColorRole.Window: "window",
    QPalette.ColorRole.WindowText: "text",
    QPalette.ColorRole.Base: "base",
    QPalette.ColorRole.AlternateBase: "alternate",
    QPalette.ColorRole.Text: "text",
    QPalette.ColorRole.Button: "raised",
    QPalette.ColorRole.ButtonText: "text",
    QPalette.ColorRole.BrightText: "negative",
    QPalette.ColorRole.ToolTipBase: "tooltip",
    QPalette.ColorRole.ToolTipText: "on_tooltip",
    QPalette.ColorRole.PlaceholderText: "muted",
    QPalette.ColorRole.Highlight: "selection",
    QPalette.ColorRole.HighlightedText: "on_selection",
    QPalette.ColorRole.Accent: "accent",
    QPalette.ColorRole.Link: "link",
    QPalette.ColorRole.LinkVisited: "link",
    QPalette.ColorRole.Light: "raised",
    QPalette.ColorRole.Midlight: "hover",
    QPalette.ColorRole.Mid: "border",
    QPalette.ColorRole.Dark: "control",
    QPalette.ColorRole.Shadow: "control",
}


def load_palette(name: str) -> tuple[bool, dict[str, str]]:
    """Read resources/palettes/<name>.toml: whether it is dark, and its colours by role as #rrggbb or #rrggbbaa."""
    with (resources() / "palettes" / f"{name}.toml").open("rb") as file:
        table = tomllib.load(file)
    return bool(table["dark"]), dict(table["colors"])


def parse_color(text: str) -> QColor:
    """#rrggbb, or #rrggbbaa with the alpha last (QColor itself reads it first)."""
    return QColor(f"#{text[7:9]}{text[1:7]}") if len(text) == 9 else QColor(text)


class Theme(QObject):
    """The palette in use. One per application; emits `changed` after a switch."""

    changed = Signal()

    def __init__(self, application: QApplication, appearance: Appearance = "system") -> None:
        super().__init__(application)
        self._application = application
        self._appearance: Appearance = appearance
        self._name = ""
        self._colors: dict[str, str] = {}
        self.dark = False
        application.setStyle("Fusion")
        QGuiApplication.styleHints().colorSchemeChanged.connect(self._system_changed)
        self._apply()

    @property
    def appearance(self) -> Appearance:
        return self._appearance

    def set_appearance(self, appearance: Appearance) -> None:
        """Switch to `light` or `dark`, or follow the system again."""
        self._appearance = appearance
        self._apply()

    def color(self, role: str) -> QColor:
        return parse_color(self._colors[role])

    @property
    def colors(self) -> dict[str, str]:
        return dict(self._colors)

    @Slot()
    def _system_changed(self) -> None:
        if self._appearance == "system":
            self._apply()

    def _apply(self) -> None:
        # Window frames that the platform draws (Windows, macOS) follow this; elsewhere it does nothing.
        wanted = {"light": Qt.ColorScheme.Light, "dark": Qt.ColorScheme.Dark, "system": Qt.ColorScheme.Unknown}
        hints = QGuiApplication.styleHints()
        blocked = hints.blockSignals(True)
        hints.setColorScheme(wanted[self._appearance])
        hints.blockSignals(blocked)
        name: str = self._appearance
        if name == "system":
            name = "dark" if hints.colorScheme() == Qt.ColorScheme.Dark else "light"
        if name == self._name:
            return
        self._name = name
        self.dark, self._colors = load_palette(name)
        self._application.setPalette(self._palette())
        self._application.setStyleSheet(self._sheet())
        self.changed.emit()

    def _palette(self) -> QPalette:
        palette = QPalette()
        for role, name in _ROLES.items():
            palette.setColor(role, self.color(name))
        for role in (QPalette.ColorRole.Text, QPalette.ColorRole.WindowText, QPalette.ColorRole.ButtonText):
            palette.setColor(QPalette.ColorGroup.Disabled, role, self.color("disabled"))
        return palette

    def _sheet(self) -> str:
        template = (resources() / "palettes" / "weft.qss").read_text("utf-8")
        shade = "dark" if self.dark else "light"
        return string.Template(template).substitute(
            self._colors, icons=(resources() / "icons").as_posix(), mark=f"mark-{shade}", dash=f"dash-{shade}"
        )


_theme: Theme | None = None


def install(application: QApplication, appearance: Appearance = "system") -> Theme:
    """Give the application its look, once; later calls only switch the appearance."""
    global _theme
    if _theme is None:
        _theme = Theme(application, appearance)
        _theme.destroyed.connect(_forget)
    else:
        _theme.set_appearance(appearance)
    return _theme


def _forget() -> None:
    global _theme
    _theme = None


def theme() -> Theme:
    """The theme in use; made with the system's appearance if nobody has chosen one (tests of single views)."""
    if _theme is None:
        application = QApplication.instance()
        assert isinstance(application, QApplication), "a view is being built before the application"
        return install(application)
    return _theme


def set_property(widget: QWidget, name: str, value: object) -> None:
    """Set a dynamic property that the style sheet looks at, and have the widget styled again."""
    if widget.property(name) == value:
        return
    widget.setProperty(name, value)
    widget.style().unpolish(widget)
    widget.style().polish(widget)


def title_font(widget: QWidget, steps: int = 1, *, bold: bool = True) -> QFont:
    """The system font, one step (15 %) larger per `steps`; titles are demi-bold."""
    font = QFont(widget.font())
    size = QGuiApplication.font().pointSizeF()
    if size > 0:
        font.setPointSizeF(size * (1 + 0.15 * steps))
    if bold:
        font.setWeight(QFont.Weight.DemiBold)
    return font
