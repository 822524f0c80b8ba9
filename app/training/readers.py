"""Files as records with line numbers: JSON, JSONL, CSV, Parquet and text, read as a stream in bounded memory.

Whatever is wrong with one record becomes a record with a `problem`, and reading goes on; what makes the rest of a file
unreadable raises `Unreadable`. Imports the standard library; pyarrow inside the function that needs it.
"""

from __future__ import annotations

import codecs
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from app.core.errors import ErrorKind, WeftError
from app.training.read_json import read_json, read_jsonl
from app.training.records import BLOCK, LONGEST_ROW, Record, Unreadable, numbered_lines, too_large

PIECE = 256 * 1024  # characters of raw text handed on at once
_MOST_FILES = 100_000
_LARGEST_GROUP = 4 * 1024**3  # bytes that a Parquet file may unpack at once

SUFFIXES: dict[str, str] = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".markdown": "text",
}


def find_files(paths: tuple[str, ...]) -> list[Path]:
    """The data files that are meant: files as named, and what a folder holds, in the order of their names.

    Raises:
        WeftError: NOT_FOUND, BAD_INPUT (a folder without data, too many files), PERMISSION.
    """
    found: list[Path] = []
    for name in paths:
        path = Path(name).expanduser()
        try:
            if path.is_dir():
                inside = sorted(p for p in _walk(path) if p.suffix.lower() in SUFFIXES)
                if not inside:
                    raise WeftError(
                        ErrorKind.BAD_INPUT,
                        f"There is no data in the folder {path}.",
                        f"Put files ending in {', '.join(sorted(SUFFIXES))} into it.",
                    )
                found += inside
            elif path.is_file():
                found.append(path)
            elif path.exists():
                raise WeftError(ErrorKind.BAD_INPUT, f"{path} is not a file.", "Name a file or a folder.")
            else:
                raise WeftError(ErrorKind.NOT_FOUND, f"There is no file {path}.", "Check the name of the data file.")
        except OSError as error:
            raise _denied(path, error) from error
    if not found:
        raise WeftError(ErrorKind.BAD_INPUT, "No data is named.", "Name at least one file of examples.")
    return list(dict.fromkeys(found))


def _walk(folder: Path) -> Iterator[Path]:
    count = 0
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or not path.is_file():
            continue
        count += 1
        if count > _MOST_FILES:
            raise WeftError(
                ErrorKind.BAD_INPUT, f"{folder} holds more than {_MOST_FILES:,} files.", "Join them into fewer."
            )
        yield path


def read(path: Path, separator: str = "") -> Iterator[Record]:
    """The records of a file. Its kind is told by its name, JSON and JSONL apart by what stands in it.

    Args:
        separator: of documents in a text file.

    Raises:
        Unreadable: the rest cannot be read.
        WeftError: PERMISSION; ENVIRONMENT when Parquet's library is missing.
    """
    kind = SUFFIXES.get(path.suffix.lower(), "text")
    try:
        if kind == "parquet":
            yield from _parquet(path)
            return
        with path.open("rb") as file:
            start = file.read(4096)
            _check_start(start)
            file.seek(3 if start.startswith(codecs.BOM_UTF8) else 0)
            first = start.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
            if kind == "json" or (kind == "jsonl" and first == b"["):
                yield from read_json(file)
            elif kind == "jsonl":
                yield from read_jsonl(file)
            elif kind == "csv":
                yield from _csv(file, path.suffix.lower() == ".tsv")
            else:
                yield from _text(file, separator)
    except OSError as error:
        raise _denied(path, error) from error


def _denied(path: Path, error: OSError) -> WeftError:
    return WeftError(
        ErrorKind.PERMISSION,
        f"{path} cannot be read: {error.strerror or error}.",
        "Check the disk and the file's permissions.",
    )


def _check_start(start: bytes) -> None:
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise Unreadable("It is UTF-16 text. Save it as UTF-8.")
    for magic, name in ((b"PK\x03\x04", "a ZIP archive"), (b"\x1f\x8b", "a gzip archive"), (b"PAR1", "a Parquet file")):
        if start.startswith(magic):
            raise Unreadable(f"It is {name}, whatever its name says. Unpack it, or name it so.")


