"""Models and adapters by the names that people type: `starter`, a name in the library, or a path."""

from __future__ import annotations

from pathlib import Path

from app.core.errors import ErrorKind, WeftError
from app.core.library import AdapterEntry, ModelEntry
from app.core.paths import default_paths
from app.store.database import Database
from app.store.library import LibraryStore
from app.store.refresh import library_roots, refresh
from app.store.settings import SettingsStore


def find_model(name: str) -> ModelEntry:
    """A model. Raises WeftError NOT_FOUND, or BAD_INPUT for a name that several have."""
    paths = default_paths()
    database = Database(paths.database)
    try:
        library = LibraryStore(database)
        try:
            return library.find(name)
        except WeftError as error:
            if error.kind is not ErrorKind.NOT_FOUND or Path(name).exists():
                raise
        # It may have come since the library was last read.
        refresh(library, library_roots(SettingsStore(paths.settings).settings, paths))
        return library.find(name)
    finally:
        database.close()


def find_adapter(name: str) -> Path:
    """The path of an adapter. Raises WeftError NOT_FOUND, or BAD_INPUT for a name that several have."""
    path = Path(name).expanduser()
    if path.exists():
        return path.absolute()
    paths = default_paths()
    database = Database(paths.database)
    try:
        library = LibraryStore(database)
        if not (found := _named(library, name)):
            refresh(library, library_roots(SettingsStore(paths.settings).settings, paths))
            found = _named(library, name)
    finally:
        database.close()
    if not found:
        raise WeftError(
            ErrorKind.NOT_FOUND,
            f"There is no adapter {name!r} in the library, and no such file or folder.",
            "Name its folder or file, or see `weft adapters`.",
        )
    if len(found) > 1:
        places = ", ".join(entry.path for entry in found[:3])
        raise WeftError(ErrorKind.BAD_INPUT, f"Several adapters are called {name!r}: {places}.", "Give the path.")
    return Path(found[0].path)


def _named(library: LibraryStore, name: str) -> list[AdapterEntry]:
    return [entry for entry in library.adapters() if entry.name.casefold() == name.casefold()]
