"""The index of models and adapters.

It is a cache of what lies on disk; `app/store/refresh.py` keeps it up to date.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Unpack

import msgspec

from app.core.library import AdapterEntry, ModelEntry
from app.store import library_find
from app.store.database import Database
from app.store.index_table import IndexTable, Order
from app.store.library_find import starter
from app.store.library_rows import ADAPTERS, MODELS

__all__ = ["Entry", "LibraryStore", "starter"]

Entry = ModelEntry | AdapterEntry

_CHUNK = 300  # rows per write transaction: the window's own writes never wait longer than for these


class LibraryStore:
    """Models and adapters. Every method may be called from any thread, and raises WeftError as `Database.execute` does."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._models = IndexTable(database, MODELS)
        self._adapters = IndexTable(database, ADAPTERS)

    # Models -----------------------------------------------------------------------------------------

    def models(self, text: str = "", **order: Unpack[Order]) -> list[ModelEntry]:
        """Models in which every word of `text` is found (name, format, quantization, architecture, folder).

        Args:
            sort: name, format, quantization, architecture, parameters, bytes, context, root, modified, problem or last_used.
        """
        return self._models.entries(text, order)

    def model_ids(self, text: str = "", **order: Unpack[Order]) -> list[str]:
        """Ids alone, of the same models in the same order: what a table holds, with a cache of the rows in sight."""
        return self._models.ids(text, order)

    def model(self, model: str) -> ModelEntry:
        """One model by id. Raises WeftError NOT_FOUND."""
        return self._models.get(model)

    def models_by_id(self, ids: Sequence[str]) -> list[ModelEntry]:
        """Several models in one query, in the order of `ids`; those that are gone are left out."""
        return self._models.by_id(ids)

    def count(self, text: str = "") -> int:
        """How many models `models(text)` gives."""
        return self._models.count(text)

    def touch(self, model: str) -> None:
        """Remember that a model was used now."""
        self._database.execute("INSERT OR REPLACE INTO usage (id, last_used) VALUES (?, ?)", (model, time.time()))

    def rename_model(self, model: str, name: str) -> None:
        """Show a model under a name of the user's own: see `IndexTable.rename`. Raises WeftError NOT_FOUND."""
        self._models.rename(model, name)

    def find(self, name_or_path: str) -> ModelEntry:
        """The model that a person means: `starter`, a library name, an id, or a path. Raises as `library_find.find`."""
        word = name_or_path.strip().casefold()
        if word in library_find.STARTER:
            return starter(word)
        return library_find.find(self._models, library_find.MODEL, name_or_path)

    def incomplete_files(self, limit: int) -> list[str]:
        """Weight files of models that have a problem: another program may still be writing them."""
        rows = self._database.rows(
            "SELECT entry FROM models WHERE problem != '' ORDER BY modified DESC LIMIT ?", (limit,)
        )
        return [path for (blob,) in rows for path in msgspec.msgpack.decode(blob, type=ModelEntry).files][:limit]

    # Adapters ---------------------------------------------------------------------------------------

    def adapters(self, text: str = "", **order: Unpack[Order]) -> list[AdapterEntry]:
        """Adapters in which every word of `text` is found.

        Args:
            sort: name, format, kind, base, rank, alpha, targets, run, bytes, root, modified or problem.
        """
        return self._adapters.entries(text, order)

    def adapter_ids(self, text: str = "", **order: Unpack[Order]) -> list[str]:
        """Ids alone, of the same adapters in the same order as `adapters`."""
        return self._adapters.ids(text, order)

    def adapter(self, adapter: str) -> AdapterEntry:
        """One adapter by id. Raises WeftError NOT_FOUND."""
        return self._adapters.get(adapter)

    def adapters_by_id(self, ids: Sequence[str]) -> list[AdapterEntry]:
        """Several adapters in one query, in the order of `ids`; those that are gone are left out."""
        return self._adapters.by_id(ids)

    def adapter_count(self, text: str = "") -> int:
        """How many adapters `adapters(text)` gives."""
        return self._adapters.count(text)

    def rename_adapter(self, adapter: str, name: str) -> None:
        """As `rename_model`, for an adapter."""
        self._adapters.rename(adapter, name)

    def find_adapter(self, name_or_path: str) -> AdapterEntry:
        """The adapter that a person means: a library name, an id, or a path. Raises as `library_find.find`."""
        return library_find.find(self._adapters, library_find.ADAPTER, name_or_path)

    # Upkeep -----------------------------------------------------------------------------------------

    def known(self, root: str) -> dict[str, str]:
        """Signatures of what the index holds of a root, by id, to tell what has to be read again.

        Not the entries: 10,000 of them would set off a full garbage collection, which stops every thread.
        """
        rows: list[tuple[str, str]] = []
        for table in ("models", "adapters"):
            rows += self._database.rows(f"SELECT id, signature FROM {table} WHERE root = ?", (root,))
        return dict(rows)

    def roots(self) -> list[str]:
        """Every root that the index holds something of."""
        return [row[0] for row in self._database.rows("SELECT root FROM models UNION SELECT root FROM adapters")]

    def put(self, entries: Iterable[Entry], signatures: Mapping[str, str] | None = None) -> None:
        """Add or replace entries, in short transactions."""
        batch: list[Entry] = []
        for entry in entries:
            batch.append(entry)
            if len(batch) >= _CHUNK:
                self._put(batch, signatures or {})
                batch = []
        if batch:
            self._put(batch, signatures or {})

    def _put(self, entries: list[Entry], signatures: Mapping[str, str]) -> None:
        with self._database.transaction() as connection:
            self._models.put(connection, [e for e in entries if isinstance(e, ModelEntry)], signatures)
            self._adapters.put(connection, [e for e in entries if isinstance(e, AdapterEntry)], signatures)

    def remove(self, ids: Iterable[str]) -> None:
        """Take entries out of the index; nothing on disk is touched."""
        keys = [(key,) for key in ids]
        for start in range(0, len(keys), _CHUNK):
            with self._database.transaction() as connection:
                connection.executemany("DELETE FROM models WHERE id = ?", keys[start : start + _CHUNK])
                connection.executemany("DELETE FROM adapters WHERE id = ?", keys[start : start + _CHUNK])

    def replace_root(self, root: str, entries: Iterable[Entry], signatures: Mapping[str, str] | None = None) -> None:
        """Make the index hold exactly these entries of a root (each is filed under `root`)."""
        kept = [entry if entry.root == root else msgspec.structs.replace(entry, root=root) for entry in entries]
        self.put(kept, signatures)
        ids = {entry.id for entry in kept}
        self.remove(key for key in self.known(root) if key not in ids)

    def release(self) -> None:
        """Close the calling thread's connection to the database; call it when the thread ends."""
        self._database.release()
