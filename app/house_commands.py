"""What Ctrl+K offers besides pages: the loadout, appearance, logs, and every model by name. Part of the composition root."""

from __future__ import annotations

from typing import TYPE_CHECKING

from app.core.errors import WeftError
from app.views.page import PaletteCommand

if TYPE_CHECKING:
    from app.house_exports import ExportHouse
    from app.house_pages import HousePages
    from app.household import Household
    from app.viewmodels.loadout import Loadout

PALETTE_MODELS = 1000


def palette_commands(house: Household, pages: HousePages, exports: ExportHouse) -> list[PaletteCommand]:
    """The commands as things stand now."""
    return [*_loadout(house.loadout, pages, exports), *_appearance(house), _logs(house), *_models(house)]


def _loadout(loadout: Loadout, pages: HousePages, exports: ExportHouse) -> list[PaletteCommand]:
    there = loadout.model is not None
    return [
        PaletteCommand(title="Choose a model…", group="Model", icon="models", run=pages.open_picker, shortcut="Ctrl+L"),
        PaletteCommand(
            title="Eject the model", group="Model", icon="eject", run=loadout.unload, enabled=loadout.is_loaded
        ),
        PaletteCommand(title="Load the model again", group="Model", icon="reload", run=loadout.reload, enabled=there),
        PaletteCommand(title="Merge and export…", group="Model", icon="export", run=exports.open_loaded, enabled=there),
    ]


def _appearance(house: Household) -> list[PaletteCommand]:
    return [
        PaletteCommand(
            title=text,
            group="Appearance",
            icon="appearance",
            run=lambda value=value: house.settings_view.set("appearance", value),
        )
        for value, text in (
            ("system", "Colours like the system"),
            ("light", "Light colours"),
            ("dark", "Dark colours"),
        )
    ]


def _logs(house: Household) -> PaletteCommand:
    from app.views.dialogs import open_locally

    return PaletteCommand(title="Open the logs", group="Weft", icon="log", run=lambda: open_locally(house.paths.logs))


def _models(house: Household) -> list[PaletteCommand]:
    try:
        entries = house.library.models(limit=PALETTE_MODELS)
    except WeftError:  # the other commands are there all the same; the Models page says what is wrong
        entries = []
    return [
        PaletteCommand(
            title=f"Load {entry.name}",
            group="Model",
            icon="load",
            run=lambda entry=entry: house.loadout.load(entry),
            enabled=not entry.problem,
        )
        for entry in entries
    ]
