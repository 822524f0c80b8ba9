"""The download queue: real children, a fake hub, and everything that a person does to a queue."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from PySide6.QtCore import Qt
from pytestqt.qtbot import QtBot

from app.core.errors import ErrorKind
from app.core.scan import scan
from app.hub.files import DownloadNews
from app.store.downloads import DownloadState
from app.viewmodels import download_files
from app.viewmodels import downloads as downloads_module
from app.viewmodels.download_row import Row
from app.viewmodels.download_table import NAME, PROGRESS, DownloadTable, file_text, text_of
from tests.fakes.hub import FakeHub, Fault
from tests.fakes.hub_kit import random_bytes, sha256
from tests.qt.download_parts import WAIT, Manager, manager

MB = 1_000_000


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as made:
        yield made


@pytest.fixture
def here(hub: FakeHub, qapp: object) -> Iterator[Manager]:
    with manager(hub) as made:
        made.downloads.open()
        yield made


def state(here: Manager, download: int) -> DownloadState:
    row = here.downloads.row(download)
    assert row is not None
    return row.state


def until(qtbot: QtBot, here: Manager, download: int, wanted: DownloadState) -> None:
    qtbot.waitUntil(lambda: state(here, download) is wanted, timeout=WAIT)


def arrived(here: Manager, download: int) -> int:
    row = here.downloads.row(download)
    return row.done if row is not None else 0


def test_a_download_ends_verified_and_says_so(qtbot: QtBot, hub: FakeHub, here: Manager) -> None:
    data = random_bytes(3 * MB)
    hub.add("user/tiny", {"tiny.Q4_K_M.gguf": data})
    with qtbot.waitSignal(here.downloads.finished, timeout=WAIT) as got:
        download = here.add(qtbot)
    assert got.args[0].title == "user/tiny Q4_K_M"
    assert (here.folder() / "tiny.Q4_K_M.gguf").read_bytes() == data
    assert here.store.get(download).state is DownloadState.DONE
    assert not here.downloads.running and here.downloads.fraction is None


def test_pause_keeps_what_came_and_resume_goes_on_from_there(qtbot: QtBot, hub: FakeHub, here: Manager) -> None:
    hub.total_rate = 3 * MB
    hub.add("user/tiny", {"model.gguf": random_bytes(9 * MB)})
    download = here.add(qtbot)
    qtbot.waitUntil(lambda: arrived(here, download) > 3 * MB, timeout=WAIT)
    here.downloads.pause([download])
    until(qtbot, here, download, DownloadState.PAUSED)
    assert here.store.get(download).state is DownloadState.PAUSED
    assert not (here.folder() / "model.gguf").exists()
    hub.total_rate = 0
    here.downloads.resume([download])
    until(qtbot, here, download, DownloadState.DONE)
    assert hub.fetched() <= 9 * MB + 8 * 2**20
    assert hub.fetched() < 13 * MB  # and really not twice
    assert sha256(here.folder() / "model.gguf") == hub.repos["user/tiny"].revisions["main"]["model.gguf"].sha256


def test_what_is_not_complete_is_not_in_the_library(qtbot: QtBot, hub: FakeHub, here: Manager) -> None:
    from app.core.paths import resources

    starter = resources() / "starter" / "model"
    hub.total_rate = 4 * MB
    hub.add("user/tiny", {path.name: path for path in starter.iterdir() if path.is_file()})
    download = here.add(qtbot)
    seen = 0
    while state(here, download) is not DownloadState.DONE:
        found = list(scan([here.paths.models]))
        # Between its last file and the child's word that it is done it may be seen, whole.
        whole = all((here.folder() / name).exists() for name in hub.repos["user/tiny"].revisions["main"])
        assert whole or found == []
        seen += 1
        qtbot.wait(50)
    assert seen > 3
    assert [entry.name for entry in scan([here.paths.models])] == ["user/tiny"]


@pytest.mark.fault
def test_quitting_and_starting_again_goes_on(qtbot: QtBot, hub: FakeHub, qapp: object) -> None:
    hub.total_rate = 3 * MB
    hub.add("user/tiny", {"model.gguf": random_bytes(9 * MB)})
    hub.add("user/other", {"other.gguf": random_bytes(MB)})
    with manager(hub) as before:
        before.downloads.open()
        before.downloads.set_limits(at_once=1)
        download, waiting = before.add(qtbot), before.add(qtbot, "user/other")
        qtbot.waitUntil(lambda: arrived(before, download) > 3 * MB, timeout=WAIT)
    hub.total_rate = 0
    with manager(hub) as after:
        assert [row.id for row in after.store.downloads()] == [download, waiting]
        after.downloads.open()
        until(qtbot, after, waiting, DownloadState.DONE)
        until(qtbot, after, download, DownloadState.DONE)
    assert hub.fetched("model.gguf") <= 9 * MB + 8 * 2**20


@pytest.mark.fault
def test_a_killed_child_is_started_again_and_goes_on(qtbot: QtBot, hub: FakeHub, here: Manager) -> None:
    hub.total_rate = 3 * MB
    hub.add("user/tiny", {"model.gguf": random_bytes(9 * MB)})
    download = here.add(qtbot)
    qtbot.waitUntil(lambda: arrived(here, download) > 3 * MB, timeout=WAIT)
    os.kill(here.clients[-1].pid, signal.SIGKILL)
    hub.total_rate = 0
    until(qtbot, here, download, DownloadState.DONE)
    assert len(here.clients) == 2
    assert hub.fetched() <= 9 * MB + 8 * 2**20


@pytest.mark.parametrize("keep", [True, False])
def test_cancel_with_and_without_keeping_what_came(qtbot: QtBot, hub: FakeHub, here: Manager, keep: bool) -> None:
    hub.total_rate = 3 * MB
    hub.add("user/tiny", {"model.gguf": random_bytes(9 * MB)})
    download = here.add(qtbot)
    qtbot.waitUntil(lambda: arrived(here, download) > 3 * MB, timeout=WAIT)
    here.downloads.cancel([download], keep=keep)
    qtbot.waitUntil(lambda: here.downloads.row(download) is None, timeout=WAIT)
    assert here.store.downloads() == []
    part = here.folder() / "model.gguf.part"
    if not keep:
        qtbot.waitUntil(lambda: not here.folder().exists(), timeout=WAIT)
        return
    assert part.exists()
    before = hub.fetched()
    hub.total_rate = 0
    again = here.add(qtbot)
    until(qtbot, here, again, DownloadState.DONE)
    assert hub.fetched() - before < 7 * MB


def test_only_so_many_at_once_and_the_limit_holds_while_they_run(qtbot: QtBot, hub: FakeHub, here: Manager) -> None:
    hub.total_rate = 8 * MB
    for number in range(4):
        hub.add(f"user/m{number}", {f"m{number}.gguf": random_bytes(5 * MB)})
    here.downloads.set_limits(at_once=3)
    ids = [here.add(qtbot, f"user/m{number}") for number in range(4)]
    assert len(here.downloads.running) == 3
    here.downloads.set_limits(at_once=1)
    qtbot.waitUntil(lambda: len(here.downloads.running) == 1, timeout=WAIT)
    # The last ones wait for their turn, they are not paused.
    assert state(here, ids[0]) is DownloadState.RUNNING
    assert [state(here, other) for other in ids[1:]] == [DownloadState.QUEUED] * 3
    here.downloads.set_limits(at_once=4)
    qtbot.waitUntil(lambda: len(here.downloads.running) == 4, timeout=WAIT)
    hub.total_rate = 0
    for download in ids:
        until(qtbot, here, download, DownloadState.DONE)


def test_the_speed_limit_holds_at_once_and_for_all_together(qtbot: QtBot, hub: FakeHub, here: Manager) -> None:
    for number in range(2):
        hub.add(f"user/m{number}", {f"m{number}.gguf": random_bytes(16 * MB)})
    here.downloads.set_limits(rate=2 * MB, at_once=2)
    for number in range(2):
        here.add(qtbot, f"user/m{number}")
    qtbot.waitUntil(lambda: here.downloads.speed > MB / 2, timeout=WAIT)
    qtbot.wait(1000)
    first, started = sum(row.done for row in here.downloads.rows), time.monotonic()
    qtbot.wait(2000)
    rate = (sum(row.done for row in here.downloads.rows) - first) / (time.monotonic() - started)
    assert 0.4 * 2 * MB < rate < 1.7 * 2 * MB
    here.downloads.set_limits(rate=0)
    for row in here.downloads.rows:
        until(qtbot, here, row.download.id, DownloadState.DONE)


def test_what_waits_for_the_hub_leaves_its_share_of_the_limit(hub: FakeHub, here: Manager) -> None:
    hub.add("user/tiny", {"model.gguf": b"GGUF"})
    listing, rates = here.listing(), {}
    for waiting in ("", "The hub asks to slow down."):
        row = Row(here.store.add(listing, listing.files, f"/nowhere/{waiting}", "x"))
        row.worker = SimpleNamespace(  # type: ignore[assignment]
            latest=DownloadNews(waiting=waiting), set_rate=lambda rate, waiting=waiting: rates.update({waiting: rate})
        )
        here.downloads.rows.append(row)
    here.downloads.set_limits(rate=MB)
    assert list(rates.values()) == [MB, MB / 2]
    here.downloads.rows.clear()


def test_the_order_can_be_changed_and_is_kept(qtbot: QtBot, hub: FakeHub, here: Manager) -> None:
    hub.total_rate = MB
    for number in range(5):
        hub.add(f"user/m{number}", {f"m{number}.gguf": random_bytes(2 * MB)})
    here.downloads.set_limits(at_once=1)
    ids = [here.add(qtbot, f"user/m{number}") for number in range(5)]
    order = lambda: [row.download.id for row in here.downloads.rows]  # noqa: E731
    here.downloads.move([ids[3]], -2)
    assert order() == [ids[0], ids[3], ids[1], ids[2], ids[4]]
    here.downloads.move([ids[1], ids[4]], -1)
    assert order() == [ids[0], ids[1], ids[3], ids[4], ids[2]]
    here.downloads.move([ids[0], ids[3]], 100)
    assert order() == [ids[1], ids[4], ids[2], ids[0], ids[3]]
    here.downloads.move([ids[3]], -100)
    assert order() == [ids[3], ids[1], ids[4], ids[2], ids[0]]
    assert [download.id for download in here.store.downloads()] == order()


def test_the_same_thing_twice_is_one_download(qtbot: QtBot, hub: FakeHub, here: Manager) -> None:
    hub.total_rate = 4 * MB
    hub.add("user/tiny", {"model.gguf": random_bytes(4 * MB)})
    first, second = here.add(qtbot), here.add(qtbot)
    assert first == second
    until(qtbot, here, first, DownloadState.DONE)
    assert hub.fetched() == 4 * MB


def test_a_button_pressed_twice_adds_one_and_what_is_being_added_counts_for_the_drive(
    qtbot: QtBot, hub: FakeHub, here: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All before the first has been answered."""
    hub.total_rate = MB
    hub.add("user/tiny", {"model.gguf": random_bytes(4 * MB)})
    hub.add("user/more", {"more.gguf": random_bytes(4 * MB)})
    usage = type("Usage", (), {"free": download_files.SPARE + 6 * MB})()
    monkeypatch.setattr(download_files.shutil, "disk_usage", lambda _: usage)
    first, second = here.listing(), here.listing("user/more")
    with qtbot.waitSignal(here.downloads.refused, timeout=WAIT) as got:
        for listing in (first, first, second):
            here.downloads.add(listing, listing.files)
    assert got.args[0].kind is ErrorKind.DISK_FULL and "4.0 MB of that is spoken for" in got.args[0].message
    assert [row.download.repo for row in here.downloads.rows] == ["user/tiny"]


