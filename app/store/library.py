"""The index of models and adapters: sorted and filtered in SQL, so that 10,000 rows stay fluid.

The index is a cache of what lies on disk; `app/store/refresh.py` keeps it up to date.
"""

from __future__ import annotations

import difflib
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from app.core.errors import ErrorKind, WeftError
from app.core.library import AdapterEntry, ModelEntry
from app.core.paths import resources
from app.store.database import Database

Entry = ModelEntry | AdapterEntry

_MODEL_SORTS = {
    "name": "sort_name",
    "format": "format",
    "quantization": "quantization",
    "architecture": "architecture",
    "parameters": "parameters",
    "bytes": "bytes",
    "context": "context",
    "root": "root",
    "modified": "modified",
    "problem": "problem",
    "last_used": "coalesce((SELECT last_used FROM usage WHERE usage.id = models.id), 0)",
}
_ADAPTER_SORTS = {
    "name": "sort_name",
    "format": "format",
    "kind": "kind",
    "base": "base",
    "rank": "rank",
    "alpha": "alpha",
    "targets": "targets",
    "run": "run",
    "bytes": "bytes",
    "root": "root",
    "modified": "modified",
    "problem": "problem",
}
_CHUNK = 300  # rows per write transaction: the window's own writes never wait longer than for these
_STARTER = {"starter": "model", "starter (gguf)": "*.gguf"}


