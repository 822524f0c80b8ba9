"""Where a repository's files go on this machine: `<models>/<user>/<model>/…`, plain files under the hub's own names."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from app.core.errors import ErrorKind, WeftError
from app.core.unfinished import NOTE
from app.hub.files import Listing, RemoteFile
from app.hub.journal import ENDINGS, LONGEST_NAME, beside

_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³]|conin\$|conout\$)(\..*)?", re.IGNORECASE)
_FORBIDDEN = re.compile(r'[<>:"|?*]')
_SHORT = LONGEST_NAME - max(map(len, ENDINGS))  # bytes of a name that no ending makes too long
_DEFAULT_BRANCHES = ("", "main")


def folder_for(listing: Listing, models: Path, adapters: Path) -> Path:
    """The folder of a repository: `user/model`, with `@branch` behind it for any but the main branch.

    Args:
        models, adapters: the libraries' own folders; the listing says which one it belongs to.
    """
    user, _, name = listing.repo.partition("/")
    if listing.revision not in _DEFAULT_BRANCHES:
        # git forbids ~ in names of branches, so dev/x and dev-x have folders of their own
        name += "@" + re.sub(r"[^A-Za-z0-9._+-]", "~", listing.revision)
    return (adapters if listing.kind == "adapter" else models) / local_name(user) / local_name(name)


def local_path(folder: Path, path: str, *, windows: bool = os.name == "nt") -> Path:
    """Where a file of a repository goes in its folder. `path` has passed `check_file_path`.

    Raises:
        WeftError: BAD_INPUT for a name that no disk takes.
    """
    return folder.joinpath(*(local_name(piece, windows=windows) for piece in path.split("/")))


def local_name(name: str, *, windows: bool = os.name == "nt") -> str:
    """One name as this system can hold it: unchanged, but on Windows without what that reserves."""
    if windows:
        name = _FORBIDDEN.sub("_", name)
        name = name[:-1] + "_" if name.endswith((".", " ")) else name
        name = f"_{name}" if _RESERVED.fullmatch(name) else name
    if len(os.fsencode(name)) > LONGEST_NAME:
        raise WeftError(
            ErrorKind.BAD_INPUT,
            f"The name {name[:60]}… is too long: disks take {LONGEST_NAME} bytes.",
            "Leave this file out.",
        )
    return name


def refuse_collisions(files: Iterable[RemoteFile], *, windows: bool = os.name == "nt") -> None:
    """Refuse files whose names are one and the same on some systems, or that Weft uses itself beside them.

    A repository may list a hundred thousand files: each costs microseconds here.

    Raises:
        WeftError: HOSTILE, naming both.
    """
    seen: dict[str, RemoteFile] = {}
    for file in files:
        name = _folded(file.path, windows)
        other = seen.setdefault(name, file)
        if other.path != file.path:
            raise _collision(file, other)
        if name == NOTE:
            raise WeftError(
                ErrorKind.HOSTILE,
                f"{file.repo} holds a file {file.path!r}, in which Weft notes what it has fetched.",
                "Choose the files that you need one by one, without this one.",
            )
    folders: set[str] = set()
    for name, file in seen.items():
        folder, slash, last = name.rpartition("/")
        while slash and folder not in folders:  # a file that another needs as a folder
            if folder in seen:
                raise _collision(file, seen[folder])
            folders.add(folder)
            folder, slash, _ = folder.rpartition("/")
        # What lies beside a file while it is fetched: looked for from its own side, and only long names can be cut.
        for ending in ENDINGS:
            if name.endswith(ending) and (other := seen.get(name.removesuffix(ending))) is not None:
                raise _collision(other, file)
        if len(os.fsencode(last)) > _SHORT:
            start = name[: -len(last)]
            for ending in ENDINGS:
                if (other := seen.get(f"{start}{beside(Path(last), ending)}")) is not None:
                    raise _collision(file, other)


def _folded(path: str, windows: bool) -> str:
    """The name that systems which do not tell cases or ways of writing accents apart would give it."""
    plain = path.isascii()
    if windows or not plain or len(path) > LONGEST_NAME:
        path = "/".join(local_name(piece, windows=windows) for piece in path.split("/"))
    return path.lower() if plain else unicodedata.normalize("NFC", path).casefold()


def _collision(file: RemoteFile, other: RemoteFile) -> WeftError:
    return WeftError(
        ErrorKind.HOSTILE,
        f"{file.repo} holds both {other.path!r} and {file.path!r}, which are in each other's way on many systems.",
        "Choose the files that you need one by one, without one of these.",
    )
