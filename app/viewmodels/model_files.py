"""What can be done to a model's files: the trash, with undo where the system lets us, and the reasons when it cannot be."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from app.core.errors import ErrorKind, WeftError
from app.core.library import ModelEntry, ModelFormat


def trash_refusal(entry: ModelEntry, *, loaded: bool = False) -> str:
    """Why a model cannot be moved to the trash, in a sentence; "" when it can."""
    if entry.read_only:
        return "It belongs to another program or to Weft itself, and is only read here."
    if loaded:
        return "It is loaded. Eject it first."
    return ""


def files_of(entry: ModelEntry) -> list[Path]:
    """What moving to the trash takes: the folder of a folder model, or the GGUF's own files (never its whole folder)."""
    if entry.format is ModelFormat.GGUF:
        return [Path(name) for name in entry.files] or [Path(entry.path)]
    # A Hugging Face cache entry's snapshot holds links into blobs: the entry as a whole goes, or the space stays taken.
    path = Path(entry.path)
    for folder in (path, *path.parents):
        if folder.name.startswith("models--") and (folder / "snapshots").is_dir():
            return [folder]
    return [path]


def move_to_trash(entry: ModelEntry) -> Callable[[], None] | None:
    """Move a model's files to the trash: see `trash_files`."""
    return trash_files(files_of(entry))


def trash_files(files: list[Path]) -> Callable[[], None] | None:
    """Move files and folders to the trash. Blocks while the system moves them.

    Returns:
        What takes them back, or None where the system's trash does not tell where they went.

    Raises:
        WeftError: PERMISSION or NOT_FOUND; files that did not go stay where they are.
    """
    from send2trash import TrashPermissionError, send2trash

    moved: list[tuple[Path, Path]] = []
    for path in files:
        before = _trash_entries(path.name)
        try:
            send2trash(os.fspath(path))
        except FileNotFoundError as error:
            raise WeftError(ErrorKind.NOT_FOUND, f"{path} is not there any more.", "Refresh the library.") from error
        except (TrashPermissionError, PermissionError) as error:
            raise WeftError(
                ErrorKind.PERMISSION,
                f"{path} cannot be moved to the trash.",
                "Check the permissions of its folder and disk.",
            ) from error
        except OSError as error:
            raise WeftError(
                ErrorKind.PERMISSION, f"{path} cannot be moved to the trash: {error}.", "Delete it in the file manager."
            ) from error
        new = [place for place in _trash_entries(path.name) if place not in before]
        if len(new) == 1:
            moved.append((path, new[0]))
    if len(moved) != len(files):
        return None

    def undo() -> None:
        for original, place in moved:
            if original.exists():
                raise WeftError(ErrorKind.BUSY, f"{original} exists again.", "Restore it from the trash by hand.")
            original.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(place, original)
            (place.parent.parent / "info" / f"{place.name}.trashinfo").unlink(missing_ok=True)

    return undo


def _trash_entries(name: str) -> list[Path]:
    """Items in the user's freedesktop trash whose name begins like this one; nothing on other systems."""
    data = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    folder = Path(data, "Trash", "files")
    stem = Path(name).stem
    try:
        return [place for place in folder.iterdir() if place.name.startswith(stem)]
    except OSError:
        return []
