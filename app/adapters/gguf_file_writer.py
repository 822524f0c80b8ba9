"""Writing a converted model's tensors into its file: one at a time, resumable, cancellable. The header is gguf-py's."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from app.adapters.merge_staging import boot_id
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


def write_model(
    model: Any, file: Path, made_of: str, progress: Callable[[int, int], None], cancelled: Callable[[], bool]
) -> tuple[int, int]:
    """Write a model of the converter's. Returns (bytes, of these: found from an earlier run).

    Args:
        model: a `conversion` ModelBase instance. file: what it is written to, with `<file>.note` beside it.
        made_of: a fingerprint of everything that goes in; a part of another is begun anew.
        progress: told (bytes done, bytes in all).

    Raises:
        WeftError: CANCELLED; what is complete stays, for the next run.
    """
    model.prepare_tensors()
    model.prepare_metadata(vocab_only=False)
    header = _header(model.gguf_writer, file.with_suffix(".head"))
    tensors = [(name, info) for shard in model.gguf_writer.tensors for name, info in shard.items()]
    alignment: int = model.gguf_writer.data_alignment
    total = len(header) + sum(_padded(info.nbytes, alignment) for _, info in tensors)
    found = _usable(file, header, made_of)
    note = file.with_suffix(".note")
    with file.open("r+b" if found else "wb") as out:
        out.truncate(found)
        out.seek(found)
        if not found:
            out.write(header)
        place, synced, boot = len(header), found, boot_id()
        for _, info in tensors:
            end = place + _padded(info.nbytes, alignment)
            if end > found:
                if cancelled():
                    raise WeftError(ErrorKind.CANCELLED, "Cancelled.")
                info.tensor.tofile(out)
                out.write(bytes(end - place - info.nbytes))
                if out.tell() != end:
                    raise WeftError(
                        ErrorKind.INTERNAL, "A tensor has another size than its header says.", "Please report this."
                    )
                out.flush()
                if end - synced >= _SYNC:
                    os.fsync(out.fileno())
                    synced = end
                _remember(note, Note(made_of, end, synced, boot))
            info.tensor = None
            place = end
            progress(place, total)
        os.fsync(out.fileno())
    note.unlink(missing_ok=True)
    return place, found


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


def _padded(size: int, alignment: int) -> int:
    return (size + alignment - 1) // alignment * alignment
