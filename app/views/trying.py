"""Doing what may be refused: the refusal is told by a signal."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from PySide6.QtCore import SignalInstance

from app.core.errors import WeftError

T = TypeVar("T")


def attempt(run: Callable[[], object], failed: SignalInstance) -> None:
    """Do it; a WeftError goes out by `failed`."""
    attempt_for(run, None, failed)


def attempt_for(run: Callable[[], T], otherwise: T, failed: SignalInstance) -> T:
    """What it gives; `otherwise` where it is refused with a WeftError, which goes out by `failed`."""
    try:
        return run()
    except WeftError as error:
        failed.emit(error)
        return otherwise
