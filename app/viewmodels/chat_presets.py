"""Sampling presets: three that come with Weft, and the user's own in the settings."""

from __future__ import annotations

from typing import Any

from app.core.errors import ErrorKind, WeftError
from app.core.options import OptionValue
from app.store.settings import Settings, SettingsStore

Values = dict[str, OptionValue]

BUILT_IN: dict[str, Values] = {
    "Balanced": {},
    "Precise": {"temperature": 0.2, "top_k": 20, "top_p": 0.9},
    "Creative": {"temperature": 1.1, "top_k": 0, "top_p": 1.0, "min_p": 0.03},
}


def presets_in(settings: Settings) -> dict[str, Values]:
    """Changed sampling fields by preset: built-in ones first, then the user's by name."""
    own = settings.sampling_presets
    return BUILT_IN | {name: dict(own[name]) for name in sorted(own, key=str.casefold) if name not in BUILT_IN}


class Presets:
    """Named sets of changed sampling fields."""

    def __init__(self, settings: SettingsStore) -> None:
        self._settings = settings

    def all(self) -> dict[str, Values]:
        """Built-in ones first, then the user's by name."""
        return presets_in(self._settings.settings)

    def of_new_chats(self) -> tuple[str, Values]:
        """The system prompt and the changed sampling fields that a new chat begins with."""
        settings = self._settings.settings
        return settings.system_prompt, dict(self.all().get(settings.sampling, {}))

    def is_own(self, name: str) -> bool:
        return name in self._settings.settings.sampling_presets and name not in BUILT_IN

    def matching(self, values: Values) -> str:
        """Name of the preset with exactly these values, or ""."""
        return next((name for name, preset in self.all().items() if preset == values), "")

    def save(self, name: str, values: Values) -> None:
        """Keep values under a name; replaces an own preset of that name. Raises WeftError BAD_INPUT for a name that cannot be."""
        self._write({**self._own(), self._checked(name): dict(values)})

    def rename(self, old: str, new: str) -> None:
        """Raises WeftError BAD_INPUT when the new name is taken or cannot be."""
        new = self._checked(new)
        own = self._own()
        if new in own and new != old:
            raise WeftError(ErrorKind.BAD_INPUT, f"There is already a preset {new!r}.", "Choose another name.")
        own[new] = own.pop(old)
        self._write(own)

    def delete(self, name: str) -> Values:
        """Forget an own preset; returns its values, for undo."""
        own = self._own()
        values = own.pop(name)
        self._write(own)
        return values

    def _checked(self, name: str) -> str:
        name = " ".join(name.split())
        if not name or len(name) > 60:
            raise WeftError(ErrorKind.BAD_INPUT, "A preset needs a name of 1 to 60 characters.", "Type a name.")
        if name.casefold() in (built_in.casefold() for built_in in BUILT_IN):
            raise WeftError(
                ErrorKind.BAD_INPUT, f"{name!r} comes with Weft and stays as it is.", "Choose another name."
            )
        return name

    def _own(self) -> dict[str, Values]:
        return {name: dict(values) for name, values in self._settings.settings.sampling_presets.items()}

    def _write(self, own: dict[str, Any]) -> None:
        self._settings.update(sampling_presets=own)
