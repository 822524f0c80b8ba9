"""A row as it stands in a data file, and the limits that all kinds of files are read within. Standard library alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

LONGEST_ROW = 16 * 1024 * 1024  # bytes of one row; a book of 500 pages has one
BLOCK = 1024 * 1024  # bytes that are read at once


class Record(NamedTuple):
    """One row as it stands in the file.

    Attributes:
        line: of its first character, from 1; a Parquet file's row number.
        value: field -> value, or None when `problem` says why it cannot be read.
        more: text only: the next record continues this one.
    """

    line: int
    value: dict[str, Any] | None
    problem: str = ""
    more: bool = False


class Unreadable(Exception):
    """The file, or its rest, cannot be read; the message says why and from which line."""


def numbered_lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Numbered lines; None for one that is longer than LONGEST_ROW."""
    number = 0
    while line := file.readline(LONGEST_ROW + 1):
        number += 1
        if len(line) <= LONGEST_ROW:
            yield number, line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(BLOCK)
        yield number, None


def too_large() -> str:
    """What is wrong with a row that is."""
    return f"The row is larger than {LONGEST_ROW // 1024**2} MB."
