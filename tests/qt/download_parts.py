"""A download manager on a fake hub, with real child processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PySide6.QtCore import QSettings
from pytestqt.qtbot import QtBot

from app.core.paths import default_paths
from app.engine import launch
from app.engine.client import EngineClient
from app.hub.files import Listing
from app.store.database import Database
from app.store.downloads import Download, DownloadStore
from app.store.secrets import TokenStore
from app.store.settings import SettingsStore
from app.viewmodels.downloads import Downloads
from app.viewmodels.fitting import judge
from app.viewmodels.hub_queries import HubQueries
from app.viewmodels.settings import SettingsView
from app.views.downloads.window import DownloadsWindow
from app.workers.download_worker import DownloadWorker
from tests.fakes.hub import FakeHub
from tests.fakes.hub_kit import remote

WAIT = 30_000


class Manager:
    """Everything between the store and the window."""

    def __init__(self, hub: FakeHub, token: str = "") -> None:
        self.hub = hub
        self.paths = default_paths()
        self.database = Database(self.paths.database)
        self.store = DownloadStore(self.database)
        self.settings_store = SettingsStore(self.paths.settings)
        self.settings = SettingsView(self.settings_store)
        self.settings.set("hub_endpoint", hub.endpoint)
        self.tokens = TokenStore()
        self.token = token
        self.clients: list[EngineClient] = []
        self.downloads = Downloads(
            self.store, self.settings, make_worker=self._worker, models=self.paths.models, adapters=self.paths.adapters
        )
        self.queries = HubQueries(
            self.settings, self.tokens, make_client=lambda: launch.own_engine(self.paths, "hub"), copy_roots=list
        )
        self.window: DownloadsWindow | None = None

    def _worker(self, download: Download) -> DownloadWorker:
        def client() -> EngineClient:
            self.clients.append(launch.own_engine(self.paths, f"download-{download.id}"))
            return self.clients[-1]

        return DownloadWorker(download, self.store, make_client=client, token=lambda _: self.token)

    def listing(self, repo: str = "user/tiny", kind: str = "model") -> Listing:
        """As the hub would answer."""
        files = self.hub.repos[repo].revisions["main"]
        return Listing(
            repo=repo,
            revision="main",
            commit=self.hub.repos[repo].commit("main") or "",
            endpoint=self.hub.endpoint,
            files=tuple(remote(self.hub, path, repo) for path in files),
            kind=kind,
        )

    def add(self, qtbot: QtBot, repo: str = "user/tiny") -> int:
        """Queue all files of a repository. Returns the download's id."""
        listing = self.listing(repo)
        with qtbot.waitSignal(self.downloads.added, timeout=WAIT) as got:
            self.downloads.add(listing, listing.files)
        return got.args[0].id

    def open_window(self, qtbot: QtBot, endpoint: Callable[[], str] | None = None) -> DownloadsWindow:
        from app.engine import machine

        here = machine.probe()
        self.window = DownloadsWindow(
            self.downloads,
            self.queries,
            judge=lambda entry: judge(entry, here),
            endpoint=endpoint or (lambda: self.hub.endpoint),
            state=QSettings(str(self.paths.config / "window.ini"), QSettings.Format.IniFormat),
        )
        qtbot.addWidget(self.window)
        self.window.open()
        return self.window

    def folder(self, repo: str = "user/tiny") -> Path:
        return self.paths.models.joinpath(*repo.split("/"))

    def close(self) -> None:
        if self.window is not None:
            self.window.close()
        self.downloads.close()
        self.queries.close()
        self.database.close()


@contextmanager
def manager(hub: FakeHub, token: str = "") -> Iterator[Manager]:
    made = Manager(hub, token)
    try:
        yield made
    finally:
        made.close()
