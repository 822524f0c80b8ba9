"""Writing a GGUF file tensor by tensor: cancellable, and after a kill gone on with from the last complete one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import msgspec

from app.adapters.gguf_head import padded
from app.adapters.merge_staging import boot_id, write_error
from app.core.errors import ErrorKind, WeftError

_SYNC = 32 * 1024 * 1024  # bytes written between two waits for the disk


class Note(msgspec.Struct):
    """How far a file is.

    Attributes:
        made_of: fingerprint of everything that goes in.
        done: bytes that were written. synced: of these, certain to be on the disk.
        boot: the machine's start that `done` counts for: after a power failure only `synced` does.
    """

    made_of: str
    done: int
    synced: int
    boot: str


class Part(NamedTuple):
    """A tensor that is to be written.

    Attributes:
        bytes: that it takes.
        write: puts them into a file; tells how many more there are as it goes.
    """

    bytes: int
    write: Callable[[BinaryIO, Callable[[int], None]], None]


def write_model(
    model: Any, file: Path, made_of: str, progress: Callable[[int, int], None], cancelled: Callable[[], bool]
) -> tuple[int, int]:
    """Write a model of the converter's, under the header that gguf-py makes. See `write_parts`.

    Args:
        model: a `conversion` ModelBase instance.
    """
    model.prepare_tensors()
    model.prepare_metadata(vocab_only=False)
    head = _header(model.gguf_writer, file.with_suffix(".head"))
    parts = [_converted(info) for shard in model.gguf_writer.tensors for info in shard.values()]
    return write_parts(file, head, parts, model.gguf_writer.data_alignment, made_of, progress, cancelled)


def write_parts(
    file: Path,
    head: bytes,
    parts: Iterable[Part],
    alignment: int,
    made_of: str,
    progress: Callable[[int, int], None],
    cancelled: Callable[[], bool],
) -> tuple[int, int]:
    """Write a file. Returns (its bytes, of these: found from an earlier run).

    Args:
        file: what is written, with `<file>.note` beside it where it can be gone on with.
        made_of: a fingerprint of everything that goes in; a part of another is begun anew. "" for a file that is
            never gone on with.
        progress: told (bytes done, bytes in all). cancelled: asked as it goes.

    Raises:
        WeftError: CANCELLED; what is complete stays, for the next run.
    """
    parts = list(parts)
    total = len(head) + sum(padded(part.bytes, alignment) for part in parts)
    found = _usable(file, head, made_of)
    note = file.with_suffix(".note")
    done = max(found, len(head))

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)
        if cancelled():
            raise WeftError(ErrorKind.CANCELLED, "Cancelled.")

    with file.open("r+b" if found else "wb") as out:
        out.truncate(found)
        out.seek(found)
        if not found:
            out.write(head)
        elif made_of:
            os.fsync(out.fileno())  # what a killed run has written may still be in memory alone
        place, synced, boot = len(head), found, boot_id()
        advance(0)
        for part in parts:
            end = place + padded(part.bytes, alignment)
            if end > found:
                part.write(out, advance)
                out.write(bytes(end - place - part.bytes))
                if out.tell() != end:
                    raise WeftError(
                        ErrorKind.INTERNAL, "A tensor has another size than its header says.", "Please report this."
                    )
                if made_of:
                    out.flush()
                    if end - synced >= _SYNC:
                        os.fsync(out.fileno())
                        synced = end
                    _remember(note, Note(made_of, end, synced, boot))
                done = end
            place = end
        out.flush()
        os.fsync(out.fileno())
    if made_of:
        _remember(note, Note(made_of, place, place, boot))
    progress(total, total)
    return place, found


@contextlib.contextmanager
def gone_if_it_fails(file: Path) -> Generator[None]:
    """Write a file in here: where that fails, what was begun is taken away, with its note.

    Raises:
        WeftError: DISK_FULL, PERMISSION where the operating system refuses something.
    """
    try:
        yield
    except BaseException as error:
        for path in (file, file.with_suffix(".note")):
            path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise write_error(file, error) from error
        raise


def _converted(info: Any) -> Part:
    """A tensor of gguf-py's writer: made when it is written, and given back right after."""

    def write(out: BinaryIO, advance: Callable[[int], None]) -> None:
        tensor, info.tensor = info.tensor, None
        _put(tensor, out)
        advance(info.nbytes)

    return Part(info.nbytes, write)


def _put(tensor: Any, out: BinaryIO) -> None:
    """Write a tensor's bytes, in C order.

    Not by numpy's tofile, which writes past `out`: it tells of a full drive without its number, and of a small tensor not at all.
    """
    import numpy as np

    array = type(tensor).to_eager(tensor) if hasattr(tensor, "to_eager") else tensor
    if not isinstance(array, np.ndarray):
        tensor.tofile(out)  # gguf-py's own, of a tensor that it makes chunk by chunk
        return
    rows = array.reshape(1) if array.ndim == 0 else array
    step = max(1, _SYNC // max(1, rows.nbytes // max(1, len(rows))))
    for start in range(0, len(rows), step):  # what is not contiguous is copied: some rows at a time
        out.write(np.ascontiguousarray(rows[start : start + step]).reshape(-1).view(np.uint8).data)


def _header(writer: Any, path: Path) -> bytes:
    """Everything before the tensors' data, padded as gguf-py pads it."""
    writer.write_header_to_file(path=path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    (out,) = writer.fout
    writer.write_padding(out, out.tell())
    out.close()
    writer.fout = None
    data = path.read_bytes()
    path.unlink()
    return data


def _usable(file: Path, header: bytes, made_of: str) -> int:
    """How many bytes of an earlier run can be kept."""
    if not made_of:
        return 0
    try:
        note = msgspec.json.decode(file.with_suffix(".note").read_bytes(), type=Note)
        with file.open("rb") as part:
            same = part.read(len(header)) == header
        done = note.done if note.boot and note.boot == boot_id() else note.synced
        whole = file.stat().st_size >= done
    except (OSError, msgspec.MsgspecError):
        return 0
    return done if same and whole and note.made_of == made_of and done >= len(header) else 0


def _remember(note: Path, state: Note) -> None:
    beside = note.with_suffix(".note-part")
    beside.write_bytes(msgspec.json.encode(state))
    beside.replace(note)
