"""One table of the library's index: sorted and filtered in SQL, so that 10,000 rows stay fluid."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypedDict, TypeVar

import msgspec

from app.core.errors import ErrorKind, WeftError
from app.core.library import AdapterEntry, ModelEntry
from app.store.database import Database

E = TypeVar("E", ModelEntry, AdapterEntry)
_AT_ONCE = 500  # ids in one query


class Order(TypedDict, total=False):
    """In which order, and which part of it.

    sort: a key of the kind's `sorts`, `name` unless it is given. limit: None for all.
    """

    sort: str
    descending: bool
    limit: int | None
    offset: int


class Kind(NamedTuple, Generic[E]):
    """What one kind of entry is in SQL.

    Attributes:
        table: its name. type: of the entries.
        columns: selected for `read`, which makes an entry of them. sorts: SQL by what people sort by.
        row: all columns in their order, from an entry and the signature of its files.
    """

    table: str
    type: type[E]
    columns: str
    sorts: Mapping[str, str]
    read: Callable[[Any], E]
    row: Callable[[E, str], tuple[object, ...]]


class IndexTable(Generic[E]):
    """Every method may be called from any thread, and raises WeftError as `Database.execute` does."""

    def __init__(self, database: Database, kind: Kind[E]) -> None:
        self._database = database
        self._kind = kind

    def entries(self, text: str = "", order: Order | None = None) -> list[E]:
        """Entries in which every word of `text` is found."""
        tail, parameters = self._query(text, order or {})
        rows = self._database.rows(f"SELECT {self._kind.columns} FROM {self._kind.table} {tail}", parameters)
        return [self._kind.read(row) for row in rows]

    def ids(self, text: str = "", order: Order | None = None) -> list[str]:
        """Ids of the same entries in the same order."""
        tail, parameters = self._query(text, order or {})
        return [row[0] for row in self._database.rows(f"SELECT id FROM {self._kind.table} {tail}", parameters)]

    def count(self, text: str = "") -> int:
        """How many `entries(text)` gives."""
        where, parameters = _filter(text)
        return int(self._database.row(f"SELECT count(*) FROM {self._kind.table}{where}", parameters)[0])

    def get(self, id: str) -> E:
        """One entry. Raises WeftError NOT_FOUND."""
        found = self.by_id((id,))
        if not found:
            raise _unknown(id)
        return found[0]

    def by_id(self, ids: Sequence[str]) -> list[E]:
        """Several entries in one query, in the order of `ids`; those that are gone are left out."""
        found: dict[str, E] = {}
        for start in range(0, len(ids), _AT_ONCE):
            part = ids[start : start + _AT_ONCE]
            rows = self._database.rows(
                f"SELECT {self._kind.columns} FROM {self._kind.table} WHERE id IN ({_marks(len(part))})", part
            )
            found.update((entry.id, entry) for entry in map(self._kind.read, rows))
        return [found[key] for key in ids if key in found]

    def at(self, id: str, path: str) -> E | None:
        """The entry with this id, else one that lies at this path."""
        row = self._database.row(
            f"SELECT {self._kind.columns} FROM {self._kind.table} WHERE id IN (?, ?) OR path = ?"
            " ORDER BY id = ? DESC LIMIT 1",
            (id, path, path, id),
        )
        return None if row is None else self._kind.read(row)

    def names(self) -> list[tuple[str, str]]:
        """Id and name of every entry."""
        return [(row[0], row[1]) for row in self._database.rows(f"SELECT id, name FROM {self._kind.table}")]

    def rename(self, id: str, name: str) -> None:
        """Show an entry under a name of the user's own; its file keeps its name, and searches know the new one.

        Args:
            name: "" or the file's own name goes back to that.

        Raises:
            WeftError: NOT_FOUND.
        """
        kind, name = self._kind, " ".join(name.split())[:255]
        with self._database.transaction() as connection:
            row = connection.execute(f"SELECT entry, signature FROM {kind.table} WHERE id = ?", (id,)).fetchone()
            if row is None:
                raise _unknown(id)
            entry = msgspec.msgpack.decode(row[0], type=kind.type)
            connection.execute("DELETE FROM names WHERE id = ?", (id,))
            if name and name != entry.name:
                values = (id, name, sort_name(name), name.casefold())
                connection.execute("INSERT INTO names (id, name, sort_name, haystack) VALUES (?, ?, ?, ?)", values)
            # Written anew from what was read from disk; the trigger `<table>_own_name` puts the user's name over it.
            self.put(connection, [entry], {id: row[1]})

    def put(self, connection: sqlite3.Connection, entries: Sequence[E], signatures: Mapping[str, str]) -> None:
        """Add or replace entries, within a transaction."""
        rows = [self._kind.row(entry, signatures.get(entry.id, "")) for entry in entries]
        if rows:
            marks = _marks(len(rows[0]))
            connection.executemany(f"INSERT OR REPLACE INTO {self._kind.table} VALUES ({marks})", rows)

    def _query(self, text: str, order: Order) -> tuple[str, list[object]]:
        sort, sorts = order.get("sort", "name"), self._kind.sorts
        if sort not in sorts:
            raise ValueError(f"cannot sort by {sort!r}; by {', '.join(sorts)}")
        where, parameters = _filter(text)
        direction = "DESC" if order.get("descending") else "ASC"
        by = f"{sorts[sort]} {direction}" + (", sort_name, id" if sort != "name" else f", id {direction}")
        limit = order.get("limit")
        return (
            f"{where} ORDER BY {by} LIMIT ? OFFSET ?",
            [*parameters, -1 if limit is None else limit, order.get("offset", 0)],
        )


def sort_name(name: str) -> str:
    """Case-folded, numbers padded, so that 7b comes before 13b."""
    return re.sub(r"\d+", lambda match: match.group()[:20].zfill(8), name.casefold())


def _filter(text: str) -> tuple[str, list[object]]:
    words: list[object] = list(text.casefold().split())
    return (" WHERE " + " AND ".join(["instr(haystack, ?) > 0"] * len(words)) if words else ""), words


def _marks(count: int) -> str:
    return ", ".join("?" * count)


def _unknown(id: str) -> WeftError:
    return WeftError(ErrorKind.NOT_FOUND, f"{id} is not in the library.", "Refresh the library.")