def test_what_is_there_already_does_not_count_for_the_drive(
    qtbot: QtBot, hub: FakeHub, here: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a download that waits: a file in its place, and a copy that is linked."""
    names = ("in-place.gguf", "copy.gguf", "rest.gguf")
    hub.add("user/tiny", {name: random_bytes(4 * MB) for name in names})
    hub.add("user/more", {"more.gguf": random_bytes(4 * MB)})
    listing, folder = here.listing(), here.folder()
    folder.mkdir(parents=True)
    (folder / "in-place.gguf").write_bytes(bytes(4 * MB))
    copy = here.paths.data / "copy.gguf"
    copy.write_bytes(bytes(4 * MB))
    monkeypatch.setattr(here.downloads, "_fill", lambda: None)  # everything waits
    usage = type("Usage", (), {"free": download_files.SPARE + 9 * MB})()
    monkeypatch.setattr(download_files.shutil, "disk_usage", lambda _: usage)
    with qtbot.waitSignal(here.downloads.added, timeout=WAIT):
        here.downloads.add(msgspec.structs.replace(listing, here={"copy.gguf": str(copy)}), listing.files)
    more = here.listing("user/more")
    with qtbot.waitSignal(here.downloads.added, timeout=WAIT):
        here.downloads.add(more, more.files)


def test_a_full_drive_is_said_before_anything_is_fetched(
    qtbot: QtBot, hub: FakeHub, here: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.total_rate = MB
    hub.add("user/tiny", {"model.gguf": random_bytes(4 * MB)})
    hub.add("user/more", {"more.gguf": random_bytes(4 * MB)})
    usage = type("Usage", (), {"free": download_files.SPARE + 6 * MB})()
    monkeypatch.setattr(download_files.shutil, "disk_usage", lambda _: usage)
    here.add(qtbot)
    listing = here.listing("user/more")
    with qtbot.waitSignal(here.downloads.refused, timeout=WAIT) as got:
        here.downloads.add(listing, listing.files)
    error = got.args[0]
    assert error.kind is ErrorKind.DISK_FULL
    assert "4.0 MB" in error.message and "queue" in error.message
    assert len(here.downloads.rows) == 1


def test_a_gated_repository_says_which_of_the_three_it_is(qtbot: QtBot, hub: FakeHub, qapp: object) -> None:
    hub.tokens |= {"hf_stranger": "stranger", "hf_friend": "friend"}
    hub.add("user/gated", {"model.gguf": random_bytes(MB)}, gated=True, accepted_tokens={"hf_friend"})
    hub.add("user/denied", {"model.gguf": random_bytes(MB)}, denied=True)
    for token, repo, words in (
        ("", "user/gated", "no token is set"),
        ("hf_stranger", "user/gated", "not accepted yet"),
        ("hf_stranger", "user/denied", "denied"),
    ):
        with manager(hub, token) as here:
            here.downloads.open()
            with qtbot.waitSignal(here.downloads.broke, timeout=WAIT) as got:
                download = here.add(qtbot, repo)
            assert words in got.args[1].message
            assert f"{hub.endpoint}/{repo}" in got.args[1].hint
            assert here.store.get(download).failure == ErrorKind.PERMISSION
            here.downloads.cancel([download], keep=False)
            here.token = "hf_friend"


def test_a_line_that_is_dead_is_tried_again_by_itself(
    qtbot: QtBot, hub: FakeHub, here: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads_module, "TRY_AGAIN", (0.5, 0.5))
    hub.add("user/tiny", {"model.txt": random_bytes(MB)})
    hub.misbehave(Fault("loop", times=60))
    told: list[object] = []
    here.downloads.broke.connect(lambda download, error: told.append(download.state))
    download = here.add(qtbot)
    row = here.downloads.row(download)
    assert row is not None
    qtbot.waitUntil(lambda: row.waits > 0, timeout=WAIT)
    assert "Tries again" in text_of(row, PROGRESS)
    qtbot.waitUntil(lambda: row.tries > 2, timeout=WAIT)  # it never gives up: a line may be dead all night
    assert told == [DownloadState.QUEUED]
    with hub._lock:
        hub._faults.clear()
    until(qtbot, here, download, DownloadState.DONE)


def test_no_token_reaches_database_log_or_arguments(qtbot: QtBot, hub: FakeHub, qapp: object) -> None:
    token = "hf_" + "secret" * 5
    hub.tokens[token] = "me"
    hub.total_rate = 3 * MB
    hub.add("user/tiny", {"model.gguf": random_bytes(3 * MB)}, gated=True, accepted_tokens={token})
    with manager(hub, token) as here:
        here.downloads.open()
        download = here.add(qtbot)
        qtbot.waitUntil(lambda: arrived(here, download) > MB, timeout=WAIT)
        pid = here.clients[-1].pid
        for name in ("cmdline", "environ"):
            assert token.encode() not in Path(f"/proc/{pid}/{name}").read_bytes()
        until(qtbot, here, download, DownloadState.DONE)
        here.settings_store.load()
    for path in here.paths.data.rglob("*"):
        if path.is_file() and path.suffix != ".gguf":
            assert token.encode() not in path.read_bytes(), path
    with sqlite3.connect(here.paths.database) as database:
        assert token not in "\n".join(database.iterdump())
    database.close()
    carried = [request for request in hub.requests if token in str(request.headers)]
    assert carried and all(request.host == f"127.0.0.1:{hub.port}" for request in carried)


def test_five_hundred_rows_stay_fluid(qtbot: QtBot, hub: FakeHub, here: Manager) -> None:
    hub.add("user/tiny", {"model.gguf": b"GGUF" * 1000})
    listing = here.listing()
    for number in range(500):
        here.store.add(listing, listing.files, f"/nowhere/{number}", f"user/model-{number}", state=DownloadState.PAUSED)
    here.downloads.open()
    window = here.open_window(qtbot)
    window.resize(1200, 800)
    table: DownloadTable = window.queue.table
    assert table.rowCount() == 500
    slowest = 0.0
    for step in range(100):
        begun = time.process_time()
        here.downloads.changed.emit()
        window.queue.view.verticalScrollBar().setValue(step * 200)
        window.queue.view.viewport().repaint()
        slowest = max(slowest, time.process_time() - begun)
    assert slowest < 0.25  # processor time: a frame or a few on a busy machine; seconds when every row is measured


def test_the_file_at_work_and_its_own_progress_are_shown(qtbot: QtBot, hub: FakeHub, here: Manager) -> None:
    hub.add("user/tiny", {"config.json": b"{}", "model.safetensors": random_bytes(3 * MB)})
    hub.total_rate = 2 * MB
    table = DownloadTable(here.downloads)
    download = here.add(qtbot)
    qtbot.waitUntil(lambda: arrived(here, download) > MB, timeout=WAIT)
    qtbot.waitUntil(lambda: "model.safetensors · " in file_text(here.downloads.rows[0]), timeout=WAIT)
    assert "of 3.0 MB" in file_text(here.downloads.rows[0])
    said = str(table.data(table.index(0, NAME), Qt.ItemDataRole.AccessibleTextRole))
    assert said.startswith("user/tiny, Downloading, model.safetensors")
    until(qtbot, here, download, DownloadState.DONE)
    assert file_text(here.downloads.rows[0]) == ""
