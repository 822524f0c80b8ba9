"""The file list of a repository: long ones are put in order beside the window's other work, and what is checked adds up."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PySide6.QtCore import Qt
from pytestqt.qtbot import QtBot

from app.core.memory import Fit
from app.hub import pieces
from app.hub.files import Listing, RemoteFile
from app.viewmodels import hub_tables
from app.viewmodels.fitting import Fitting
from app.viewmodels.hub_tables import FileTable

FITS = Fitting(fit=Fit.GPU, word="GPU", tone="positive", numbers="")
FOLDER = Path("/models/user/model")


def listing(paths: Sequence[str], here: dict[str, str] | None = None) -> Listing:
    files = tuple(
        RemoteFile(repo="user/model", commit="c", path=path, size=random.randrange(1, 10**9)) for path in paths
    )
    return Listing(repo="user/model", revision="main", commit="c", files=files, here=here or {})


def calls(work: Callable[[], object]) -> int:
    """How many functions, Python's or C's, a piece of work calls: it does not depend on how busy the machine is."""
    count = 0

    def event(_frame: object, what: str, _arg: object) -> None:
        nonlocal count
        count += what in ("call", "c_call")

    sys.setprofile(event)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


MANY = 20_000
LISTS = {
    "shards": [f"part-{n % 300:03d}/shard-{n:06d}/weights.safetensors" for n in range(MANY)],
    "quantizations": [f"model-{n:06d}-Q4_K_M.gguf" for n in range(MANY)],
    "one split model": [f"model-{n:05d}-of-99999.gguf" for n in range(MANY)],
    "splits of which all but one part are missing": [f"m{n}-00001-of-99999.gguf" for n in range(MANY)],
    "projectors": [f"{n}/mmproj-model.gguf" for n in range(MANY)],
    "texts": [f"data/{n % 300:03d}/{n:06d}.txt" for n in range(MANY)],
}


@pytest.mark.parametrize("kind", LISTS)
def test_no_piece_of_a_long_list_is_long(qtbot: QtBot, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    def sort(items: object) -> list[object]:  # one call, but the longest there is: it holds up all threads
        listed = list(items)  # type: ignore[call-overload]
        assert len(listed) <= pieces.PIECE
        return sorted(listed)

    monkeypatch.setattr(pieces, "sorted", sort, raising=False)
    table = FileTable(lambda _: FITS)
    paths = [*LISTS[kind]]
    random.shuffle(paths)
    many = listing(paths)
    longest = calls(lambda: table.set_listing(many, "", FOLDER))
    table._timer.stop()
    count = 0
    while table.busy:
        assert table.rowCount() == 0 and not table.any_chosen
        longest = max(longest, calls(table._go_on))
        count += 1
    # One split model is one line, of which the parts are counted at once.
    assert longest <= (8 * MANY if kind == "one split model" else 20 * pieces.PIECE), (
        f"{longest} calls in one of {count}"
    )
    assert count > 3 * MANY / pieces.PIECE
    assert table.rowCount() == (1 if kind == "one split model" else MANY)
    for which in ("all", "none", "usual"):
        assert calls(lambda which=which: table.check(which)) < 12 * MANY
    assert calls(lambda: table.setData(table.index(0, 0), Qt.CheckState.Checked, Qt.ItemDataRole.CheckStateRole)) < 50


def test_a_long_list_comes_by_itself_and_another_takes_its_place(qtbot: QtBot) -> None:
    table = FileTable(lambda _: FITS)
    table.set_listing(listing(LISTS["texts"]), "", FOLDER)
    assert table.busy and not table.any_chosen and not table.holds_weights
    short = listing(["config.json", "b.safetensors", "a.safetensors"])
    with qtbot.waitSignal(table.ready, timeout=1000):
        table.set_listing(short)
    assert not table.busy and [row.title for row in table.rows] == ["a.safetensors", "b.safetensors", "config.json"]
    long = [*LISTS["shards"], "config.json"]
    with qtbot.waitSignal(table.ready, timeout=60_000):
        table.set_listing(listing(long), "", FOLDER)
        table.check("none")  # too early, and harmless
        assert table.files == ()
    assert [row.title for row in table.rows] == [*sorted(LISTS["shards"]), "config.json"]
    assert len(table.files) == len(long) and table.holds_weights
    table.set_listing(listing(long))
    table.set_listing(None)
    assert not table.busy and table.rowCount() == 0


def test_what_is_checked_adds_up(qtbot: QtBot) -> None:
    """The sums that are kept are those that adding up gives, also of a projector that goes with several models."""
    paths = [
        "a-Q4_K_M.gguf",
        "b-Q8_0-00001-of-00002.gguf",
        "b-Q8_0-00002-of-00002.gguf",
        "c-F16.gguf",
        "mmproj-F16.gguf",
        "x.txt",
        "y.json",
    ]
    inside, outside = f"{FOLDER}{os.sep}", "/elsewhere/"
    for _ in range(20):
        here = {path: random.choice((inside, outside)) + path for path in paths if random.random() < 0.5}
        known = listing(paths, here)
        table = FileTable(lambda _: FITS)
        table.set_listing(known, "", FOLDER)
        for _ in range(30):
            if random.random() < 0.2:
                table.check(random.choice(("usual", "all", "none")))
            else:
                cell = table.index(random.randrange(table.rowCount()), hub_tables.FILE)
                state = random.choice((Qt.CheckState.Checked, Qt.CheckState.Unchecked))
                table.setData(cell, state, Qt.ItemDataRole.CheckStateRole)
            files = table.files
            in_place = sum(f.size for f in files if here.get(f.path, "").startswith(inside))
            assert table.bytes == sum(f.size for f in files) and table.any_chosen == bool(files)
            assert table.in_place == in_place
            assert table.elsewhere == sum(f.size for f in files if f.path in here) - in_place
