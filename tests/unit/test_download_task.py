"""The download task in a real child process: killed at any moment, on a full disk, beside another one."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.core.errors import ErrorKind, WeftError
from app.core.scan import scan
from app.core.unfinished import pending_files
from app.engine import protocol
from app.hub.part import arrived_bytes
from tests.fakes.hub import FakeHub, Fault
from tests.fakes.hub_kit import FILE, parameters, random_bytes, run_task, sha256, task_child
from tests.fakes.proxy import FakeProxy

MB = 1_000_000
TWICE = 8 * 2**20  # bytes that a kill may cost
pytestmark = pytest.mark.fault


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as made:
        yield made


def download(hub: FakeHub, folder: Path, *paths: str, **more: object):
    """One child from start to end. Returns its result and what it told."""
    child = task_child(folder.parent / "child.log")
    child.start()
    try:
        return run_task(child, parameters(hub, folder, *paths, **more))
    finally:
        child.shutdown()


def killed_at(hub: FakeHub, folder: Path, target: Path, count: int, slow: int = 8 * MB) -> int:
    """Start a child and kill it once so much is on disk, and no more than a little. Returns the bytes that were.

    The hub slows down shortly before, so that the kill comes when it is meant to: also at 99 %.
    """
    child = task_child(folder.parent / "child.log")
    child.start()
    child.send(protocol.RunTask(task="download", parameters=parameters(hub, folder)))
    deadline = time.monotonic() + 60
    rate = hub.total_rate
    while arrived_bytes(target) < count:
        assert time.monotonic() < deadline and child.alive, (folder.parent / "child.log").read_text()
        assert not target.exists(), "it was complete before it could be killed"
        if hub.fetched() > count - 20 * MB:  # what lies in buffers is ahead of the disk
            hub.total_rate = min(rate, slow)
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    while child.alive:
        child.next_event(0.05)
    hub.total_rate = rate
    return arrived_bytes(target)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_killed_anywhere_it_goes_on_and_the_checksum_holds(hub: FakeHub, tmp_path: Path, share: float) -> None:
    size = 100 * MB  # a hundredth is more than one claim
    source = tmp_path / "source"
    with source.open("wb") as file:
        for _ in range(10):
            file.write(os.urandom(size // 10))
    hub.add("user/tiny", {FILE: source})
    hub.total_rate = 100 * MB
    folder = tmp_path / "models" / "user" / "tiny"
    target = folder / FILE
    kept = killed_at(hub, folder, target, int(size * share))
    print(f"killed at {kept / size:.1%}")
    assert size * share <= kept <= size * share + 4 * MB and kept < size
    assert not target.exists() and pending_files(folder) == {FILE}
    assert list(scan([tmp_path / "models"])) == []
    result, _ = download(hub, folder)
    assert sha256(target) == hub.repos["user/tiny"].revisions["main"][FILE].sha256
    assert hub.fetched() - size <= TWICE
    assert result.fetched <= size * (1 - share) + TWICE
    assert not pending_files(folder)


def test_killed_again_and_again_it_still_ends_right(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("user/tiny", {FILE: random_bytes(40 * MB)})
    hub.total_rate = 40 * MB
    folder = tmp_path / "tiny"
    for share in (0.1, 0.3, 0.35, 0.6, 0.9):
        killed_at(hub, folder, folder / FILE, int(40 * MB * share), slow=24 * MB)
    download(hub, folder)
    assert sha256(folder / FILE) == hub.repos["user/tiny"].revisions["main"][FILE].sha256
    assert hub.fetched() - 40 * MB <= 5 * TWICE


def test_complete_files_survive_a_kill_of_the_rest(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("user/tiny", {"a.txt": b"small", FILE: random_bytes(20 * MB)})
    hub.total_rate = 10 * MB
    folder = tmp_path / "tiny"
    child = task_child(tmp_path / "child.log")
    child.start()
    child.send(protocol.RunTask(task="download", parameters=parameters(hub, folder, "a.txt", FILE)))
    while arrived_bytes(folder / FILE) < 4 * MB:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    while child.alive:
        child.next_event(0.05)
    stamp = (folder / "a.txt").stat().st_mtime_ns
    hub.total_rate = 0
    result, _ = download(hub, folder, "a.txt", FILE)
    assert (folder / "a.txt").stat().st_mtime_ns == stamp
    assert hub.fetched("a.txt") == 0  # small files are not from the store
    assert len([r for r in hub.requests if r.method == "GET" and r.path.endswith("a.txt")]) == 1
    assert result.bytes == 20 * MB + 5


def test_two_processes_fetch_one_file_once(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("user/tiny", {FILE: random_bytes(12 * MB)})
    hub.total_rate = 8 * MB
    folder = tmp_path / "tiny"
    results: list[int] = []
    threads = [threading.Thread(target=lambda: results.append(download(hub, folder)[0].fetched)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(results) == [0, 12 * MB]
    assert hub.fetched() == 12 * MB


def test_a_speed_limit_can_be_changed_while_it_runs(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("user/tiny", {FILE: random_bytes(30 * MB)})
    child = task_child(tmp_path / "child.log")
    child.start()
    task = child.send(protocol.RunTask(task="download", parameters=parameters(hub, tmp_path / "tiny", rate=2 * MB)))
    started, changed = time.monotonic(), 0.0
    try:
        while True:
            event = child.next_event(30)
            child.raise_if_ended(task, event)
            came = arrived_bytes(tmp_path / "tiny" / FILE)
            if isinstance(event, protocol.News) and not changed and came > 5 * MB:
                assert came < 2 * MB * (time.monotonic() - started) + MB
                child.send(protocol.Adjust(target=task, parameters='{"rate": 0}'))
                changed = time.monotonic()
            if isinstance(event, protocol.Done):
                break
    finally:
        child.shutdown()
    assert changed and time.monotonic() - changed < 9  # what is left takes ten and more at the old rate


def test_a_limit_sent_before_the_task_begins_holds(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("user/tiny", {FILE: random_bytes(30 * MB)})
    child = task_child(tmp_path / "child.log")
    task = child.send(protocol.RunTask(task="download", parameters=parameters(hub, tmp_path / "tiny")))
    child.send(protocol.Adjust(target=task, parameters='{"rate": 1000000}'))
    child.start()
    time.sleep(2.5)
    assert arrived_bytes(tmp_path / "tiny" / FILE) < 6 * MB
    child.shutdown()


def test_cancel_is_heard_at_once_and_keeps_what_came(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("user/tiny", {FILE: random_bytes(20 * MB)})
    hub.misbehave(Fault("stall", path=FILE, after=3 * MB, seconds=30))
    child = task_child(tmp_path / "child.log")
    child.start()
    task = child.send(protocol.RunTask(task="download", parameters=parameters(hub, tmp_path / "tiny", timeout=20)))
    while arrived_bytes(tmp_path / "tiny" / FILE) < 2 * MB:
        time.sleep(0.02)
    child.cancel(task)
    started = time.monotonic()
    with pytest.raises(WeftError) as caught:
        while True:
            child.raise_if_ended(task, child.next_event(10))
    assert caught.value.kind is ErrorKind.CANCELLED
    assert time.monotonic() - started < 2.5  # by itself, not by the kill after three seconds
    assert child.alive
    child.shutdown()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mounts a small tmpfs")
def test_a_disk_that_is_full_keeps_earlier_files_and_goes_on_later(hub: FakeHub, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=90m", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no right to mount a small disk: {mounted.stderr.decode().strip()}")
    try:
        hub.add("user/tiny", {"first.gguf": random_bytes(9 * MB), FILE: random_bytes(12 * MB)})
        hub.total_rate = 10 * MB
        folder = disk / "tiny"
        download(hub, folder, "first.gguf")
        blocker = disk / "blocker"
        with blocker.open("wb") as file:
            file.write(bytes(shutil.disk_usage(disk).free - 70 * MB))
        with pytest.raises(WeftError, match="free") as caught:  # said before anything is fetched
            download(hub, folder)
        assert caught.value.kind is ErrorKind.DISK_FULL
        assert hub.fetched(FILE) == 0
        blocker.unlink()
        child = task_child(tmp_path / "child.log")
        child.start()
        task = child.send(protocol.RunTask(task="download", parameters=parameters(hub, folder)))
        while arrived_bytes(folder / FILE) < 2 * MB:
            time.sleep(0.01)
        with blocker.open("wb", buffering=0) as file, contextlib.suppress(OSError):  # somebody else takes the rest
            while file.write(bytes(MB)):
                pass
        with pytest.raises(WeftError) as caught:
            while True:
                child.raise_if_ended(task, child.next_event(20))
        child.shutdown()
        assert caught.value.kind is ErrorKind.DISK_FULL and "resume" in caught.value.hint
        assert sha256(folder / "first.gguf") == hub.repos["user/tiny"].revisions["main"]["first.gguf"].sha256
        assert not (folder / FILE).exists()
        blocker.unlink()
        download(hub, folder)
        assert sha256(folder / FILE) == hub.repos["user/tiny"].revisions["main"][FILE].sha256
        assert hub.fetched(FILE) <= 12 * MB + TWICE
    finally:
        subprocess.run(["umount", disk], check=False)


def test_copies_on_this_machine_serve_when_they_are_right(hub: FakeHub, tmp_path: Path) -> None:
    data = random_bytes(3 * MB)
    hub.add("user/tiny", {FILE: data})
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    right.write_bytes(data)
    wrong.write_bytes(bytes(len(data)))
    result, _ = download(hub, tmp_path / "one", here={FILE: str(right)})
    assert (result.fetched, result.reused) == (0, len(data))
    result, _ = download(hub, tmp_path / "two", here={FILE: str(wrong)})
    assert (result.fetched, result.reused) == (len(data), 0)
    assert (tmp_path / "one" / FILE).read_bytes() == (tmp_path / "two" / FILE).read_bytes() == data
    assert right.read_bytes() == data and wrong.read_bytes() == bytes(len(data))


def test_a_copy_on_the_same_drive_needs_no_room(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process: the drive is said to be nearly full."""
    from app.core.unfinished import DownloadNote
    from app.hub import fetch
    from app.hub.source import HttpSource
    from tests.fakes.hub_kit import remote

    data = random_bytes(2 * MB)
    hub.add("user/tiny", {FILE: data})
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    right.write_bytes(data)
    wrong.write_bytes(bytes(len(data)))
    usage = type("Usage", (), {"free": fetch.SPARE + MB})()
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: usage)
    source = HttpSource(hub.endpoint)
    bring = lambda here, name: fetch.Fetch(source, [remote(hub)], tmp_path / name, note=DownloadNote(), here=here).run()  # noqa: E731
    assert bring({FILE: str(right)}, "one").reused == len(data)
    for here in ({}, {FILE: str(wrong)}):
        with pytest.raises(WeftError) as caught:
            bring(here, "two")
        assert caught.value.kind is ErrorKind.DISK_FULL
    source.close()
    assert hub.fetched() == 0


