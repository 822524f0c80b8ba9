"""The stack of the loaded model as chips show it: each adapter with a switch and a weight."""

from __future__ import annotations

from pathlib import Path

import msgspec
from PySide6.QtCore import QObject, Signal, Slot

from app.core.errors import WeftError
from app.core.library import AdapterEntry
from app.core.stack import AdapterStack, StackedAdapter
from app.viewmodels.loadout import Loadout


class StackEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One chip. Switched off, it keeps its weight."""

    path: str
    name: str
    weight: float = 1.0
    on: bool = True


class StackModel(QObject):
    """What the chips show and change. The loadout holds what the engine has been told.

    Signals:
        changed: adapters came or went, or the whole stack was put back.
        refused(text): what was dropped is no adapter, and why.
    """

    changed = Signal()
    refused = Signal(str)

    def __init__(self, loadout: Loadout, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._loadout = loadout
        self.entries: list[StackEntry] = []
        loadout.stack_changed.connect(self._follow)

    @property
    def shown(self) -> bool:
        """Whether the loaded model's loader takes adapters, or some are chosen already."""
        return bool(self.entries) or self._loadout.takes_adapters

    @property
    def bakes(self) -> bool:
        """Whether the loaded model's loader can write adapters into its weights."""
        return self._loadout.bakes

    @property
    def baked(self) -> bool:
        """Whether the stack is to be written into the weights."""
        return self._loadout.baked

    @Slot(bool)
    def set_baked(self, on: bool) -> None:
        """Write the stack into the weights, or let it be live again."""
        self._loadout.set_baked(on)

    def known(self) -> list[AdapterEntry]:
        """Adapters of the library that may be added: usable ones that are not in the stack."""
        there = {entry.path for entry in self.entries}
        return [entry for entry in self._loadout.adapters() if not entry.problem and entry.path not in there]

    def add(self, path: Path, name: str = "") -> bool:
        """Put an adapter into the stack at weight 1; `refused` tells why when it is none. name: as the library calls it."""
        from app.core.recognise import recognise_adapter  # readers of formats: the first paint does not wait for them

        try:
            found = recognise_adapter(path)
        except WeftError as error:
            self.refused.emit(str(error))
            return False
        if found is None or found.problem:
            why = found.problem if found is not None else "It is no LoRA adapter."
            self.refused.emit(f"{path.name} cannot be added to the stack. {why}")
            return False
        if self.holds(found.path):
            return True
        self.entries.append(StackEntry(path=found.path, name=name or found.name))
        self._tell()
        self.changed.emit()
        return True

    def holds(self, path: str) -> bool:
        """Whether this adapter is in, switched on or off."""
        return any(entry.path == path for entry in self.entries)

    def remove(self, path: str) -> None:
        """Take an adapter out."""
        self.entries = [entry for entry in self.entries if entry.path != path]
        self._tell()
        self.changed.emit()

    def set_weight(self, path: str, weight: float) -> None:
        """Weigh an adapter anew; takes effect with the next answer."""
        self._replace(path, weight=weight)

    def set_on(self, path: str, on: bool) -> None:
        """Switch an adapter on or off."""
        self._replace(path, on=on)

    def _replace(self, path: str, **fields: object) -> None:
        self.entries = [
            msgspec.structs.replace(entry, **fields) if entry.path == path else entry for entry in self.entries
        ]
        self._tell()

    @property
    def stack(self) -> AdapterStack:
        """What the chips say; an adapter that is switched off has weight 0."""
        adapters = (
            StackedAdapter(path=entry.path, name=entry.name, weight=entry.weight if entry.on else 0.0)
            for entry in self.entries
        )
        return AdapterStack(adapters=tuple(adapters))

    def replace_all(self, stack: AdapterStack) -> list[str]:
        """Put another stack on in place of this one. Returns a sentence for each adapter that is not there any more."""
        missing: list[str] = []
        entries: list[StackEntry] = []
        for adapter in stack.adapters:
            name = adapter.name or Path(adapter.path).name
            if Path(adapter.path).exists():
                weight = adapter.weight or 1.0
                entries.append(StackEntry(path=adapter.path, name=name, weight=weight, on=adapter.weight != 0.0))
            else:
                missing.append(f"{name} is not at {adapter.path} any more, and was left out.")
        if entries or not missing:
            self.entries = entries
            self._tell()
            self.changed.emit()
        return missing

    def _tell(self) -> None:
        self._loadout.set_stack(self.stack)

    @Slot()
    def _follow(self) -> None:
        """The loadout has another stack than was told: another model came, or the engine refused it."""
        before = {entry.path: entry for entry in self.entries}
        self.entries = []
        for adapter in self._loadout.stack.adapters:
            known = before.get(adapter.path) or StackEntry(path=adapter.path, name=adapter.name)
            on = adapter.weight != 0.0
            self.entries.append(msgspec.structs.replace(known, on=on, weight=adapter.weight if on else known.weight))
        self.changed.emit()
