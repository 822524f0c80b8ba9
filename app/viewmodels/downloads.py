"""The download queue as the window drives it: who runs, how fast, what comes next."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import msgspec
from PySide6.QtCore import QObject, QTimer, Signal, Slot

from app.core.errors import ErrorKind, WeftError
from app.hub.files import DownloadResult, Listing, RemoteFile
from app.hub.places import folder_for
from app.store.downloads import Download, DownloadState, DownloadStore
from app.viewmodels.background import Background
from app.viewmodels.download_files import Wanted, check_wanted, remove_leftovers, title_of
from app.viewmodels.download_row import Row
from app.viewmodels.settings import SettingsView
from app.viewmodels.transfer_rates import Speed, shares

if TYPE_CHECKING:
    from app.workers.download_worker import DownloadWorker

TICK_MS = 500
CLOSE_MS = 5000
# Seconds until a download that the network ended is tried again, without anybody saying so; the last for ever.
TRY_AGAIN = (15.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Downloads(QObject):
    """The queue.

    Args:
        make_worker: makes the worker of a download, not started.
        models, adapters: the libraries' own folders.

    Signals:
        changed: rows came, went, or changed their state. progressed: figures are newer.
        added(Download); refused(WeftError): the answer to `add`.
        finished(Download): complete and verified. broke(Download, WeftError): it failed, or is still waiting for the
        network after many tries. idle: nothing runs or waits any more.
    """

    changed = Signal()
    progressed = Signal()
    added = Signal(object)
    refused = Signal(object)
    finished = Signal(object)
    broke = Signal(object, object)
    idle = Signal()

    def __init__(
        self,
        store: DownloadStore,
        settings: SettingsView,
        *,
        make_worker: Callable[[Download], DownloadWorker],
        models: Path,
        adapters: Path,
        parent: QObject | None = None,
    ) -> None:
        super().__init__(parent)
        self._store = store
        self._settings = settings
        self._make_worker = make_worker
        self._models, self._adapters = models, adapters
        self._work = Background(self)
        self._work.done.connect(self._worked)
        self._tick = QTimer(self)
        self._tick.setInterval(TICK_MS)
        self._tick.timeout.connect(self._on_tick)
        self._closing = False
        self._ending: list[DownloadWorker] = []  # have said how it ended; their threads are about to
        self._adding: list[Wanted] = []  # are being checked, and not yet rows
        self.rows: list[Row] = []
        settings.changed.connect(self._setting_changed)

    def open(self) -> None:
        """Take up the queue where it was left."""
        self._store.requeue_interrupted()
        self.rows = [Row(download) for download in self._store.downloads()]
        self.changed.emit()
        self._fill()

    def close(self) -> None:
        """Stop what runs and wait for it: the window is going. It goes on from there next time."""
        self._closing = True
        self._tick.stop()
        running = [row.worker for row in self.rows if row.worker is not None]
        for worker in running:
            worker.stop()
        for worker in [*running, *self._ending]:
            worker.wait(CLOSE_MS)
        self._work.close()

    # What there is ----------------------------------------------------------------------------------

    def row(self, download: int) -> Row | None:
        return next((row for row in self.rows if row.download.id == download), None)

    @property
    def running(self) -> list[Row]:
        return [row for row in self.rows if row.worker is not None]

    @property
    def active(self) -> list[Row]:
        """What runs or waits for its turn."""
        return [row for row in self.rows if row.state.active]

    @property
    def fraction(self) -> float | None:
        """Of all that runs or waits, by bytes; None when nothing does."""
        active = self.active
        total = sum(row.download.total for row in active)
        return (sum(row.done for row in active) / total if total else 0.0) if active else None

    @property
    def speed(self) -> float:
        return sum(row.speed.now for row in self.running)

    @property
    def left(self) -> float | None:
        """Seconds for all that runs or waits, at the speed of now."""
        speed, rest = self.speed, sum(row.download.total - row.done for row in self.active)
        return rest / speed if speed > 1 and rest > 0 else None

    def folder(self, listing: Listing) -> Path:
        """Where the files of a repository go."""
        downloads = self._settings.now.downloads
        return folder_for(listing, Path(downloads) if downloads else self._models, self._adapters)

    # Adding -----------------------------------------------------------------------------------------

    def add(self, listing: Listing, files: Sequence[RemoteFile], *, copies: bool = True) -> None:
        """Put files into the queue; `added` or `refused` follows.

        Args:
            copies: take files that lie on this machine already instead of fetching them, where they prove right.
        """
        chosen = tuple(files)
        folder = self.folder(listing)
        if (row := self._same(folder, listing, chosen)) is not None:
            self.resume([row.download.id])
            self.added.emit(row.download)
            return
        own = f"{folder}{os.sep}"  # what lies there already is compared in its place
        here = {path: place for path, place in listing.here.items() if copies and not place.startswith(own)}
        wanted = Wanted(folder, chosen, here)
        if any(wanted == waiting for waiting in self._adding):
            return  # pressed twice: the answer to the first time comes yet
        queued = [Wanted(Path(row.download.folder), row.download.files, row.download.here) for row in self.active]
        queued += self._adding
        self._adding.append(wanted)
        self._work.run(("add", wanted), lambda: self._stored(listing, wanted, queued))

    def _stored(self, listing: Listing, wanted: Wanted, queued: Sequence[Wanted]) -> Download:
        """In a thread of its own: there may be many thousand files, and slow drives."""
        check_wanted(wanted, queued)
        try:
            title = title_of(listing, wanted.files)
            return self._store.add(listing, wanted.files, str(wanted.folder), title, here=wanted.here)
        finally:
            self._store.release()

    def _same(self, folder: Path, listing: Listing, chosen: tuple[RemoteFile, ...]) -> Row | None:
        """The row that fetches just this already."""
        for row in self.rows:
            same = row.download.folder == str(folder) and row.download.commit == listing.commit
            if same and row.state is not DownloadState.DONE and set(row.download.files) == set(chosen):
                return row
        return None

    @Slot(object, object, object)
    def _worked(self, key: object, result: object, error: object) -> None:
        assert isinstance(key, tuple)
        if key[0] == "remove":
            if isinstance(error, WeftError):
                self.refused.emit(error)
            return
        self._adding.remove(key[1])
        if not isinstance(result, Download):
            self.refused.emit(error)
            return
        download = result
        self.rows.append(Row(download))
        self.changed.emit()
        self.added.emit(download)
        self._fill()

    # What a person does -----------------------------------------------------------------------------

    def pause(self, downloads: Sequence[int]) -> None:
        for row in self._listed(downloads):
            if row.worker is not None:
                row.wanted = DownloadState.PAUSED
                row.worker.stop()
            elif row.state is DownloadState.QUEUED:
                self._set(row, state=DownloadState.PAUSED)
        self._fill()

    def resume(self, downloads: Sequence[int]) -> None:
        """Let paused and failed ones take their turn again."""
        for row in self._listed(downloads):
            row.tries, row.not_before = 0, 0.0
            if row.worker is not None:
                row.wanted = DownloadState.QUEUED if row.wanted is not None else None
            elif row.state in (DownloadState.PAUSED, DownloadState.FAILED):
                self._set(row, state=DownloadState.QUEUED, failure="", message="", hint="")
        self._fill()

    def pause_all(self) -> None:
        self.pause([row.download.id for row in self.active])

    def resume_all(self) -> None:
        wanted = (DownloadState.PAUSED, DownloadState.FAILED)
        self.resume([row.download.id for row in self.rows if row.state in wanted or row.wanted is DownloadState.PAUSED])

    def cancel(self, downloads: Sequence[int], *, keep: bool) -> None:
        """Take downloads off the list. Complete files stay.

        Args:
            keep: leave what has arrived of incomplete files, so that the same download goes on from there.
        """
        for row in self._listed(downloads):
            if row.worker is not None:
                row.forget = keep
                row.worker.stop()
            else:
                self._forget(row, keep)
        self.changed.emit()
        self._fill()

    def clear_done(self) -> None:
        """Take the complete ones off the list."""
        self.cancel([row.download.id for row in self.rows if row.state is DownloadState.DONE], keep=True)

    def move(self, downloads: Sequence[int], step: int) -> None:
        """Move downloads up (negative) or down the queue; by the length of the queue means to its end."""
        chosen = set(downloads)
        order = list(self.rows)
        places = [place for place, row in enumerate(order) if row.download.id in chosen]
        for place in places if step < 0 else reversed(places):
            row = order.pop(place)
            target = place + step
            limit = (
                sum(1 for other in order[:place] if other.download.id in chosen)
                if step < 0
                else len(order) - sum(1 for other in order[place:] if other.download.id in chosen)
            )
            order.insert(max(limit, target) if step < 0 else min(limit, target), row)
        if [row.download.id for row in order] == [row.download.id for row in self.rows]:
            return
        self.rows = order
        try:
            self._store.reorder([row.download.id for row in order])
        except WeftError as error:
            self.refused.emit(error)
        self.changed.emit()
        self._fill()

    def set_limits(self, *, rate: int | None = None, at_once: int | None = None) -> None:
        """Change the limits; they hold at once."""
        if rate is not None:
            self._settings.set("download_rate", max(0, rate))
        if at_once is not None:
            self._settings.set("downloads_at_once", max(1, at_once))

    @property
    def rate(self) -> int:
        return self._settings.now.download_rate

    @property
    def at_once(self) -> int:
        return max(1, self._settings.now.downloads_at_once)

    # The machinery ----------------------------------------------------------------------------------

    def _listed(self, downloads: Sequence[int]) -> list[Row]:
        wanted = set(downloads)
        return [row for row in self.rows if row.download.id in wanted]

    def _set(self, row: Row, **fields: object) -> None:
        """Change a row, here and in the store; what the store cannot take still holds until the window closes."""
        row.download = msgspec.structs.replace(row.download, **fields)
        try:
            self._store.update(row.download.id, **fields)
        except WeftError as error:
            self.refused.emit(error)
        self.changed.emit()

    def _fill(self) -> None:
        """Start what may run; stop what is too much since the limit was lowered."""
        if self._closing:
            return
        kept = [row for row in self.running if row.wanted is None and row.forget is None]
        for row in kept[self.at_once :]:
            row.wanted = DownloadState.QUEUED
            row.worker.stop()  # type: ignore[union-attr]
        free = self.at_once - len(self.running)
        for row in list(self.rows):
            if free <= 0:
                break
            if row.state is DownloadState.QUEUED and row.worker is None and not row.waits:
                free -= self._start(row)
        waiting = any(row.waits for row in self.rows)
        if (self.running or waiting) and not self._tick.isActive():
            self._tick.start()

    def _start(self, row: Row) -> bool:
        try:
            worker = self._make_worker(row.download)
        except WeftError as error:
            self._fail(row, error)
            return False
        row.worker, row.speed, row.wanted = worker, Speed(), None
        worker.setParent(self)
        worker.ended.connect(self._ended)
        worker.finished.connect(self._gone)
        self._set(row, state=DownloadState.RUNNING, failure="", message="", hint="")
        self._share()
        worker.start()
        return True

    @Slot(object, object)
    def _ended(self, result: object, error: object) -> None:
        worker = self.sender()
        row = next((row for row in self.rows if row.worker is worker), None)
        if row is None or self._closing:
            return
        self._ending.append(cast("DownloadWorker", worker))
        done = row.done
        came = row.news.fetched if row.news is not None else 0
        row.worker = None
        row.download = msgspec.structs.replace(row.download, done=done)
        if isinstance(result, DownloadResult):
            row.forget = None
            kept = " ".join(f"Your own file is now {Path(place).name}." for place in result.kept)
            self._set(row, state=DownloadState.DONE, done=row.download.total, ended=time.time(), message=kept)
            self.finished.emit(row.download)
        elif row.forget is not None:
            self._forget(row, row.forget)
            self.changed.emit()
        elif row.wanted is not None:
            wanted, row.wanted = row.wanted, None
            self._set(row, state=wanted)
        elif isinstance(error, WeftError):
            self._trouble(row, error, came)
        self._share()
        self._fill()
        if not self.active:
            self.idle.emit()

    @Slot()
    def _gone(self) -> None:
        worker = cast("DownloadWorker | None", self.sender())
        if worker is None:
            return
        if worker in self._ending:
            self._ending.remove(worker)
        worker.deleteLater()

    def _trouble(self, row: Row, error: WeftError, came: int) -> None:
        if came:
            row.tries = 0
        if error.kind is ErrorKind.NETWORK:
            row.not_before = time.monotonic() + TRY_AGAIN[min(row.tries, len(TRY_AGAIN) - 1)]
            row.tries += 1
            self._set(row, state=DownloadState.QUEUED, message=error.message, hint=error.hint)
            if row.tries == len(TRY_AGAIN):  # once: somebody may want to look; it goes on trying all night
                self.broke.emit(row.download, error)
            return
        self._fail(row, error)

    def _fail(self, row: Row, error: WeftError) -> None:
        self._set(row, state=DownloadState.FAILED, failure=error.kind.value, message=error.message, hint=error.hint)
        self.broke.emit(row.download, error)

    def _forget(self, row: Row, keep: bool) -> None:
        try:
            self._store.remove(row.download.id)
        except WeftError as error:
            self.refused.emit(error)
            return
        self.rows.remove(row)
        if not keep and row.state is not DownloadState.DONE:
            download = row.download
            self._work.run(("remove", download), lambda: remove_leftovers(download))

    @Slot()
    def _on_tick(self) -> None:
        for row in self.running:
            news = row.news
            if news is not None:
                row.speed.add(news.fetched)
        self._share()
        if any(row.state is DownloadState.QUEUED and row.worker is None for row in self.rows):
            self._fill()
        self.progressed.emit()
        if not self.running and not any(row.waits for row in self.rows):
            self._tick.stop()

    def _share(self) -> None:
        """Divide the limit. What waits for the hub takes no part, and has its share ready for when it goes on."""
        running = self.running
        busy = [row for row in running if row.news is None or not row.news.waiting]
        rates = dict(zip(map(id, busy), shares(self.rate, [row.speed.now for row in busy]), strict=True))
        for row in running:
            row.worker.set_rate(rates.get(id(row), self.rate / len(running)))  # type: ignore[union-attr]

    @Slot(str)
    def _setting_changed(self, name: str) -> None:
        if name == "download_rate":
            self._share()
        elif name == "downloads_at_once":
            self._fill()
        if name in ("download_rate", "downloads_at_once"):
            self.changed.emit()
