"""A download's title and its files on the disk: is there room, and what goes when it is abandoned."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from app.core.errors import ErrorKind, WeftError
from app.core.unfinished import NOTE, read_note, write_note
from app.hub.files import Listing, RemoteFile
from app.hub.part import arrived_bytes, remove_parts
from app.hub.places import local_path, refuse_collisions
from app.hub.positional import folder_lock
from app.hub.selection import gguf_choices
from app.store.downloads import Download
from app.viewmodels.units import readable_bytes

SPARE = 64 * 1024 * 1024


def title_of(listing: Listing, files: Sequence[RemoteFile]) -> str:
    """`user/model`, with the branch and the quantization where these were chosen."""
    name = listing.repo if listing.revision in ("", "main") else f"{listing.repo}:{listing.revision}"
    chosen = {file.path for file in files}
    picked = [choice for choice in gguf_choices(listing.files) if {file.path for file in choice.files} <= chosen]
    if len(picked) == 1:
        return f"{name} {picked[0].quantization or picked[0].title}"
    return f"{name} {files[0].path}" if len(files) == 1 and len(listing.files) > 1 else name


class Wanted(NamedTuple):
    """Files that are to be in a folder, and where copies of them lie on this machine, by path."""

    folder: Path
    files: tuple[RemoteFile, ...]
    here: Mapping[str, str]


def check_wanted(wanted: Wanted, queued: Sequence[Wanted]) -> None:
    """Refuse names that are in each other's way, and what the drive cannot hold beside all that is queued for it.

    May wait for a slow drive, and takes a moment for repositories with many thousand files.

    Args:
        queued: all that runs or waits.

    Raises:
        WeftError: HOSTILE names; DISK_FULL with the numbers; PERMISSION when the drive is not there.
    """
    refuse_collisions(wanted.files)
    folder, place = wanted.folder, _existing(wanted.folder)
    try:
        drive, free = place.stat().st_dev, shutil.disk_usage(place).free
        others = [other for other in queued if _existing(other.folder).stat().st_dev == drive]
    except OSError as error:
        raise WeftError(
            ErrorKind.PERMISSION,
            f"{folder} cannot be reached: {error.strerror}.",
            "Connect its drive, or choose another folder for downloads in Settings.",
        ) from error
    counted: set[Path] = set()
    needed = _to_come(wanted, drive, counted)
    spoken = sum(_to_come(other, drive, counted) for other in others)
    if needed and needed + spoken + SPARE > free:
        queue = f"; {readable_bytes(spoken)} of that is spoken for by the queue" if spoken else ""
        raise WeftError(
            ErrorKind.DISK_FULL,
            f"This takes {readable_bytes(needed)}, and the drive of {folder} has {readable_bytes(free)} free{queue}. "
            f"{readable_bytes(SPARE)} must stay free.",
            "Free some space, choose fewer files, or choose another folder for downloads in Settings.",
        )


def _to_come(wanted: Wanted, drive: int, counted: set[Path]) -> int:
    """Bytes that a drive must still take; files that were `counted` (and now are) only once."""
    needed = 0
    for file in wanted.files:
        target = local_path(wanted.folder, file.path)
        if target in counted:
            continue
        counted.add(target)
        try:
            complete = target.stat().st_size == file.size
        except OSError:
            complete = False
        if not complete and not _on_drive(wanted.here.get(file.path, ""), drive):
            needed += file.size - arrived_bytes(target)
    return needed


def _on_drive(place: str, drive: int) -> bool:
    """Whether a copy is there, on that drive: then it takes no room as a link."""
    try:
        return bool(place) and Path(place).stat().st_dev == drive
    except OSError:
        return False


def _existing(folder: Path) -> Path:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def remove_leftovers(download: Download) -> None:
    """Delete the parts of an abandoned download, the note that it is pending, and folders that are empty then."""
    folder = Path(download.folder)
    if not folder.is_dir():
        return
    # What another download fetches at this moment is left to it.
    gone = {file.path for file in download.files if remove_parts(local_path(folder, file.path))}
    try:
        with folder_lock(folder):
            _forget_pending(folder, gone)
        places = {local_path(folder, file.path).parent for file in download.files} | {folder}
        for place in [*sorted(places, reverse=True), folder.parent]:
            if place.is_dir() and not any(place.iterdir()):
                place.rmdir()
    except OSError as error:
        raise WeftError(
            ErrorKind.PERMISSION, f"{folder} could not be tidied: {error.strerror}.", "Look into that folder."
        ) from error


def _forget_pending(folder: Path, gone: set[str]) -> None:
    note = read_note(folder)
    if note is None:
        return
    rest = tuple(path for path in note.pending if path not in gone)
    if rest or note.verified:
        write_note(folder, msgspec.structs.replace(note, pending=rest))
    else:
        (folder / NOTE).unlink(missing_ok=True)
