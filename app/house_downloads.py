"""Downloads as a part of the composition root: the queue from the start, its window when it is first wanted."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from PySide6.QtCore import QObject, QSettings, Signal, Slot
from PySide6.QtWidgets import QWidget

from app.core.errors import ErrorKind, WeftError
from app.core.memory import Machine
from app.core.paths import Paths
from app.core.roots import RootKind, found_roots
from app.store.database import Database
from app.store.downloads import Download, DownloadStore
from app.store.secrets import TokenStore
from app.viewmodels.downloads import Downloads
from app.viewmodels.hub_queries import HubQueries
from app.viewmodels.settings import SettingsView
from app.views.page import Notice

if TYPE_CHECKING:
    from app.engine.client import EngineClient
    from app.views.downloads.window import DownloadsWindow
    from app.workers.download_worker import DownloadWorker


class DownloadsHouse(QObject):
    """Builds and ties the download manager.

    Signals:
        notice(Notice): for the main window. badge(float or None): progress of the queue for the rail.
        library_changed: something complete has appeared. settings_wanted: show the hub's settings.
    """

    notice = Signal(object)
    badge = Signal(object)
    library_changed = Signal()
    settings_wanted = Signal()

    def __init__(
        self,
        database: Database,
        settings: SettingsView,
        paths: Paths,
        *,
        machine: Callable[[], Machine],
        state: QSettings,
        parent: QObject | None = None,
    ) -> None:
        super().__init__(parent)
        self._paths = paths
        self._settings = settings
        self._machine = machine
        self._state = state
        self.tokens = TokenStore()
        self._store = DownloadStore(database)
        self.downloads = Downloads(
            self._store,
            settings,
            make_worker=self._worker,
            models=paths.models,
            adapters=paths.adapters,
            parent=self,
        )
        self.queries = HubQueries(
            settings,
            self.tokens,
            make_client=lambda: self._client("hub"),
            copy_roots=self._copy_roots,
            parent=self,
        )
        self._window: DownloadsWindow | None = None
        self.downloads.finished.connect(self._finished)
        self.downloads.broke.connect(self._broke)
        self.downloads.changed.connect(self._badge)
        self.downloads.progressed.connect(self._badge)

    def open(self) -> None:
        """Take up the queue where it was left."""
        self.downloads.open()

    def window(self) -> DownloadsWindow:
        """The window, built when it is first wanted."""
        if self._window is None:
            from app.viewmodels.fitting import judge
            from app.views.downloads.window import DownloadsWindow

            self._window = DownloadsWindow(
                self.downloads,
                self.queries,
                judge=lambda entry: judge(entry, self._machine()),
                endpoint=self._endpoint,
                state=self._state,
            )
            self._window.settings_wanted.connect(self.settings_wanted)
        return self._window

    @Slot()
    def show_window(self) -> None:
        self.window().open()

    def find(self, name: str) -> None:
        """Show what the hub has under a name: its files, or what is called alike. Nothing is fetched yet."""
        window = self.window()
        window.open()
        window.finder.field.setText(name)
        window.finder.go()

    def take_link(self, link: str) -> None:
        """A `weft://` link was opened."""
        self.window().take_link(link)

    def hub_section(self) -> QWidget:
        """The part of the Settings page about the hub."""
        from app.views.settings.hub_section import HubSection

        return HubSection(self._settings, self.tokens, self.queries)

    @Slot()
    def close_window(self) -> None:
        """The main window goes, and with it this one."""
        if self._window is not None:
            self._window.close()

    def close(self) -> None:
        """Stop what runs; it goes on from there next time."""
        if self._window is not None:
            self._window.close()
            self._window.deleteLater()
            self._window = None
        self.queries.close()
        self.downloads.close()

    # Inside -----------------------------------------------------------------------------------------

    def _client(self, log: str) -> EngineClient:
        from app.engine import launch  # the first paint does not wait for it

        return launch.own_engine(self._paths, log)

    def _worker(self, download: Download) -> DownloadWorker:
        from app.workers.download_worker import DownloadWorker

        return DownloadWorker(
            download,
            self._store,
            # A log for each place in the queue, not for each download: they are bounded, and so is their number.
            make_client=lambda: self._client(f"download-{download.id % 8}"),
            token=lambda endpoint: self.tokens.get(endpoint)[0],
            proxy=self._settings.now.proxy,
        )

    def _endpoint(self) -> str:
        return self._settings.now.hub_endpoint or os.environ.get("HF_ENDPOINT", "")

    def _copy_roots(self) -> list[str]:
        """Where copies of a hub's files may lie: the library, and the Hugging Face cache even if it is not indexed."""
        from app.store.refresh import library_roots

        roots = [root.path for root in library_roots(self._settings.now, self._paths)]
        roots += [root.path for root in found_roots() if root.kind is RootKind.HUGGING_FACE]
        return list(dict.fromkeys(roots))

    @Slot(object)
    def _finished(self, download: Download) -> None:
        self.library_changed.emit()
        what = "adapter" if download.kind == "adapter" else "model"
        if self._in_front:
            return
        self.notice.emit(
            Notice(
                text=f"{download.title} is downloaded and verified: it is in your {what} library.",
                tone="positive",
                important=True,
            )
        )

    @Slot(object, object)
    def _broke(self, download: Download, error: WeftError) -> None:
        if error.kind is ErrorKind.CANCELLED:
            return
        if self._in_front:
            return
        what = "still waits, and goes on trying." if download.state.active else "could not be downloaded."
        self.notice.emit(
            Notice(
                text=f"{download.title} {what} {error.message}",
                tone="warning" if download.state.active else "negative",
                action="Show",
                run=self.show_window,
                important=True,
            )
        )

    @property
    def _in_front(self) -> bool:
        """Whether the queue is what the person looks at: its rows say how downloads end, and the desktop is not bothered."""
        return self._window is not None and self._window.isActiveWindow()

    @Slot()
    def _badge(self) -> None:
        self.badge.emit(self.downloads.fraction)
