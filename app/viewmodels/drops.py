"""What was dropped on the window: adapters go into the library, models stay where they lie. Names do not tell which is which."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
from PySide6.QtCore import QObject, Signal, Slot

from app.core.errors import WeftError
from app.viewmodels.adapter_import import can_import
from app.viewmodels.background import Background
from app.viewmodels.library_roots import FILES

_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".bin", ".pt")
_FOLDERS = 300  # looked into, of one that was dropped


class Sorted(msgspec.Struct, frozen=True, kw_only=True):
    """What is what. `models` holds all that is not known to be an adapter alone."""

    adapters: list[Path]
    models: list[Path]


class Drops(QObject):
    """Reads headers in a thread, then tells.

    Signals:
        adapters(list of paths), models(list of paths).
    """

    adapters = Signal(list)
    models = Signal(list)

    def __init__(self, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._background = Background(self)
        self._background.done.connect(self._sorted)

    def accepts(self, paths: Sequence[Path]) -> bool:
        """Whether all could be adapters or models, by their names."""
        return can_import(paths)

    def take(self, paths: Sequence[Path]) -> None:
        """Sort them out; the signals follow."""
        listed = list(paths)
        self._background.run("drop", lambda: sort_out(listed))

    def close(self) -> None:
        self._background.close()

    @Slot(object, object, object)
    def _sorted(self, _key: object, result: object, _error: object) -> None:
        if isinstance(result, Sorted):
            if result.adapters:
                self.adapters.emit(result.adapters)
            if result.models:
                self.models.emit(result.models)


def sort_out(paths: Sequence[Path]) -> Sorted:
    """Tell adapters and models apart by their headers. Reads files: not for the window's thread."""
    adapters: list[Path] = []
    models: list[Path] = []
    for path in paths:
        (adapters if _is_adapter(path) else models).append(path)
    return Sorted(adapters=adapters, models=models)


def _is_adapter(path: Path) -> bool:
    """Whether a path is an adapter, an archive, or a folder of nothing but adapters."""
    from app.core.adapter_import import find_adapters
    from app.core.recognise import recognise_adapter, recognise_model

    try:
        if path.is_file():
            if path.suffix.lower() in _ARCHIVES:
                return True
            return path.suffix.lower() in FILES and recognise_adapter(path) is not None
        if recognise_adapter(path) is not None:
            return True
        return recognise_model(path) is None and bool(find_adapters(path)) and not _holds_models(path)
    except (WeftError, OSError):
        return False


def _holds_models(folder: Path) -> bool:
    """Whether a model lies somewhere below: then the folder is a library of its own, and is indexed in place."""
    from app.core.recognise import recognise_adapter, recognise_model

    stack, seen = [folder], 0
    while stack and seen < _FOLDERS:
        here = stack.pop()
        seen += 1
        if (here / "adapter_config.json").is_file():
            continue
        if (here / "config.json").is_file() and recognise_model(here) is not None:
            return True
        for path in sorted(here.iterdir()):
            if path.suffix.lower() == ".gguf" and path.is_file():
                if recognise_adapter(path) is None and recognise_model(path) is not None:
                    return True
            elif path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
                stack.append(path)
    return False
