"""The adapter stack between the user and the engine: what is wanted, what the engine was told, and what it took."""

from __future__ import annotations

from typing import Any

from app.core.stack import AdapterStack
from app.engine.protocol import SetAdapters

NONE = AdapterStack()


class StackState:
    """One SetAdapters is under way at a time; what is wanted meanwhile is told when that has ended.

    Attributes:
        wanted: what the next answer is to have. baked: it is to be written into the weights, where the loader can.
        model: id of the model that the adapters were chosen for, "" when there was none: then they are for the next.
        command: the engine's id of the SetAdapters under way, 0 for none.
    """

    def __init__(self) -> None:
        self.wanted = NONE
        self.baked = False
        self.model = ""
        self.command = 0
        self._told, self._told_baked = NONE, False
        self._taken = NONE

    def belong(self, model: str) -> bool:
        """From now on it is this model's. Returns whether adapters that were chosen for another were taken out."""
        foreign = self.model not in ("", model) and bool(self.wanted.adapters)
        if foreign:
            self.wanted = NONE
        self.model = model
        return foreign

    def is_told(self, *, bakes: bool) -> bool:
        """Whether the engine was told what is wanted. bakes: its loader can write adapters into the weights."""
        return self.wanted == self._told and (self.baked and bakes) == self._told_baked

    def tell(self, worker: Any, *, bakes: bool) -> None:
        """Send what is wanted. Raises WeftError when the engine cannot be told."""
        baked = self.baked and bakes
        self.command = worker.send(SetAdapters(adapters=self.wanted, baked=baked))
        self._told, self._told_baked = self.wanted, baked

    def loaded(self, stack: AdapterStack) -> None:
        """An engine was told to load with this stack, live."""
        self._told = self._taken = stack
        self._told_baked = False
        self.command = 0

    def taken(self) -> None:
        """The engine did as it was told."""
        self.command = 0
        self._taken = self._told

    def refused(self) -> None:
        """The engine did not: what it took before is wanted again, and live, which always goes."""
        self.command = 0
        self._told = self.wanted = self._taken
        self.baked = self._told_baked = False
