"""Writes conversations to a file, or reads them from files, beside the window."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PySide6.QtCore import QObject, QThread, Signal

from app.core import transcripts
from app.core.errors import ErrorKind, WeftError
from app.core.transcripts import TranscriptFormat
from app.store.chats import ChatStore

log = logging.getLogger("weft")


def export_file(store: ChatStore, conversations: Sequence[int], form: TranscriptFormat, path: Path) -> None:
    """Write conversations into one file, complete when it appears.

    Raises:
        WeftError: DISK_FULL or PERMISSION, naming the file; what stood there before stays.
    """
    found = [transcripts.transcript_of(store.get(id), store.messages(id)) for id in conversations]
    text = transcripts.export(found, form)
    part = ""
    try:
        handle, part = tempfile.mkstemp(prefix=".weft-", suffix=".part", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(part).replace(path)
    except (OSError, UnicodeEncodeError) as error:
        if part:
            Path(part).unlink(missing_ok=True)
        full = isinstance(error, OSError) and error.errno in (28, 27, 122)  # ENOSPC, EFBIG, EDQUOT
        raise WeftError(
            ErrorKind.DISK_FULL if full else ErrorKind.PERMISSION,
            f"{path} could not be written: {getattr(error, 'strerror', None) or error}.",
            "Free some space there, or choose another folder.",
        ) from error


def import_files(store: ChatStore, paths: Sequence[Path]) -> list[int]:
    """Read the conversations of files: of all of them, or none when one cannot be understood.

    Raises:
        WeftError: BAD_INPUT or PERMISSION, naming the file and what is wrong with it.
    """
    found: list[transcripts.Transcript] = []
    for path in paths:
        try:
            if path.stat().st_size > transcripts.MAX_BYTES:
                raise WeftError(
                    ErrorKind.BAD_INPUT,
                    f"{path.name} is larger than {transcripts.MAX_BYTES // 2**20} MiB. Nothing was imported.",
                    "Split it into several files.",
                )
            data = path.read_bytes()
        except OSError as error:
            raise WeftError(
                ErrorKind.PERMISSION, f"{path} cannot be read: {error.strerror}.", "Check the file and its permissions."
            ) from error
        found += transcripts.read(data, path.name)
    return [conversation.id for conversation in store.import_transcripts(found)]


class TranscriptWorker(QThread):
    """One export or import.

    Signals:
        done: the ids of what was imported or exported.
        failed: a WeftError.
    """

    done = Signal(list)
    failed = Signal(object)

    def __init__(
        self,
        store: ChatStore,
        *,
        read: Sequence[Path] = (),
        write: Path | None = None,
        conversations: Sequence[int] = (),
        form: TranscriptFormat = "json",
        parent: QObject | None = None,
    ) -> None:
        super().__init__(parent)
        self._store = store
        self._read, self._write = list(read), write
        self._conversations = list(conversations)
        self._form: TranscriptFormat = form

    def run(self) -> None:
        try:
            if self._write is not None:
                export_file(self._store, self._conversations, self._form, self._write)
                self.done.emit(self._conversations)
            else:
                self.done.emit(import_files(self._store, self._read))
        except WeftError as error:
            self.failed.emit(error)
        except Exception as error:  # a defect of ours: whoever waits for this must hear of it
            log.exception("An import or export failed")
            what = "imported" if self._write is None else "written"
            self.failed.emit(
                WeftError(
                    ErrorKind.INTERNAL,
                    f"The chats could not be {what}. {type(error).__name__}: {error}",
                    "Your chats are as they were. The window's log says more.",
                )
            )
        finally:
            self._store.release()