class LibraryStore:
    """Models and adapters. Every method may be called from any thread, and raises WeftError as `Database.execute` does."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # Models -----------------------------------------------------------------------------------------

    def models(
        self,
        text: str = "",
        sort: str = "name",
        descending: bool = False,
        limit: int | None = None,
        offset: int = 0,
    ) -> list[ModelEntry]:
        """Models in which every word of `text` is found (name, format, quantization, architecture, folder).

        Args:
            sort: name, format, quantization, architecture, parameters, bytes, context, root, modified, problem or last_used.
        """
        tail, parameters = _query(_MODEL_SORTS, text, sort, descending, limit, offset)
        rows = self._database.rows(
            f"SELECT entry, (SELECT last_used FROM usage WHERE usage.id = models.id), name FROM models {tail}",
            parameters,
        )
        return [_model(row) for row in rows]

    def model_ids(
        self,
        text: str = "",
        sort: str = "name",
        descending: bool = False,
        limit: int | None = None,
        offset: int = 0,
    ) -> list[str]:
        """Ids alone, of the same models in the same order: what a table holds, with a cache of the rows in sight."""
        tail, parameters = _query(_MODEL_SORTS, text, sort, descending, limit, offset)
        return [row[0] for row in self._database.rows(f"SELECT id FROM models {tail}", parameters)]

    def model(self, model: str) -> ModelEntry:
        """One model by id. Raises WeftError NOT_FOUND."""
        found = self.models_by_id((model,))
        if not found:
            raise WeftError(ErrorKind.NOT_FOUND, f"{model} is not in the library.", "Refresh the library.")
        return found[0]

    def models_by_id(self, ids: Sequence[str]) -> list[ModelEntry]:
        """Several models in one query, in the order of `ids`; those that are gone are left out."""
        found: dict[str, ModelEntry] = {}
        for start in range(0, len(ids), 500):
            part = ids[start : start + 500]
            rows = self._database.rows(
                "SELECT entry, (SELECT last_used FROM usage WHERE usage.id = models.id), name FROM models"
                f" WHERE id IN ({', '.join('?' * len(part))})",
                part,
            )
            found.update((entry.id, entry) for entry in map(_model, rows))
        return [found[key] for key in ids if key in found]

    def count(self, text: str = "") -> int:
        """How many models `models(text)` gives."""
        tail, parameters = _filter(text)
        return int(self._database.row(f"SELECT count(*) FROM models{tail}", parameters)[0])

    def touch(self, model: str) -> None:
        """Remember that a model was used now."""
        self._database.execute("INSERT OR REPLACE INTO usage (id, last_used) VALUES (?, ?)", (model, time.time()))

    def rename_model(self, model: str, name: str) -> None:
        """Show a model under a name of the user's own; its file keeps its name, and `find` knows the new one.

        Args:
            name: "" or the file's own name goes back to that.

        Raises:
            WeftError: NOT_FOUND.
        """
        name = " ".join(name.split())[:255]
        with self._database.transaction() as connection:
            row = connection.execute("SELECT entry, signature FROM models WHERE id = ?", (model,)).fetchone()
            if row is None:
                raise WeftError(ErrorKind.NOT_FOUND, f"{model} is not in the library.", "Refresh the library.")
            entry = msgspec.msgpack.decode(row[0], type=ModelEntry)
            connection.execute("DELETE FROM names WHERE id = ?", (model,))
            if name and name != entry.name:
                values = (model, name, _sort_name(name), name.casefold())
                connection.execute("INSERT INTO names (id, name, sort_name, haystack) VALUES (?, ?, ?, ?)", values)
            # Written anew from what was read from disk; the trigger `models_own_name` puts the user's name over it.
            places = ", ".join("?" * 16)
            connection.execute(f"INSERT OR REPLACE INTO models VALUES ({places})", _model_row(entry, row[1]))

    # Adapters ---------------------------------------------------------------------------------------

    def adapters(
        self,
        text: str = "",
        sort: str = "name",
        descending: bool = False,
        limit: int | None = None,
        offset: int = 0,
    ) -> list[AdapterEntry]:
        """Adapters in which every word of `text` is found.

        Args:
            sort: name, format, kind, base, rank, alpha, targets, run, bytes, root, modified or problem.
        """
        tail, parameters = _query(_ADAPTER_SORTS, text, sort, descending, limit, offset)
        rows = self._database.rows(f"SELECT entry, name FROM adapters {tail}", parameters)
        return [_adapter(row) for row in rows]

    def adapter(self, adapter: str) -> AdapterEntry:
        """One adapter by id. Raises WeftError NOT_FOUND."""
        row = self._database.row("SELECT entry, name FROM adapters WHERE id = ?", (adapter,))
        if row is None:
            raise WeftError(ErrorKind.NOT_FOUND, f"{adapter} is not in the library.", "Refresh the library.")
        return _adapter(row)

    def adapter_ids(
        self,
        text: str = "",
        sort: str = "name",
        descending: bool = False,
        limit: int | None = None,
        offset: int = 0,
    ) -> list[str]:
        """Ids alone, of the same adapters in the same order as `adapters`."""
        tail, parameters = _query(_ADAPTER_SORTS, text, sort, descending, limit, offset)
        return [row[0] for row in self._database.rows(f"SELECT id FROM adapters {tail}", parameters)]

    def adapters_by_id(self, ids: Sequence[str]) -> list[AdapterEntry]:
        """Several adapters in one query, in the order of `ids`; those that are gone are left out."""
        found: dict[str, AdapterEntry] = {}
        for start in range(0, len(ids), 500):
            part = ids[start : start + 500]
            marks = ", ".join("?" * len(part))
            rows = self._database.rows(f"SELECT entry, name FROM adapters WHERE id IN ({marks})", part)
            found.update((entry.id, entry) for entry in map(_adapter, rows))
        return [found[key] for key in ids if key in found]

    def adapter_count(self, text: str = "") -> int:
        """How many adapters `adapters(text)` gives."""
        tail, parameters = _filter(text)
        return int(self._database.row(f"SELECT count(*) FROM adapters{tail}", parameters)[0])

    def rename_adapter(self, adapter: str, name: str) -> None:
        """As `rename_model`, for an adapter."""
        name = " ".join(name.split())[:255]
        with self._database.transaction() as connection:
            row = connection.execute("SELECT entry, signature FROM adapters WHERE id = ?", (adapter,)).fetchone()
            if row is None:
                raise WeftError(ErrorKind.NOT_FOUND, f"{adapter} is not in the library.", "Refresh the library.")
            entry = msgspec.msgpack.decode(row[0], type=AdapterEntry)
            connection.execute("DELETE FROM names WHERE id = ?", (adapter,))
            if name and name != entry.name:
                values = (adapter, name, _sort_name(name), name.casefold())
                connection.execute("INSERT INTO names (id, name, sort_name, haystack) VALUES (?, ?, ?, ?)", values)
            places = ", ".join("?" * 18)  # the trigger `adapters_own_name` puts the user's name over it
            connection.execute(f"INSERT OR REPLACE INTO adapters VALUES ({places})", _adapter_row(entry, row[1]))

    # Finding by name ----------------------------------------------------------------------------------

    def find(self, name_or_path: str) -> ModelEntry:
        """The model that a person means: `starter`, a library name, an id, or a path, in the library or not.

        A name may be given without its `user/` part, in any case.

        Raises:
            WeftError: NOT_FOUND with close names; BAD_INPUT when several models bear the name; CORRUPT or
                HOSTILE when a path leads to files that cannot be read.
        """
        word = name_or_path.strip().casefold()
        if word in _STARTER:
            return starter(word)
        found = self._by_id_or_path("models", name_or_path)
        if found:
            entry = _model((found[0], None, found[1]))
            return msgspec.structs.replace(entry, last_used=self._last_used(entry.id))
        if Path(name_or_path).exists():
            from app.core.recognise import recognise_model

            entry = recognise_model(Path(name_or_path).absolute())
            if entry is not None:
                return entry
            if os.sep in name_or_path or Path(name_or_path).is_file():
                raise WeftError(
                    ErrorKind.NOT_FOUND,
                    f"No model was found at {name_or_path}.",
                    "A model is a .gguf file, or a folder with config.json and its weights.",
                )
        if os.sep in name_or_path and name_or_path.startswith((os.sep, ".", "~")):
            raise WeftError(
                ErrorKind.NOT_FOUND,
                f"There is no file or folder {name_or_path}.",
                "Check the path, or give a name of the library.",
            )
        rows = self._by_name("models", word)
        return self.model(self._only("model", name_or_path, rows, "models"))

    def find_adapter(self, name_or_path: str) -> AdapterEntry:
        """The adapter that a person means: a library name, an id, or a path. Raises as `find` does."""
        found = self._by_id_or_path("adapters", name_or_path)
        if found:
            return _adapter(found)
        if Path(name_or_path).exists():
            from app.core.recognise import recognise_adapter

            entry = recognise_adapter(Path(name_or_path).absolute())
            if entry is not None:
                return entry
            if os.sep in name_or_path or Path(name_or_path).is_file():
                raise WeftError(
                    ErrorKind.NOT_FOUND,
                    f"No adapter was found at {name_or_path}.",
                    "An adapter is a folder with adapter_config.json, a .safetensors file with LoRA tensors, or a GGUF adapter.",
                )
        rows = self._by_name("adapters", name_or_path.strip().casefold())
        return self.adapter(self._only("adapter", name_or_path, rows, "adapters"))

    def _by_id_or_path(self, table: str, text: str) -> Any:
        path = str(Path(text).expanduser().absolute())
        return self._database.row(
            f"SELECT entry, name FROM {table} WHERE id IN (?, ?) OR path = ? ORDER BY id = ? DESC LIMIT 1",
            (text, path, path, text),
        )

    def _by_name(self, table: str, word: str) -> list[tuple[str, str]]:
        rows = self._database.rows(f"SELECT id, name FROM {table}")
        exact = [(key, name) for key, name in rows if name.casefold() == word]
        return exact or [(key, name) for key, name in rows if name.casefold().rpartition("/")[2] == word]

    def _only(self, what: str, text: str, rows: list[tuple[str, str]], table: str) -> str:
        if len(rows) == 1:
            return rows[0][0]
        if rows:
            places = "\n".join(f"  {key}" for key, _ in rows[:10])
            raise WeftError(
                ErrorKind.BAD_INPUT,
                f"{len(rows)} {what}s are called {text!r}.",
                f"Give the path of the one you mean:\n{places}",
            )
        names = [row[0] for row in self._database.rows(f"SELECT DISTINCT name FROM {table}")]
        if table == "models":
            names.append("starter")
        folded = {part: name for name in names for part in (name.casefold(), name.casefold().rpartition("/")[2])}
        word = text.casefold()
        close = [folded[match] for match in difflib.get_close_matches(word, folded, n=5, cutoff=0.5)]
        close += [name for name in names if word and word in name.casefold()]
        unique = list(dict.fromkeys(close))[:5]
        hint = f"Did you mean {' or '.join(unique)}?" if unique else f"`weft {table}` lists what there is."
        raise WeftError(ErrorKind.NOT_FOUND, f"There is no {what} {text!r} in the library.", hint)

    def _last_used(self, model: str) -> float:
        row = self._database.row("SELECT last_used FROM usage WHERE id = ?", (model,))
        return row[0] if row else 0.0

    def incomplete_files(self, limit: int) -> list[str]:
        """Weight files of models that have a problem: another program may still be writing them."""
        rows = self._database.rows(
            "SELECT entry FROM models WHERE problem != '' ORDER BY modified DESC LIMIT ?", (limit,)
        )
        return [path for (blob,) in rows for path in msgspec.msgpack.decode(blob, type=ModelEntry).files][:limit]

    def release(self) -> None:
        """Close the calling thread's connection to the database; call it when the thread ends."""
        self._database.release()

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
            models = [_model_row(e, signatures.get(e.id, "")) for e in entries if isinstance(e, ModelEntry)]
            adapters = [_adapter_row(e, signatures.get(e.id, "")) for e in entries if isinstance(e, AdapterEntry)]
            connection.executemany(f"INSERT OR REPLACE INTO models VALUES ({', '.join('?' * 16)})", models)
            connection.executemany(f"INSERT OR REPLACE INTO adapters VALUES ({', '.join('?' * 18)})", adapters)

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


