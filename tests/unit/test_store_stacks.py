"""Adapter stacks saved under names."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.core.errors import ErrorKind, WeftError
from app.core.stack import AdapterStack, StackedAdapter
from app.store.database import Database
from app.store.migrations import MIGRATIONS
from app.store.stacks import StackStore


def stack(*pairs: tuple[str, float]) -> AdapterStack:
    return AdapterStack(adapters=tuple(StackedAdapter(path=p, weight=w, name=Path(p).name) for p, w in pairs))


def test_stacks_are_saved_listed_renamed_and_brought_back(database: Database, tmp_path: Path) -> None:
    store = StackStore(database)
    assert store.list() == []
    night = store.save("Night  talk", stack(("/a/pirate", 0.7), ("/b/Ünï", -1.5), ("/c/off", 0.0)))
    assert night.name == "Night talk" and night.stack.adapters[1].weight == -1.5
    store.save("a day", stack(("/a/pirate", 1.0)))
    assert [saved.name for saved in store.list()] == ["a day", "Night talk"]
    assert store.get("NIGHT TALK") == night
    renamed = store.rename(night.id, "Evening")
    assert (renamed.id, renamed.name, renamed.stack) == (night.id, "Evening", night.stack)
    gone = store.delete(renamed.id)
    assert gone == renamed and store.delete(renamed.id) is None
    assert store.save(gone.name, gone.stack).stack == night.stack
    # They outlive the process.
    database.close()
    again = Database(tmp_path / "weft.sqlite")
    assert {saved.name for saved in StackStore(again).list()} == {"a day", "Evening"}
    again.close()


def test_names_are_had_once_and_stacks_are_not_empty(database: Database) -> None:
    store = StackStore(database)
    first = store.save("Straße", stack(("/a", 1.0)))
    second = store.save("other", stack(("/b", 1.0)))
    for call in (
        lambda: store.save("STRASSE", stack(("/c", 1.0))),
        lambda: store.rename(second.id, "strasse"),
        lambda: store.save("  ", stack(("/c", 1.0))),
        lambda: store.save("empty", AdapterStack()),
    ):
        with pytest.raises(WeftError) as refused:
            call()
        assert refused.value.kind is ErrorKind.BAD_INPUT and refused.value.hint
    replaced = store.save("STRASSE", stack(("/c", 2.0)), replace=True)
    assert (replaced.id, replaced.name, replaced.created) == (first.id, "STRASSE", first.created)
    assert store.rename(first.id, "strasse").name == "strasse"
    for call in (lambda: store.get("nothing"), lambda: store.rename(99, "x")):
        with pytest.raises(WeftError) as missing:
            call()
        assert missing.value.kind is ErrorKind.NOT_FOUND and missing.value.hint


def test_an_older_database_gets_the_new_columns_and_keeps_its_adapters(tmp_path: Path) -> None:
    path = tmp_path / "weft.sqlite"
    step = next(number for number, text in enumerate(MIGRATIONS) if "adapter_facts" in text)
    old = Database(path, migrations=MIGRATIONS[:step])
    old.execute(
        "INSERT INTO adapters VALUES ('/x', '/', 'x', 'x', 'x', '/x', 'peft', 'LoRA', '', 8, 1, 0, '', 's', x'80')"
    )
    old.close()
    new = Database(path)
    assert new.row("SELECT id, rank, alpha, targets, run FROM adapters") == ("/x", 8, 0.0, "", "")
    new.close()
    assert list((tmp_path / "backups").glob("*.sqlite"))
