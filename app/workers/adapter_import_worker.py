"""A thread that brings adapters into the library: reads, checks and copies, and says how each ended."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

from PySide6.QtCore import QObject, QThread, Signal

from app.core.adapter_import import ImportOptions, ImportResult, import_adapters
from app.core.errors import ErrorKind, WeftError
from app.store.adapters import AdapterStore
from app.store.database import Database

_TELL_SECONDS = 0.05


class AdapterImportWorker(QThread):
    """Imports once. `start()` it after connecting.

    Signals:
        progressed(name, bytes done, of so many): a few times a second.
        ended(list of ImportResult, WeftError or None): once, last. What was finished before a cancel is in the list.
    """

    progressed = Signal(str, object, object)  # object: int would be cut to 32 bits
    ended = Signal(list, object)

    def __init__(
        self, paths: Sequence[Path], options: ImportOptions, database: Database, parent: QObject | None = None
    ) -> None:
        super().__init__(parent)
        self.setObjectName("adapter import")
        self._paths = list(paths)
        self._options = options
        self._database = database
        self._stopped = threading.Event()
        self._told = 0.0

    def stop(self) -> None:
        """End soon, leaving nothing half done; from any thread."""
        self._stopped.set()

    def run(self) -> None:
        """The thread's own work; call `start()`, not this."""
        results: list[ImportResult] = []
        error: WeftError | None = None
        store = AdapterStore(self._database)
        try:
            results = import_adapters(
                self._paths,
                self._options,
                same=lambda file: store.same_as(file, self._stopped.is_set),
                progress=self._progress,
                cancelled=self._stopped.is_set,
            )
        except WeftError as known:  # the database, or the folder of adapters itself
            error = known
        except Exception as unknown:  # noqa: BLE001  (must reach the window, not end a thread in silence)
            text = f"The adapters could not be imported: {type(unknown).__name__}: {unknown}"
            error = WeftError(ErrorKind.INTERNAL, text, "Please report this, with the log.")
        finally:
            self._database.release()
        self.ended.emit(results, error)

    def _progress(self, name: str, done: int, of: int) -> None:
        now = time.monotonic()
        if now - self._told >= _TELL_SECONDS:
            self._told = now
            self.progressed.emit(name, done, of)
