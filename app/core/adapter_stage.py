"""Copies of adapters, made in a hidden folder beside their place and renamed when they are complete."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
import unicodedata
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

from app.core import adapter_note
from app.core.adapter_file import WEIGHT_FILES
from app.core.disk import sync_folder
from app.core.errors import ErrorKind, WeftError
from app.core.gguf_header import os_error
from app.core.library import AdapterEntry

_CHUNK = 1 << 20
_STAGE = ".incoming-"
_STALE = 24 * 3600.0
# Of an adapter's folder, what belongs to the adapter: not the optimizer's state, not the checkpoints.
_KEPT = re.compile(
    r"adapter_config\.json|weft_adapter\.json|README(\.\w+)?|LICENSE[\w.-]*|NOTICE[\w.-]*|.+\.jinja|tokenizer.*|"
    r"special_tokens_map\.json|added_tokens\.json|vocab\.\w+|merges\.txt|training_args\.json",
    re.IGNORECASE,
)
_GENERIC = re.compile(
    r"model_weights|model|adapters?|lora|loras|final|final_model|output|outputs|results?|checkpoint[-_]?\w*|adapter_model|"
    r"adapter|step[-_]?\d+|epoch[-_]?\d+|best|last|peft|[0-9a-f]{40}|snapshots|\d+",
    re.IGNORECASE,
)
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_numbers = itertools.count()


@contextmanager
def folder(beside: Path) -> Generator[Path]:
    """A folder of our own beside the target; gone at the end, unless it was renamed."""
    stage = beside / f"{_STAGE}{os.getpid()}-{next(_numbers)}"
    try:
        stage.mkdir(parents=True)
        yield stage
    except OSError as error:
        raise _told(beside, error) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def clear_stale(beside: Path) -> None:
    """Take away what imports that were killed left behind."""
    if not beside.is_dir():
        return
    for path in beside.glob(f"{_STAGE}*"):
        match = re.match(rf"{re.escape(_STAGE)}(\d+)-", path.name)
        if match and not _alive(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)


def _alive(process: int) -> bool:
    if process == os.getpid():
        return True
    if os.name == "nt":
        return False  # a folder that is in use cannot be taken away there
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def files_of(adapter: Path, entry: AdapterEntry) -> list[tuple[str, Path]]:
    """What to copy of an adapter: names in the copy, and where the bytes are; the weights first."""
    weights = [Path(name) for name in entry.files]
    if adapter.is_file():
        suffix = adapter.suffix.lower()
        return [(f"adapter_model{'.bin' if suffix == '.pt' else suffix}", adapter)]
    found = [(path.name, path) for path in weights]
    taken = {name for name, _ in found}
    for path in sorted(adapter.iterdir()):
        small = path.is_file() and path.name not in WEIGHT_FILES and _KEPT.fullmatch(path.name)
        if small and path.name not in taken and path.stat().st_size < 64 << 20:
            found.append((path.name, path))
    return found


def copy_file(
    source: Path, target: Path, progress: Callable[[int], None], cancelled: Callable[[], bool], done: int
) -> int:
    """Copy bytes, fsynced. Returns `done` plus what was copied.

    Raises:
        WeftError: PERMISSION, NOT_FOUND, DISK_FULL, CANCELLED.
    """
    try:
        file = source.open("rb")
    except OSError as error:
        raise os_error(source, error) from error
    with file, target.open("xb") as out:
        while piece := file.read(_CHUNK):
            if cancelled():
                raise WeftError(ErrorKind.CANCELLED, "Cancelled.")
            out.write(piece)
            done += len(piece)
            progress(done)
        out.flush()
        os.fsync(out.fileno())
    return done


def write_notes(stage: Path, config: Mapping[str, object] | None, note: adapter_note.AdapterNote) -> None:
    """The config of a lone file's copy, and our note."""
    if config is not None:
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        _write(stage / "adapter_config.json", text.encode())
    (stage / adapter_note.NAME).unlink(missing_ok=True)
    _write(stage / adapter_note.NAME, adapter_note.note_bytes(note))


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())


def publish(stage: Path, target: Path) -> Path:
    """Give a staged file or folder its name, or the next that is free. Returns it."""
    for number in itertools.count(2):
        if not os.path.lexists(target):
            break
        stem, suffix = (target.stem, target.suffix) if stage.is_file() else (target.name, "")
        stem = re.sub(r" \(\d+\)$", "", stem)
        target = target.with_name(f"{stem} ({number}){suffix}")
    stage.rename(target)
    sync_folder(target.parent)
    return target


def library_name(adapter: Path, top: Path) -> str:
    """What to call a copy: the folder's or file's name, or, where every program calls it so, with its parent's before it."""
    own = adapter.name if adapter.is_dir() else adapter.stem
    parents = [part for part in adapter.parent.parts[-4:] if part != adapter.anchor]
    name = own
    while parents and _GENERIC.fullmatch(own):
        own = parents.pop()
        if own.startswith("."):
            break
        name = own if _dull(name) else f"{own}-{name}"
    return file_name(name if top else own)


def _dull(name: str) -> bool:
    """Whether a name says nothing at all: a checkpoint's number does."""
    return (
        re.fullmatch(r"(?i)model_weights|model|adapters?|adapter_model|loras?|peft|snapshots|[0-9a-f]{40}", name)
        is not None
    )


def file_name(name: str) -> str:
    """A name that every file system takes."""
    name = unicodedata.normalize("NFC", name)
    name = re.sub(r'[\x00-\x1f\x7f<>:"/\\|?*]', "_", name).strip(" .")
    while len(name.encode("utf-8", "replace")) > 200:
        name = name[:-1]
    if not name or _RESERVED.fullmatch(name):
        return f"adapter {name}".strip()
    return name


def _told(beside: Path, error: OSError) -> WeftError:
    if error.errno == errno.ENOSPC:
        return WeftError(
            ErrorKind.DISK_FULL, f"There is no room left in {beside}.", "Free some space there, and try again."
        )
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        return WeftError(
            ErrorKind.PERMISSION, f"{beside} may not be written to.", "Choose another folder, or its rights."
        )
    return os_error(beside, error)
