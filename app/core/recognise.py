"""What a folder or file is."""

from __future__ import annotations

from pathlib import Path

from app.core.library import AdapterEntry, ModelEntry


def recognise_model(path: Path) -> ModelEntry | None:
    """The model at a path, or None."""
    return None


def recognise_adapter(path: Path) -> AdapterEntry | None:
    """The adapter at a path, or None."""
    return None
