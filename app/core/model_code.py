"""A model's own Python code: which files could run, whether they lie in its folder, and a digest that changes when one does.

A model's config names modules (`auto_map`), and these import others beside them: so what a person reads and allows is
every Python file below the folder, not only those that are named.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

import msgspec

from app.core.errors import ErrorKind, WeftError

MAX_FILES = 500
MAX_FOLDERS = 2000
MAX_BYTES = 1024 * 1024  # of one file: nobody reviews a larger one, and dialogs show no more of it
MAX_TOTAL = 8 * 1024 * 1024
_MODULE = re.compile(r"[A-Za-z_]\w*(/[A-Za-z_]\w*)*\.py")
_REVIEW = "Weft runs only code that somebody can read first. Use a model that needs no code of its own."


class ModelCode(msgspec.Struct, frozen=True, kw_only=True):
    """The Python files of a model, as names relative to its folder, and a digest over names and contents."""

    files: tuple[str, ...] = ()
    digest: str = ""


def check_references(name: str, references: Iterable[str]) -> None:
    """Refuse code that lies elsewhere than in the model's folder.

    Args:
        name: the model's, for the message. references: as `core.model_config.custom_code` gives them.

    Raises:
        WeftError: UNSUPPORTED for code of another repository, HOSTILE for a path out of the folder.
    """
    for reference in references:
        repository, dashes, _ = reference.partition("--")
        if dashes:
            raise WeftError(
                ErrorKind.UNSUPPORTED,
                f"{name} wants to run code of another repository, {repository}.",
                "Weft runs only code that lies in the model's own folder. Load it without trust_remote_code.",
            )
        if _MODULE.fullmatch(reference) is None:
            raise WeftError(
                ErrorKind.HOSTILE,
                f"{name} wants to run {reference!r}, which is not a Python file in its folder.",
                "Do not use this model.",
            )


def read_code(folder: Path) -> ModelCode:
    """Every Python file below a folder.

    Links are followed, as an import would follow them.

    Raises:
        WeftError: BAD_INPUT when a file cannot be read whole, or when there are more than anybody could review.
    """
    files = _find(folder)
    if not files:
        return ModelCode()
    digest = hashlib.sha256()
    total = 0
    for name in files:
        path = folder / name
        try:
            if path.stat().st_size > MAX_BYTES:
                raise WeftError(ErrorKind.BAD_INPUT, f"{path} is larger than {MAX_BYTES // 2**20} MiB.", _REVIEW)
            content = path.read_bytes()
        except OSError as error:
            raise WeftError(
                ErrorKind.BAD_INPUT, f"{path} cannot be read: {error.strerror}.", "Download the model again."
            ) from error
        total += len(content)
        if total > MAX_TOTAL:
            raise WeftError(
                ErrorKind.BAD_INPUT, f"{folder} holds more than {MAX_TOTAL // 2**20} MiB of Python files.", _REVIEW
            )
        digest.update(f"{name}\0{len(content)}\0".encode("utf-8", "surrogateescape"))
        digest.update(content)
    return ModelCode(files=files, digest=digest.hexdigest())


def _find(folder: Path) -> tuple[str, ...]:
    found: list[str] = []
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()  # a link back up
            continue
        seen.add(real)
        found += [Path(place, name).relative_to(folder).as_posix() for name in names if name.lower().endswith(".py")]
        if len(found) > MAX_FILES or len(seen) > MAX_FOLDERS:
            what = (
                f"more than {MAX_FILES} Python files" if len(found) > MAX_FILES else f"more than {MAX_FOLDERS} folders"
            )
            raise WeftError(ErrorKind.BAD_INPUT, f"{folder} holds {what}.", _REVIEW)
    return tuple(sorted(found))