def starter(word: str = "starter") -> ModelEntry:
    """The model that ships with Weft: `starter` (safetensors) or `starter (gguf)`.

    Raises:
        WeftError: NOT_FOUND when the installation lacks it; CORRUPT when it is damaged.
    """
    from app.core.recognise import recognise_model

    folder = resources() / "starter"
    for path in sorted(folder.glob(_STARTER[word.casefold()])):
        entry = recognise_model(path)
        if entry is not None:
            return msgspec.structs.replace(
                entry,
                name="starter (GGUF)" if "gguf" in word.casefold() else "starter",
                root=str(folder),
                read_only=True,
            )
    raise WeftError(
        ErrorKind.NOT_FOUND,
        f"The starter model is missing from {folder}.",
        "Install Weft again, or name another model.",
    )


def _filter(text: str) -> tuple[str, list[object]]:
    words: list[object] = list(text.casefold().split())
    return (" WHERE " + " AND ".join(["instr(haystack, ?) > 0"] * len(words)) if words else ""), words


def _query(
    sorts: Mapping[str, str], text: str, sort: str, descending: bool, limit: int | None, offset: int
) -> tuple[str, list[object]]:
    if sort not in sorts:
        raise ValueError(f"cannot sort by {sort!r}; by {', '.join(sorts)}")
    where, parameters = _filter(text)
    direction = "DESC" if descending else "ASC"
    order = f"{sorts[sort]} {direction}" + (", sort_name, id" if sort != "name" else f", id {direction}")
    return f"{where} ORDER BY {order} LIMIT ? OFFSET ?", [*parameters, -1 if limit is None else limit, offset]


