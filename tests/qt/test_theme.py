"""Both palettes: every pair that is drawn reaches WCAG AA; every icon renders, tinted, at every scale."""

from __future__ import annotations

import re

import pytest
from PySide6.QtCore import QSize
from PySide6.QtGui import QColor, QIcon
from pytestqt.qtbot import QtBot

from app.core.paths import resources
from app.views import theme
from app.views.icons import icon, pixmap
from app.views.theme import load_palette, parse_color

SURFACES = ("window", "base", "alternate", "raised", "rail")
TEXT = [(role, surface) for role in ("text", "muted", "link") for surface in SURFACES]
TEXT += [
    ("text", "hover"),
    ("text", "pressed"),
    ("text", "code"),
    ("on_accent", "accent"),
    ("on_accent", "accent_hover"),
    ("on_accent", "accent_pressed"),
    ("on_selection", "selection"),
    ("on_tooltip", "tooltip"),
    ("on_negative", "negative"),
    *((tone, f"{tone}_soft") for tone in ("positive", "warning", "negative")),
    *((tone, surface) for tone in ("positive", "warning", "negative") for surface in ("window", "base", "alternate")),
    ("muted", "hover"),
]
SHAPES = [
    (role, surface)
    for role in ("control", "focus", "accent")
    for surface in ("window", "base", "raised", "alternate", "rail")
]
SHAPES += [("accent", "selection"), ("muted", "selection")]


def luminance(color: QColor) -> float:
    """Relative luminance, https://www.w3.org/TR/WCAG21/#dfn-relative-luminance."""

    def linear(value: float) -> float:
        return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4

    return 0.2126 * linear(color.redF()) + 0.7152 * linear(color.greenF()) + 0.0722 * linear(color.blueF())


def contrast(one: QColor, other: QColor) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("name", ["light", "dark"])
def test_contrast(name: str) -> None:
    _, colors = load_palette(name)
    weak = [
        f"{front} on {back}: {ratio:.2f} < {least}"
        for pairs, least in ((TEXT, 4.5), (SHAPES, 3.0))
        for front, back in pairs
        if (ratio := contrast(parse_color(colors[front]), parse_color(colors[back]))) < least
    ]
    assert not weak, weak


def test_palettes_have_the_same_roles_and_the_sheet_uses_no_other() -> None:
    light, dark = load_palette("light")[1], load_palette("dark")[1]
    assert light.keys() == dark.keys()
    sheet = (resources() / "palettes" / "weft.qss").read_text("utf-8")
    names = set(re.findall(r"\$([a-z_]+)", sheet)) - {"icons", "mark", "dash"}
    assert names <= light.keys()
    assert set(re.findall(r"\$icons/([a-z-]+)\.svg", sheet)) <= {
        path.stem for path in (resources() / "icons").glob("*.svg")
    }


def test_every_icon_draws_in_the_palettes_colour(qtbot: QtBot) -> None:
    own = {"weft", "control-up", "control-down", "mark-light", "mark-dark", "dash-light", "dash-dark"}
    for path in sorted((resources() / "icons").glob("*.svg")):
        if path.stem in own:
            continue
        for ratio in (1.0, 1.5, 2.0):
            image = pixmap(path.stem, 24, ratio, "accent").toImage()
            assert image.width() == round(24 * ratio)
            wanted = theme.theme().color("accent")
            pixels = [image.pixelColor(x, y) for x in range(image.width()) for y in range(image.height())]
            inked = [color for color in pixels if color.alpha() > 120]
            assert inked, path.stem
            # Antialiasing rounds a channel by one.
            assert all(abs(color.red() - wanted.red()) + abs(color.blue() - wanted.blue()) <= 8 for color in inked), (
                path.stem
            )
        text = path.read_text("utf-8")
        assert 'stroke-width="1.6"' in text, "one stroke width"
        assert 'viewBox="0 0 24 24"' in text, "one grid"


def test_switching_repaints_icons(qtbot: QtBot) -> None:
    look = theme.theme()
    look.set_appearance("light")
    before = icon("chat").pixmap(QSize(24, 24), QIcon.Mode.Normal).toImage()
    look.set_appearance("dark")
    assert look.dark
    assert icon("chat").pixmap(QSize(24, 24), QIcon.Mode.Normal).toImage() != before
    look.set_appearance("light")
