"""Adapter stacks that a person saved under names."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from app.core.errors import ErrorKind, WeftError
from app.core.stack import AdapterStack
from app.store.database import Database


class SavedStack(msgspec.Struct, frozen=True, kw_only=True):
    """A stack with its name. Times are seconds since the epoch."""

    id: int
    name: str
    stack: AdapterStack
    created: float
    modified: float


class StackStore:
    """Saved stacks. Every method may be called from any thread, and raises WeftError as `Database.execute` does."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def list(self) -> list[SavedStack]:
        """All of them, by name."""
        return [_saved(row) for row in self._database.rows(f"{_SELECT} ORDER BY name COLLATE NOCASE, id")]

    def get(self, name: str) -> SavedStack:
        """One by its name, in any case. Raises WeftError NOT_FOUND."""
        row = self._database.row(f"{_SELECT} WHERE folded = ?", (_clean(name).casefold(),))
        if row is None:
            names = ", ".join(saved.name for saved in self.list()[:8])
            raise WeftError(
                ErrorKind.NOT_FOUND,
                f"There is no saved stack {name!r}.",
                f"There are: {names}." if names else "Save one first.",
            )
        return _saved(row)

    def save(self, name: str, stack: AdapterStack, *, replace: bool = False) -> SavedStack:
        """Keep a stack under a name.

        Raises:
            WeftError: BAD_INPUT for an empty name or stack, or a name that is taken (unless `replace`).
        """
        name = _named(name)
        if not stack.adapters:
            raise WeftError(ErrorKind.BAD_INPUT, "The stack has no adapters.", "Add an adapter, then save it.")
        now, data = time.time(), msgspec.json.encode(stack).decode()
        with self._database.transaction() as connection:
            taken = connection.execute("SELECT id FROM stacks WHERE folded = ?", (name.casefold(),)).fetchone()
            if taken and not replace:
                raise _taken(name)
            if taken:
                connection.execute(
                    "UPDATE stacks SET name = ?, stack = ?, modified = ? WHERE id = ?", (name, data, now, taken[0])
                )
            else:
                connection.execute(
                    "INSERT INTO stacks (name, folded, stack, created, modified) VALUES (?, ?, ?, ?, ?)",
                    (name, name.casefold(), data, now, now),
                )
        return self.get(name)

    def rename(self, stack: int, name: str) -> SavedStack:
        """Call it something else. Raises WeftError NOT_FOUND; BAD_INPUT for an empty name or one that is taken."""
        name = _named(name)
        with self._database.transaction() as connection:
            taken = connection.execute("SELECT id FROM stacks WHERE folded = ?", (name.casefold(),)).fetchone()
            if taken and taken[0] != stack:
                raise _taken(name)
            values = (name, name.casefold(), time.time(), stack)
            changed = connection.execute("UPDATE stacks SET name = ?, folded = ?, modified = ? WHERE id = ?", values)
            if changed.rowcount == 0:
                raise WeftError(ErrorKind.NOT_FOUND, "That saved stack is gone.", "Look at the list again.")
        return self.get(name)

    def delete(self, stack: int) -> SavedStack | None:
        """Forget one, and return it, so that it can be brought back with `save`; None when it was gone."""
        row = self._database.row(f"{_SELECT} WHERE id = ?", (stack,))
        self._database.execute("DELETE FROM stacks WHERE id = ?", (stack,))
        return _saved(row) if row else None


_SELECT = "SELECT id, name, stack, created, modified FROM stacks"


def _saved(row: Any) -> SavedStack:
    stack = msgspec.json.decode(row[2], type=AdapterStack)
    return SavedStack(id=row[0], name=row[1], stack=stack, created=row[3], modified=row[4])


def _clean(name: str) -> str:
    return " ".join(name.split())[:255]


def _named(name: str) -> str:
    name = _clean(name)
    if not name:
        raise WeftError(ErrorKind.BAD_INPUT, "The name is empty.", "Give the stack a name.")
    return name


def _taken(name: str) -> WeftError:
    return WeftError(
        ErrorKind.BAD_INPUT, f"A saved stack {name!r} exists already.", "Choose another name, or replace it."
    )