# CSV --------------------------------------------------------------------------------------------------


def _csv(file: BinaryIO, tabs: bool) -> Iterator[Record]:
    head = file.read(64 * 1024)
    file.seek(-len(head), 1)
    first = head.split(b"\n", 1)[0]
    delimiter = "\t" if tabs else max(",;\t|", key=lambda c: first.count(c.encode()))
    csv.field_size_limit(LONGEST_ROW)
    reader = csv.reader(_csv_lines(file), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise Unreadable(f"Line 1: its header cannot be read: {error}.") from error
    if not any(header) or len(set(header)) < len(header):
        raise Unreadable("Line 1: the first line has to name the columns, each by another name.")
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Record(line, None, f"It is not CSV: {error}.")
            continue
        if row:
            yield _csv_row(line, header, row)


def _csv_row(line: int, header: list[str], row: list[str]) -> Record:
    if len(row) != len(header):
        return Record(line, None, f"It has {len(row)} columns; the header names {len(header)}.")
    if any("\0" in cell for cell in row):
        return Record(line, None, "It holds NUL characters; it is not text.")
    try:
        "".join(row).encode()
    except UnicodeEncodeError:  # undecodable bytes came as surrogates
        return Record(line, None, "It is not UTF-8 text.")
    return Record(line, dict(zip(header, row, strict=True)))


def _csv_lines(file: BinaryIO) -> Iterator[str]:
    for number, line in numbered_lines(file):
        if line is None:
            raise Unreadable(f"Line {number}: {too_large()} The rest was not read.")
        yield line.decode("utf-8", "surrogateescape")


# Parquet ----------------------------------------------------------------------------------------------


def _parquet(path: Path) -> Iterator[Record]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise WeftError(
            ErrorKind.ENVIRONMENT,
            "Parquet files need pyarrow, which is not installed.",
            "Repair the core environment on the Settings page (its layer for training), or save the data as JSONL.",
        ) from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for group in range(file.metadata.num_row_groups):
                if file.metadata.row_group(group).total_byte_size > _LARGEST_GROUP:
                    raise Unreadable(f"Row {number + 1}: a row group of more than 4 GiB. Write it with smaller ones.")
                for batch in file.iter_batches(batch_size=256, row_groups=[group]):
                    for value in batch.to_pylist():
                        number += 1
                        yield Record(number, value)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise Unreadable(f"Row {number + 1}: it cannot be read as Parquet: {str(error)[:200]}.") from error


# Text -------------------------------------------------------------------------------------------------


def _text(file: BinaryIO, separator: str) -> Iterator[Record]:
    """Raw text in pieces that end with a line where possible. A file that is not text to its end gives none."""
    start = file.tell()
    _check_text(file)
    file.seek(start)
    decoder = codecs.getincrementaldecoder("utf-8")()
    buffer, line, more, ended = "", 1, False, False
    while not ended:
        block = file.read(BLOCK)
        ended = not block
        buffer += decoder.decode(block, final=ended).replace("\r\n", "\n")
        while separator and (at := buffer.find(separator)) >= 0:
            if more or buffer[:at].strip():
                yield Record(line, {"text": buffer[:at]})
            more = False
            line += buffer.count("\n", 0, at + len(separator))
            buffer = buffer[at + len(separator) :]
        while len(buffer) > PIECE + len(separator):
            cut = buffer.rfind("\n", 0, PIECE) + 1 or PIECE
            yield Record(line, {"text": buffer[:cut]}, more=True)
            more = True
            line += buffer.count("\n", 0, cut)
            buffer = buffer[cut:]
    if more or buffer.strip():
        yield Record(line, {"text": buffer})


def _check_text(file: BinaryIO) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    line = 1
    while True:
        block = file.read(BLOCK)
        if b"\0" in block:
            at = line + block.count(b"\n", 0, block.index(b"\0"))
            raise Unreadable(f"Line {at}: it holds NUL characters; it is not text.")
        try:
            decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            at = line + error.object.count(b"\n", 0, error.start)
            raise Unreadable(f"Line {at}: it is not UTF-8 text. Save the file as UTF-8.") from error
        line += block.count(b"\n")
        if not block:
            return
