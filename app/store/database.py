"""Weft's SQLite file: opened safely, migrated with a backup, and errors in words.

Threads: each thread gets a connection of its own (`Database.execute` and `transaction` see to it); in
WAL mode readers never wait, and writers wait for each other up to `BUSY_SECONDS`. Keep write
transactions short (a few hundred rows), because the window's thread writes too. A thread that ends
should call `release()`.

Durability: WAL with synchronous=NORMAL. A commit survives the death of the process at once, and a
power cut after the next checkpoint; the file is consistent in either case.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sqlite3
import tempfile
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from app.core.errors import ErrorKind, WeftError
from app.store.migrations import MIGRATIONS

BUSY_SECONDS = 5.0
KEPT_BACKUPS = 5
# A check reads the whole file; beyond this size only a file that was not closed properly is checked.
ALWAYS_CHECKED_BYTES = 8 * 1024 * 1024

_UNREADABLE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class Database:
    """One SQLite file.

    Attributes:
        path: where the data really are (a temporary copy when the wanted place cannot be written).
        temporary: true when nothing written now outlives this process.
        notice: a sentence for the user about what was found on opening; "" when all is well.

    Raises:
        WeftError: UNSUPPORTED when a newer Weft wrote the file; DISK_FULL or PERMISSION when it cannot be
            migrated; BUSY when another process holds it for longer than `BUSY_SECONDS`.
    """

    def __init__(self, path: Path, *, migrations: Sequence[str] = MIGRATIONS) -> None:
        self.path = path
        self.temporary = False
        self.notice = ""
        self._migrations = migrations
        self._local = threading.local()
        self._lock = threading.Lock()
        self._connections: dict[int, sqlite3.Connection] = {}
        self._generation = 0
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        if not _writable(path):
            self._work_on_a_copy()
        self._open()

    # Opening --------------------------------------------------------------------------------------

    def _open(self) -> None:
        unclean = _size(Path(f"{self.path}-wal")) > 0
        try:
            with _translated(self.path):
                connection = self._connection()
                connection.execute("PRAGMA journal_mode = WAL")
                if unclean or 0 < _size(self.path) <= ALWAYS_CHECKED_BYTES:
                    self._check(connection)
            self._migrate()
        except WeftError as error:
            if error.kind is not ErrorKind.CORRUPT:
                self.close()
                raise
            self._set_aside()
            self._connection().execute("PRAGMA journal_mode = WAL")
            self._migrate()

    def _check(self, connection: sqlite3.Connection) -> None:
        finding = str(connection.execute("PRAGMA quick_check(1)").fetchone()[0])
        if finding != "ok":
            raise WeftError(
                ErrorKind.CORRUPT,
                f"The database {self.path} is damaged: {finding}.",
                "Weft sets it aside and starts with an empty one.",
            )

    def _set_aside(self) -> None:
        """Move a damaged file out of the way, together with its log, and keep it."""
        self._close_connections()
        aside = self.path.with_name(f"{self.path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
        number = 1
        while aside.exists():
            number += 1
            aside = self.path.with_name(f"{self.path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}-{number}")
        try:
            for suffix in ("", "-wal", "-shm"):
                part = Path(f"{self.path}{suffix}")
                if part.exists():
                    part.rename(f"{aside}{suffix}")
        except OSError as error:
            raise WeftError(
                ErrorKind.PERMISSION,
                f"The database {self.path} is damaged and cannot be moved out of the way: {error.strerror}.",
                "Close other programs that use it, or move it yourself, then start Weft again.",
            ) from error
        self.notice = (
            f"The database was damaged. It was kept as {aside.name}, and Weft started with an empty one. "
            f"Earlier copies are in {self.path.parent / 'backups'}."
        )

    def _work_on_a_copy(self) -> None:
        """Serve a place that cannot be written from a copy, so that reading still works there."""
        self._scratch = tempfile.TemporaryDirectory(prefix="weft-", ignore_cleanup_errors=True)
        copy = Path(self._scratch.name) / self.path.name
        for suffix in ("", "-wal"):
            source = Path(f"{self.path}{suffix}")
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                shutil.copyfile(source, f"{copy}{suffix}")
        self.notice = (
            f"{self.path.parent} cannot be written. You can look at everything, "
            "but chats, jobs and settings are forgotten when Weft closes."
        )
        self.path = copy
        self.temporary = True

    def _migrate(self) -> None:
        newest = len(self._migrations)
        with _translated(self.path):
            found = int(self._connection().execute("PRAGMA user_version").fetchone()[0])
        if found > newest:
            raise WeftError(
                ErrorKind.UNSUPPORTED,
                f"The database {self.path} was written by a newer Weft (version {found}; this one knows {newest}).",
                "Update Weft, or set WEFT_HOME to another folder to start afresh beside it.",
            )
        fresh = found == 0
        while found < newest:
            if not fresh:
                self._back_up(found)
            with self.transaction() as connection:
                # Another process may have done it while this one waited for the lock.
                found = int(connection.execute("PRAGMA user_version").fetchone()[0])
                if found < newest:
                    for statement in _statements(self._migrations[found]):
                        connection.execute(statement)
                    found += 1
                    connection.execute(f"PRAGMA user_version = {found}")

    def _back_up(self, version: int) -> None:
        """Copy the whole database into `backups/` before a migration; keep the newest few."""
        folder = self.path.parent / "backups"
        target = folder / f"weft-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**9:09}-v{version}.sqlite"
        part = target.with_suffix(".part")
        try:
            folder.mkdir(exist_ok=True)
            with contextlib.closing(sqlite3.connect(part)) as copy:
                self._connection().backup(copy)
            part.rename(target)
        except (OSError, sqlite3.Error) as error:
            part.unlink(missing_ok=True)
            raise WeftError(
                ErrorKind.DISK_FULL,
                f"The database could not be backed up into {folder} before it is brought up to date: {error}.",
                "Free some space there, then start Weft again. Nothing was changed.",
            ) from error
        for old in sorted(folder.glob("weft-*.sqlite"))[:-KEPT_BACKUPS]:
            old.unlink(missing_ok=True)

    # Use ------------------------------------------------------------------------------------------

    def _connection(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is not None and self._local.generation == self._generation:
            return connection
        # check_same_thread is off only so that close() may close every thread's connection.
        connection = sqlite3.connect(
            self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False, cached_statements=256
        )
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA temp_store = MEMORY")
        self._local.connection = connection
        self._local.generation = self._generation
        with self._lock:
            self._connections[id(connection)] = connection
        return connection

    def execute(self, statement: str, parameters: Sequence[Any] = ()) -> sqlite3.Cursor:
        """Run one statement; outside a transaction it commits by itself.

        Raises:
            WeftError: DISK_FULL, PERMISSION, BUSY or CORRUPT, as SQLite reports.
        """
        with _translated(self.path):
            return self._connection().execute(statement, parameters)

    def rows(self, statement: str, parameters: Sequence[Any] = ()) -> list[Any]:
        """All rows of a query, as tuples. Raises as `execute` does."""
        with _translated(self.path):
            return self._connection().execute(statement, parameters).fetchall()

    def row(self, statement: str, parameters: Sequence[Any] = ()) -> Any:
        """The first row of a query as a tuple, or None. Raises as `execute` does."""
        with _translated(self.path):
            return self._connection().execute(statement, parameters).fetchone()

    @contextlib.contextmanager
    def transaction(self) -> Generator[sqlite3.Connection]:
        """All or nothing. Inside another transaction of the same thread it simply takes part in that one.

        Raises:
            WeftError: as `execute` does; then nothing of the transaction was kept.
        """
        with _translated(self.path):
            connection = self._connection()
            if connection.in_transaction:
                yield connection
                return
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # a full disk makes SQLite roll back by itself
                    connection.execute("ROLLBACK")
                raise

    def release(self) -> None:
        """Close the calling thread's connection. The next use opens another."""
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is not None:
            self._local.connection = None
            with self._lock:
                self._connections.pop(id(connection), None)
            connection.close()

    def close(self) -> None:
        """Close every thread's connection. Other threads must have stopped using the database."""
        self._close_connections()
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None

    def _close_connections(self) -> None:
        with self._lock:
            connections, self._connections = list(self._connections.values()), {}
            self._generation += 1  # what other threads still hold in their locals is void
        for connection in connections:
            connection.close()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _writable(path: Path) -> bool:
    """Whether a database can live at this path; makes the folder when it is not there yet."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    if path.exists() and not os.access(path, os.W_OK):
        return False
    return os.access(path.parent, os.W_OK | os.X_OK)


def _statements(script: str) -> Iterator[str]:
    """The single statements of a script. (`executescript` would end the transaction around it.)"""
    statement = ""
    for piece in re.split("(;)", script):
        statement += piece
        if piece == ";" and sqlite3.complete_statement(statement):
            yield statement
            statement = ""


@contextlib.contextmanager
def _translated(path: Path) -> Generator[None]:
    try:
        yield
    except sqlite3.DatabaseError as error:
        raise _explained(path, error) from error


def _explained(path: Path, error: sqlite3.DatabaseError) -> BaseException:
    """SQLite's error in words; a defect of ours (bad SQL, a broken constraint) stays what it is."""
    extended = getattr(error, "sqlite_errorcode", 0)
    code = extended & 0xFF
    if code == sqlite3.SQLITE_FULL or extended in (sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE):
        return WeftError(
            ErrorKind.DISK_FULL,
            f"There is no room left on the disk that holds {path}.",
            "Free some space, then try again. What was saved before is safe.",
        )
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH):
        return WeftError(
            ErrorKind.PERMISSION,
            f"The database {path} cannot be written: {error}.",
            "Check the permissions of that file and its folder, or set WEFT_HOME to a folder of yours.",
        )
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return WeftError(
            ErrorKind.BUSY,
            f"Another program holds the database {path}.",
            "Close other copies of Weft, or programs that look into that file, and try again.",
        )
    if code in _UNREADABLE:
        return WeftError(
            ErrorKind.CORRUPT,
            f"The database {path} is damaged: {error}.",
            "Start Weft again: it sets the file aside, keeps it, and begins with an empty one.",
        )
    if code == sqlite3.SQLITE_IOERR:
        return WeftError(
            ErrorKind.CORRUPT,
            f"The disk could not read or write the database {path}: {error}.",
            "Check the disk, and copy your data to another one.",
        )
    return error
