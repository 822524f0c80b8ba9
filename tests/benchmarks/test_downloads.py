"""Downloads against curl, on loopback, interleaved: a verified gigabyte, and what the window pays while four run."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from pytestqt.qtbot import QtBot

from app.engine.client import EngineClient
from app.hub.files import Listing, RemoteFile
from tests.fakes.hub_kit import run_task, task_child
from tests.qt.download_parts import WAIT, Manager

GB = 1_000_000_000
ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.bench


@pytest.fixture(scope="module")
def gigabyte(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("gigabyte")
    if shutil.disk_usage(folder).free < 5 * GB:
        pytest.skip("needs 5 GB of disk")
    path = folder / "source"
    piece = os.urandom(10_000_000)
    with path.open("wb") as file:
        for _ in range(100):
            file.write(piece)
    yield path
    shutil.rmtree(folder)


@contextlib.contextmanager
def serving(path: Path, rate: float, copies: int = 1) -> Iterator[dict[str, Any]]:
    """A hub in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.fakes.hub_process", str(path), str(copies), str(rate)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdin is not None
    try:
        yield json.loads(process.stdout.readline())
    finally:
        process.stdin.close()
        process.wait(10)
        process.stdout.close()


def curl(hub: dict[str, Any], target: Path) -> float:
    """Seconds that curl takes for the file, unverified."""
    url = f"{hub['endpoint']}/user/m0/resolve/{hub['commits'][0]}/model.gguf"
    started = time.monotonic()
    subprocess.run(["curl", "-sSfL", "-o", target, url], check=True)
    taken = time.monotonic() - started
    assert target.stat().st_size == hub["size"]
    target.unlink()
    return taken


def ours(child: EngineClient, hub: dict[str, Any], folder: Path) -> float:
    """Seconds from the command to a verified file under its final name, in a child that runs already."""
    file = remote_of(hub, 0)
    text = msgspec.json.encode(
        {
            "endpoint": hub["endpoint"],
            "repo": file.repo,
            "revision": "main",
            "commit": file.commit,
            "files": [file],
            "folder": str(folder),
        }
    ).decode()
    started = time.monotonic()
    result, _ = run_task(child, text)
    taken = time.monotonic() - started
    assert result.fetched == hub["size"]
    shutil.rmtree(folder)
    return taken


def remote_of(hub: dict[str, Any], number: int) -> RemoteFile:
    return RemoteFile(
        repo=f"user/m{number}", commit=hub["commits"][number], path="model.gguf", size=hub["size"], sha256=hub["sha256"]
    )


@pytest.mark.parametrize(("name", "rate", "least"), [("capped at 100 MB/s", 100e6, 0.97), ("uncapped", 0.0, 0.7)])
def test_a_verified_gigabyte_against_curl(gigabyte: Path, tmp_path: Path, name: str, rate: float, least: float) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl here to compare with")
    child = task_child(tmp_path / "child.log")
    child.start()
    try:
        with serving(gigabyte, rate) as hub:
            pairs = [
                (curl(hub, tmp_path / "curled"), ours(child, hub, tmp_path / "ours")) for _ in range(3 if rate else 5)
            ]
    finally:
        child.shutdown()
    ratios = [theirs / mine for theirs, mine in pairs]
    ratio = statistics.median(ratios)
    print(f"\n{name}: 1 GB, curl unverified against Weft verified, seconds:")
    for theirs, mine in pairs:
        print(f"  curl {theirs:6.2f}   weft {mine:6.2f}   ratio {theirs / mine:.3f}")
    print(f"  median ratio {ratio:.3f} (wanted {least})")
    assert ratio >= least


def test_the_window_pays_little_while_four_run(gigabyte: Path, qtbot: QtBot) -> None:
    with serving(gigabyte, 80e6, copies=4) as served:

        class Served:
            endpoint = served["endpoint"]

        here = Manager(Served())  # type: ignore[arg-type]
        try:
            here.downloads.open()
            here.downloads.set_limits(at_once=4)
            window = here.open_window(qtbot)
            for number in range(4):
                file = remote_of(served, number)
                listing = Listing(
                    repo=file.repo, revision="main", commit=file.commit, endpoint=served["endpoint"], files=(file,)
                )
                with qtbot.waitSignal(here.downloads.added, timeout=WAIT):
                    here.downloads.add(listing, [file])
            qtbot.waitUntil(lambda: len(here.downloads.running) == 4 and here.downloads.speed > 20e6, timeout=WAIT)
            qtbot.wait(2000)
            process = psutil.Process()
            before, started = process.cpu_times(), time.monotonic()
            first = sum(row.done for row in here.downloads.rows)
            # Not qtbot.wait: it polls, and it is the window that is measured.
            from PySide6.QtCore import QEventLoop, QTimer

            loop = QEventLoop()
            QTimer.singleShot(8000, loop.quit)
            loop.exec()
            after, passed = process.cpu_times(), time.monotonic() - started
            speed = (sum(row.done for row in here.downloads.rows) - first) / passed
            share = (after.user + after.system - before.user - before.system) / passed
            print(f"\nfour downloads at {speed / 1e6:.0f} MB/s together: the window takes {share:.2%} of a core")
            assert window.isVisible() and speed > 20e6
            assert share < 0.03
            here.downloads.cancel([row.download.id for row in here.downloads.rows], keep=False)
            qtbot.waitUntil(lambda: not here.downloads.rows, timeout=WAIT)
        finally:
            here.close()
