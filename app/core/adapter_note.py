"""weft_adapter.json: what Weft notes beside an adapter of its own library. Foreign folders are never written to."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec

from app.core.errors import WeftError
from app.core.formats import read_json

NAME = "weft_adapter.json"


class AdapterNote(msgspec.Struct, frozen=True, kw_only=True):
    """Where an adapter came from.

    Attributes:
        source: the file or folder that it was copied from. added: seconds since the epoch.
        run: id of the training run that made it, "" for none. title: that run's name.
        alpha_given: a person said alpha, the adapter did not.
    """

    source: str = ""
    added: float = 0.0
    run: str = ""
    title: str = ""
    alpha_given: bool = False


def read_note(folder: Path) -> AdapterNote:
    """The note in an adapter's folder; an empty one when there is none that can be read."""
    path = folder / NAME
    if not path.is_file():
        return AdapterNote()
    try:
        return msgspec.convert(read_json(path, 64 * 1024), AdapterNote, strict=False)
    except (WeftError, msgspec.ValidationError):
        return AdapterNote()  # a note is a comfort: without it the adapter works as well


def note_bytes(note: AdapterNote) -> bytes:
    """What to write as `NAME`."""
    stamped = note if note.added else msgspec.structs.replace(note, added=time.time())
    return msgspec.json.format(msgspec.json.encode(stamped), indent=2) + b"\n"