def _model(row: Any) -> ModelEntry:
    entry = msgspec.msgpack.decode(row[0], type=ModelEntry)
    if row[1] or row[2] != entry.name:
        entry = msgspec.structs.replace(entry, last_used=row[1] or 0.0, name=row[2])
    return entry


def _adapter(row: Any) -> AdapterEntry:
    entry = msgspec.msgpack.decode(row[0], type=AdapterEntry)
    return entry if row[1] == entry.name else msgspec.structs.replace(entry, name=row[1])


def _sort_name(name: str) -> str:
    """Case-folded, numbers padded, so that 7b comes before 13b."""
    return re.sub(r"\d+", lambda match: match.group()[:20].zfill(8), name.casefold())


def _model_row(entry: ModelEntry, signature: str) -> tuple[object, ...]:
    folder = Path(entry.path).parent.name
    words = (entry.name, entry.format.value, entry.quantization, entry.architecture, entry.model_type, folder)
    return (
        entry.id,
        entry.root,
        entry.name,
        _sort_name(entry.name),
        " ".join(words).casefold(),
        entry.path,
        entry.format.value,
        entry.quantization,
        entry.architecture,
        _stored(entry.parameters),
        _stored(entry.bytes),
        _stored(entry.shape.context),
        entry.modified,
        entry.problem,
        signature,
        msgspec.msgpack.encode(entry),
    )


def _adapter_row(entry: AdapterEntry, signature: str) -> tuple[object, ...]:
    words = (entry.name, entry.format.value, entry.kind, entry.base, *entry.targets[:32], Path(entry.path).parent.name)
    return (
        entry.id,
        entry.root,
        entry.name,
        _sort_name(entry.name),
        " ".join(words).casefold(),
        entry.path,
        entry.format.value,
        entry.kind,
        entry.base,
        _stored(entry.rank),
        _stored(entry.bytes),
        entry.modified,
        entry.problem,
        signature,
        msgspec.msgpack.encode(entry),
        entry.alpha,
        " ".join(entry.targets)[:1000],
        entry.run,
    )


def _stored(number: int) -> int:
    """SQLite's integers end at 2**63 - 1; a crafted header may claim more."""
    return max(0, min(number, 2**63 - 1))
