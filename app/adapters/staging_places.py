"""Where jobs of the command line put their results, while they run: after a kill the window looks there, too.

A small file a job, so that several may write and remove theirs at once; the folder of them is `Paths.unfinished`.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

from app.adapters.merge_leftovers import has_staging

_SETTLED = 86400  # seconds after which a job has begun, or never will


def remember(notes: Path, target: Path) -> None:
    """Note the folder that a target is made in. What cannot be noted is no reason not to make it."""
    note = _note(notes, target)
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_bytes(os.fsencode(target.absolute().parent))
    except OSError:
        return


def forget(notes: Path, target: Path) -> None:
    """Take the note away: nothing is left there."""
    try:
        _note(notes, target).unlink(missing_ok=True)
    except OSError:
        return


def remembered(notes: Path) -> list[Path]:
    """The folders that are noted; notes of places where nothing lies any more go."""
    found: dict[Path, None] = {}
    try:
        files = list(notes.iterdir())
    except OSError:
        return []
    for note in files:
        try:
            place = Path(os.fsdecode(note.read_bytes()))
            if has_staging(place):
                found[place] = None
            elif place.is_dir() and time.time() - note.stat().st_mtime > _SETTLED:  # a drive may come back
                note.unlink()
        except (OSError, ValueError):
            continue
    return list(found)


def _note(notes: Path, target: Path) -> Path:
    return notes / hashlib.sha256(os.fsencode(target.absolute())).hexdigest()[:16]
