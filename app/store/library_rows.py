"""Models and adapters as rows of the library's index."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from app.core.library import AdapterEntry, ModelEntry
from app.store.index_table import Kind, sort_name

_LAST_USED = "(SELECT last_used FROM usage WHERE usage.id = models.id)"
_SAME = ("format", "bytes", "root", "modified", "problem")  # columns that sort by themselves, of both kinds


def _read_model(row: Any) -> ModelEntry:
    entry = msgspec.msgpack.decode(row[0], type=ModelEntry)
    if row[2] or row[1] != entry.name:
        entry = msgspec.structs.replace(entry, last_used=row[2] or 0.0, name=row[1])
    return entry


def _read_adapter(row: Any) -> AdapterEntry:
    entry = msgspec.msgpack.decode(row[0], type=AdapterEntry)
    return entry if row[1] == entry.name else msgspec.structs.replace(entry, name=row[1])


def _named(entry: ModelEntry | AdapterEntry, words: Iterable[str]) -> tuple[object, ...]:
    """What both kinds of rows begin with. `words`: by which it is found, beside its name, format and folder."""
    found = " ".join((entry.name, entry.format.value, *words, Path(entry.path).parent.name)).casefold()
    return (entry.id, entry.root, entry.name, sort_name(entry.name), found, entry.path, entry.format.value)


def _model_row(entry: ModelEntry, signature: str) -> tuple[object, ...]:
    return (
        *_named(entry, (entry.quantization, entry.architecture, entry.model_type)),
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
    return (
        *_named(entry, (entry.kind, entry.base, *entry.targets[:32])),
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


MODELS = Kind(
    table="models",
    type=ModelEntry,
    columns=f"entry, name, {_LAST_USED}",
    sorts={
        "name": "sort_name",
        **{key: key for key in (*_SAME, "quantization", "architecture", "parameters", "context")},
        "last_used": f"coalesce({_LAST_USED}, 0)",
    },
    read=_read_model,
    row=_model_row,
)
ADAPTERS = Kind(
    table="adapters",
    type=AdapterEntry,
    columns="entry, name",
    sorts={"name": "sort_name", **{key: key for key in (*_SAME, "kind", "base", "rank", "alpha", "targets", "run")}},
    read=_read_adapter,
    row=_adapter_row,
)
