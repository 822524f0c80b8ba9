"""What the loadout says and asks: its states, and the questions that the window puts to the user."""

from __future__ import annotations

from enum import StrEnum
from typing import Protocol

import msgspec

from app.backends.base import Spec
from app.core.errors import WeftError
from app.core.library import ModelEntry
from app.core.memory import Estimate, Machine
from app.core.options import OptionValue


class LoadoutState(StrEnum):
    EMPTY = "empty"  # nothing loaded; `model` may be one that waits to be loaded
    STARTING = "starting"  # the engine starts, or waits for its environment
    LOADING = "loading"
    READY = "ready"
    BUSY = "busy"
    UNRESPONSIVE = "unresponsive"
    FAILED = "failed"  # the load failed, or the engine died; `error` says why


LOADING = (LoadoutState.STARTING, LoadoutState.LOADING)


class EnvironmentsView(Protocol):
    """What the loadout asks of engine.environments."""

    def is_ready(self, name: str) -> bool: ...
    def title(self, name: str) -> str: ...


class FitQuestion(msgspec.Struct, frozen=True, kw_only=True):
    """A load that does not fit: asked before it starts. `load(..., anyway=True)` goes on."""

    entry: ModelEntry
    loader: Spec
    options: dict[str, OptionValue]
    estimate: Estimate
    machine: Machine
    message: str


class CodeQuestion(msgspec.Struct, frozen=True, kw_only=True):
    """A model that is to run its own Python code. `allow_code(entry, digest)` remembers a yes for exactly these files."""

    entry: ModelEntry
    loader: Spec
    options: dict[str, OptionValue]
    files: tuple[str, ...]
    digest: str


class Crash(msgspec.Struct, frozen=True, kw_only=True):
    """The engine died by itself. `again` is false after too many crashes; `lost` counts the requests that it took along."""

    error: WeftError
    log: str
    again: bool
    lost: int = 0