def test_damage_on_a_drive_without_room_for_two_is_fetched_again_all_the_same(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from app.hub import transfer
    from tests.fakes.hub_kit import fetch

    data = random_bytes(2 * MB)
    hub.add("user/tiny", {FILE: data})
    hub.misbehave(Fault("corrupt", path=FILE, times=2))
    seen: list[list[str]] = []
    usage = type("Usage", (), {"free": transfer.SPARE + MB})()

    def used(folder: Path) -> object:
        seen.append(sorted(path.name for path in folder.iterdir()))
        return usage

    monkeypatch.setattr(transfer.shutil, "disk_usage", used)
    with pytest.raises(WeftError, match="damaged twice"):
        fetch(hub, tmp_path / FILE)
    assert f"{FILE}.damaged" in seen[0]
    assert fetch(hub, tmp_path / FILE).read_bytes() == data


def test_somebody_s_own_files_in_the_folder_are_not_overwritten(hub: FakeHub, tmp_path: Path) -> None:
    data = random_bytes(MB)
    hub.add("user/tiny", {FILE: data, "README.md": b"the hub's"})
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "README.md").write_bytes(b"my own notes")
    copy = tmp_path / "copy"
    copy.write_bytes(data)
    (folder / FILE).write_bytes(b"my own model")
    result, _ = download(hub, folder, FILE, "README.md", here={FILE: str(copy)})
    assert (folder / "README.md").read_bytes() == b"the hub's" and (folder / FILE).read_bytes() == data
    assert (folder / "README.md.old").read_bytes() == b"my own notes"
    assert (folder / f"{FILE}.old").read_bytes() == b"my own model"
    assert set(result.kept) == {str(folder / "README.md.old"), str(folder / f"{FILE}.old")}
    # A version that came from the hub and lies as it came is replaced by a newer one.
    hub.add("user/tiny", {FILE: data, "README.md": b"the hub's newer"})
    result, _ = download(hub, folder, FILE, "README.md")
    assert result.kept == () and (folder / "README.md").read_bytes() == b"the hub's newer"


