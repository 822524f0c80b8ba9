"""What a kill of the window, or children that die at once, do to the queue."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from app.core.errors import ErrorKind, WeftError
from app.core.paths import default_paths
from app.engine import launch
from app.engine.client import EngineClient
from app.hub.files import DownloadNews, Listing
from app.hub.part import arrived_bytes
from app.store.database import Database
from app.store.downloads import Download, DownloadState, DownloadStore
from app.store.secrets import TokenStore
from tests.fakes.hub import FakeHub
from tests.fakes.hub_kit import FILE, random_bytes, remote, sha256

MB = 1_000_000
ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.fault

# The window's part of a download, without a window: the queue, its worker, the child.
_WINDOW = """
import sys
from PySide6.QtCore import QCoreApplication
from app.core.paths import default_paths
from app.engine import launch
from app.store.database import Database
from app.store.downloads import DownloadStore
from app.store.settings import SettingsStore
from app.viewmodels.downloads import Downloads
from app.viewmodels.settings import SettingsView
from app.workers.download_worker import DownloadWorker
app = QCoreApplication([])
paths = default_paths()
store = DownloadStore(Database(paths.database))
make = lambda download: DownloadWorker(download, store, make_client=lambda: launch.own_engine(paths, "d"), token=lambda _: "")
queue = Downloads(store, SettingsView(SettingsStore(paths.settings)), make_worker=make, models=paths.models, adapters=paths.adapters)
queue.idle.connect(app.quit)
queue.open()
if queue.active:
    app.exec()
queue.close()
"""


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as made:
        yield made


@pytest.fixture
def store() -> Iterator[DownloadStore]:
    database = Database(default_paths().database)
    yield DownloadStore(database)
    database.close()


def queued(hub: FakeHub, store: DownloadStore, repo: str) -> Download:
    listing = Listing(
        repo=repo,
        revision="main",
        commit=hub.repos[repo].commit("main") or "",
        endpoint=hub.endpoint,
        files=(remote(hub, FILE, repo),),
    )
    return store.add(listing, listing.files, str(default_paths().models.joinpath(*repo.split("/"))), repo)


def window() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", _WINDOW], cwd=ROOT)


def test_a_kill_of_the_window_loses_nothing_and_leaves_no_child(hub: FakeHub, store: DownloadStore) -> None:
    for repo in ("user/one", "user/two"):
        hub.add(repo, {FILE: random_bytes(12 * MB)})
    hub.total_rate = 6 * MB
    first, second = queued(hub, store, "user/one"), queued(hub, store, "user/two")
    running = window()
    target = Path(first.folder) / FILE
    deadline = time.monotonic() + 60
    while arrived_bytes(target) < 4 * MB:
        assert time.monotonic() < deadline and running.poll() is None
        time.sleep(0.01)
    children = psutil.Process(running.pid).children(recursive=True)
    assert children
    os.kill(running.pid, signal.SIGKILL)
    running.wait(10)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive, "a child goes on fetching for nobody"
    assert {row.id for row in store.downloads()} == {first.id, second.id}
    assert store.get(first.id).state is DownloadState.RUNNING and not target.exists()
    hub.total_rate = 0
    again = window()
    assert again.wait(60) == 0
    assert [row.state for row in store.downloads()] == [DownloadState.DONE] * 2
    for row in store.downloads():
        assert sha256(Path(row.folder) / FILE) == row.files[0].sha256
    assert hub.fetched() <= 24 * MB + 2 * 8 * 2**20


def test_children_that_die_at_once_are_given_up_even_after_one_that_brought_something(
    hub: FakeHub, store: DownloadStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from app.workers import download_worker
    from app.workers.download_worker import DownloadWorker

    monkeypatch.setattr(download_worker, "_PAUSE", 0.0)
    hub.add("user/one", {FILE: random_bytes(MB)})
    worker = DownloadWorker(queued(hub, store, "user/one"), store, make_client=_never, token=lambda _: "")
    lives: list[int] = []

    def die(_client: EngineClient, _token: str) -> None:
        lives.append(1)
        assert len(lives) < 20, "it is started again and again"
        if len(lives) == 1:
            worker.latest = DownloadNews(fetched=MB)
            worker._came = MB
        raise WeftError(ErrorKind.CRASHED, "It ended.", "")

    monkeypatch.setattr(worker, "_run_child", die)
    with pytest.raises(WeftError) as caught:
        worker._fetch()
    assert caught.value.kind is ErrorKind.CRASHED
    assert len(lives) == 1 + 1 + download_worker._RESTARTS


def _never() -> EngineClient:
    return launch.own_engine(default_paths(), "never")  # made, and never started


@pytest.mark.attack
def test_what_cannot_be_a_token_is_never_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    import keyring
    from keyring.backends import fail

    monkeypatch.setattr(keyring.core, "_keyring_backend", fail.Keyring())
    for text in ("hf_two\nlines", "hf_é", "hf_" + "x" * 2000, "  "):
        monkeypatch.setenv("HF_TOKEN", text)
        assert TokenStore().get() == ("", "")
    monkeypatch.setenv("HF_TOKEN", " hf_good\n")
    assert TokenStore().get() == ("hf_good", "environment")
    assert TokenStore().get("https://other.example") == ("", "")


def test_a_keyring_that_keeps_a_token_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import keyring
    from keyring.backends import fail

    class Locked(fail.Keyring):
        def get_password(self, service: str, username: str) -> str:
            return "hf_kept"

        def delete_password(self, service: str, username: str) -> None:
            raise OSError("locked")

    monkeypatch.setattr(keyring.core, "_keyring_backend", Locked())
    with pytest.raises(WeftError) as caught:
        TokenStore().set("")
    assert caught.value.kind is ErrorKind.PERMISSION and "hf_" not in str(caught.value)
    monkeypatch.setattr(keyring.core, "_keyring_backend", fail.Keyring())
    assert TokenStore().set("") == ""
