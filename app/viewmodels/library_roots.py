"""Adding and removing the places that the library indexes, with the sentence that says what happened."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
from PySide6.QtCore import QObject, Signal

from app.core.errors import ErrorKind, WeftError
from app.core.paths import Paths
from app.core.roots import Root, RootKind
from app.store.refresh import library_roots
from app.store.settings import SettingsStore

FILES = (".gguf", ".safetensors")


class Added(msgspec.Struct, frozen=True, kw_only=True):
    """What adding did. `undo` is None when nothing changed."""

    text: str
    undo: Callable[[], None] | None = None


def damage(paths: Iterable[Path]) -> str:
    """What is wrong with these models, files or folders that are one, a sentence each; "" when nothing is.

    Reads headers: not for the window's thread.

    Raises:
        WeftError: BAD_INPUT when they are files of which the library has no use at all.
    """
    from app.core.recognise import recognise_adapter, recognise_model

    listed = list(paths)
    wrong: list[str] = []
    useless: list[str] = []
    for path in listed:
        try:
            found = recognise_model(path) or recognise_adapter(path)
        except WeftError as error:
            wrong.append(f"{path.name} cannot be read: {error.message}")
            continue
        if found is not None and found.problem:
            wrong.append(f"{path.name} cannot be used: {found.problem}")
        elif found is None and path.is_file():
            useless.append(_why_useless(path))
    if useless and len(useless) == len(listed):
        hint = "A model in safetensors is a folder: add the folder that holds its config.json, too."
        raise WeftError(ErrorKind.BAD_INPUT, " ".join(useless), hint)
    return " ".join(wrong + useless)


def _why_useless(path: Path) -> str:
    from app.core.safetensors_header import read_safetensors_header

    try:
        if path.suffix.lower() == ".safetensors":
            read_safetensors_header(path)
    except WeftError as error:
        return error.message
    return f"{path.name} alone is neither a model nor an adapter."


class LibraryRoots(QObject):
    """The roots of the library. `changed` asks the worker to index them."""

    changed = Signal()

    def __init__(self, settings: SettingsStore, paths: Paths, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._settings = settings
        self._paths = paths

    def roots(self) -> list[Root]:
        return library_roots(self._settings.settings, self._paths)

    def can_add(self, paths: Iterable[Path]) -> bool:
        """Whether these could be models: folders, .gguf or .safetensors files. Looks at names and kinds only."""
        listed = list(paths)
        return bool(listed) and all(path.suffix.lower() in FILES or path.is_dir() for path in listed)

    def add(self, paths: Iterable[Path]) -> Added:
        """Index these folders and files where they lie; nothing is copied or moved.

        Raises:
            WeftError: BAD_INPUT for a file that is no model, NOT_FOUND for one that is not there.
        """
        new: list[str] = []
        known: list[Path] = []
        for path in paths:
            place = path.absolute()
            if not place.exists():
                raise WeftError(ErrorKind.NOT_FOUND, f"{place} is not there.", "Choose a file or folder that exists.")
            if place.is_file() and place.suffix.lower() not in FILES:
                raise WeftError(
                    ErrorKind.BAD_INPUT,
                    f"{place.name} is not a model.",
                    "Add a .gguf file, or the folder that holds a model's files.",
                )
            if self._covered(place):
                known.append(place)
            elif str(place) not in new:
                new.append(str(place))
        if not new:
            where = "it lies" if len(known) == 1 else "they lie"
            self.changed.emit()
            return Added(
                text=f"{_names(known)}: already in the library, because {where} in a folder that Weft indexes."
            )
        before = self._settings.settings.roots
        self._settings.update(roots=(*before, *new))
        self.changed.emit()
        folders = [Path(path) for path in new if Path(path).is_dir()]
        files = [Path(path) for path in new if not Path(path).is_dir()]
        parts: list[str] = []
        if folders:
            verb = "is" if len(folders) == 1 else "are"
            parts.append(f"{_names(folders)} {verb} indexed from now on.")
        if files:
            verb = "is" if len(files) == 1 else "are"
            parts.append(
                f"{_names(files)} {verb} listed where {'it lies' if len(files) == 1 else 'they lie'}; nothing was copied."
            )
        return Added(text=" ".join(parts), undo=lambda: self._set(before))

    def remove(self, path: str) -> Callable[[], None]:
        """Stop indexing a place that the user added; its files stay. Returns what takes it back."""
        before = self._settings.settings.roots
        self._set(tuple(root for root in before if root != path))
        return lambda: self._set(before)

    def is_added(self, root: Root) -> bool:
        """Whether the user added it (the others belong to Weft or to other programs)."""
        return root.kind is RootKind.FOLDER and root.path in self._settings.settings.roots

    def is_own(self, path: Path) -> bool:
        """Whether it lies in Weft's own models folder, where nobody but Weft put it."""
        return self._paths.models in path.parents

    def downloads(self) -> Path:
        """The folder that downloads and exported models go to."""
        chosen = self._settings.settings.downloads
        return Path(chosen) if chosen else self._paths.models

    def is_own_downloads(self) -> bool:
        """Whether that is Weft's own models folder."""
        return self.downloads() == self._paths.models

    def set_downloads(self, folder: Path | None) -> None:
        """Let downloads go to a folder; None: to Weft's own. What came into the one before stays in the library.

        Raises:
            WeftError: NOT_FOUND or PERMISSION for a folder that cannot be written to; as `SettingsStore.update` does.
        """
        if folder is not None and not folder.is_dir():
            raise WeftError(ErrorKind.NOT_FOUND, f"{folder} is no folder.", "Choose a folder that exists.")
        if folder is not None and not os.access(folder, os.W_OK | os.X_OK):
            raise WeftError(
                ErrorKind.PERMISSION, f"Nothing can be written into {folder}.", "Choose a folder that you may write to."
            )
        now = self._settings.settings
        chosen = "" if folder is None or folder.absolute() == self._paths.models else str(folder.absolute())
        if chosen == now.downloads:
            return
        kept = () if not now.downloads or now.downloads in now.roots else (now.downloads,)
        self._settings.update(downloads=chosen, roots=(*now.roots, *kept))
        self.changed.emit()

    def _covered(self, place: Path) -> bool:
        return any(Path(root.path) == place or Path(root.path) in place.parents for root in self.roots())

    def _set(self, roots: tuple[str, ...]) -> None:
        self._settings.update(roots=roots)
        self.changed.emit()


def _names(paths: list[Path]) -> str:
    names = [path.name or str(path) for path in paths[:3]]
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(names) + more