def test_two_processes_that_fill_one_folder_leave_nothing_pending(hub: FakeHub, tmp_path: Path) -> None:
    """Each takes its files off the note that both write."""
    names = [f"{number}.txt" for number in range(60)]
    hub.add("user/tiny", {name: name.encode() for name in names})
    folder = tmp_path / "tiny"
    threads = [threading.Thread(target=download, args=(hub, folder, *names[half::2])) for half in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all((folder / name).read_bytes() == name.encode() for name in names)
    assert not pending_files(folder)


def test_two_processes_take_one_copy(hub: FakeHub, tmp_path: Path) -> None:
    data = random_bytes(20 * MB)
    hub.add("user/tiny", {FILE: data})
    copy = tmp_path / "copy"
    copy.write_bytes(data)
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / FILE).write_bytes(b"my own model")
    results: list[int] = []
    threads = [
        threading.Thread(target=lambda: results.append(download(hub, folder, here={FILE: str(copy)})[0].fetched))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [0, 0] and (folder / FILE).read_bytes() == data
    assert not pending_files(folder) and sorted(path.name for path in folder.iterdir()) == [
        ".weft-download.json",
        FILE,
        f"{FILE}.old",
    ]
    assert (folder / f"{FILE}.old").read_bytes() == b"my own model"


def test_a_copy_that_another_download_took_meanwhile_is_not_moved_away(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one ends between this one's look at the folder and its turn with the file."""
    from app.core.unfinished import DownloadNote
    from app.hub import fetch as module
    from app.hub.source import HttpSource
    from tests.fakes.hub_kit import remote

    data = random_bytes(MB)
    hub.add("user/tiny", {FILE: data})
    folder, copy = tmp_path / "tiny", tmp_path / "copy"
    folder.mkdir()
    (folder / FILE).write_bytes(b"my own model")
    copy.write_bytes(data)
    source = HttpSource(hub.endpoint)
    make = lambda: module.Fetch(source, [remote(hub)], folder, note=DownloadNote(), here={FILE: str(copy)})  # noqa: E731
    real, others = module.is_file, []

    def look(path: Path, *rest: Any) -> bool:
        if path == copy and not others:
            others.append(None)
            others[0] = make().run().kept
        return real(path, *rest)

    monkeypatch.setattr(module, "is_file", look)
    assert make().run().kept == () and others == [(str(folder / f"{FILE}.old"),)]
    source.close()
    assert {path.name for path in folder.iterdir()} == {".weft-download.json", FILE, f"{FILE}.old"}
    assert (folder / FILE).read_bytes() == data and (folder / f"{FILE}.old").read_bytes() == b"my own model"


def test_a_file_that_was_damaged_on_disk_is_found_and_fetched_again(hub: FakeHub, tmp_path: Path) -> None:
    data = random_bytes(2 * MB)
    hub.add("user/tiny", {FILE: data})
    folder = tmp_path / "tiny"
    download(hub, folder)
    (folder / FILE).write_bytes(bytes(len(data)))
    result, _ = download(hub, folder)
    assert result.fetched == len(data) and (folder / FILE).read_bytes() == data


@pytest.mark.attack
def test_names_from_the_hub_stay_in_the_folder(hub: FakeHub, tmp_path: Path) -> None:
    names = ["模型 é.gguf", "aux.json", "x" * 250 + ".bin", "a/b/c/d.txt"]
    hub.add("user/odd", {name: name.encode() for name in names})
    result, _ = download(hub, tmp_path / "odd", *names, repo="user/odd")
    for name, place in zip(names, result.paths, strict=True):
        assert Path(place).read_bytes() == name.encode()
        assert tmp_path / "odd" in Path(place).parents


def test_the_proxy_reaches_the_children_that_ask_and_fetch(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The settings' for one, the environment's for the other; what goes through it: test_hub_proxy.py."""
    hub.add("user/tiny", {FILE: random_bytes(MB), "notes.txt": b"plain files come from the hub itself"})
    hub.store_host = "store.example"
    with FakeProxy({"hub.example": hub.port, "store.example": hub.port}, "someone:secret") as proxy:
        address = proxy.address.replace("//", "//someone:secret@")
        monkeypatch.setenv("HTTP_PROXY", address)
        child = task_child(tmp_path / "child.log")
        child.start()
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
        other = task_child(tmp_path / "other.log")
        other.start()
        try:
            asked = {"reference": {"repo": "user/tiny"}, "endpoint": "http://hub.example"}
            list(child.call(protocol.RunTask(task="hub_files", parameters=json.dumps(asked))))
            text = parameters(hub, tmp_path / "tiny", FILE, "notes.txt", proxy=address)
            run_task(other, text.replace(hub.endpoint, "http://hub.example"))
        finally:
            child.shutdown()
            other.shutdown()
    assert (tmp_path / "tiny" / "notes.txt").exists() and (tmp_path / "tiny" / FILE).exists()
    assert len(proxy.seen) == len(hub.requests)
    assert "secret" not in (tmp_path / "child.log").read_text() + (tmp_path / "other.log").read_text()
