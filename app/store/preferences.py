"""Preferences that somebody stated: rows of prompt, chosen and rejected answer, in the JSONL that training reads (DPO, ORPO)."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from app.core.errors import ErrorKind, WeftError

LARGEST = 256 * 1024 * 1024  # bytes that are read to count rows


class Preference(msgspec.Struct, frozen=True, kw_only=True):
    """One row.

    Attributes:
        prompt, chosen, rejected: what training reads.
        system: the system prompt, left out when there is none.
        model: whose answers they are. chosen_stack, rejected_stack: under which adapters.
    """

    prompt: str
    chosen: str
    rejected: str
    system: str = ""
    model: str = ""
    chosen_stack: str = ""
    rejected_stack: str = ""


class PreferenceStore:
    """The file. Rows are only ever added, each synced to the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, rows: list[Preference]) -> int:
        """Add rows. Returns how many there are now.

        Raises:
            WeftError: DISK_FULL, PERMISSION; a row that was cut short is taken back.
        """
        data = b"".join(msgspec.json.encode(_lean(row)) + b"\n" for row in rows)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                before = file.tell()
                if before and not self._ends_with_newline():
                    data = b"\n" + data  # a power failure cut the last row: it stays a line of its own
                try:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(before)
                    raise
        except OSError as error:
            full = error.errno in (28, 122)  # ENOSPC, EDQUOT
            raise WeftError(
                ErrorKind.DISK_FULL if full else ErrorKind.PERMISSION,
                f"The preference could not be written to {self.path}: {error.strerror or error}.",
                "Make room and state it again." if full else "Check that the folder can be written.",
            ) from error
        return self.count()

    def _ends_with_newline(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"

    def count(self) -> int:
        """How many rows there are; 0 when the file cannot be read."""
        try:
            with self.path.open("rb") as file:
                return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))
        except OSError:
            return 0


def _lean(row: Preference) -> dict[str, str]:
    return {
        key: value
        for key, value in msgspec.to_builtins(row).items()
        if value or key in ("prompt", "chosen", "rejected")
    }
