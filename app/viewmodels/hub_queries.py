"""Questions to the hub, asked by a child process that is kept while they come."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import msgspec
from PySide6.QtCore import QObject, QTimer, Signal, Slot

from app.core.errors import ErrorKind, WeftError
from app.core.jobs import Progress
from app.engine import protocol
from app.hub.files import Listing, SearchHit
from app.hub.reference import HubReference
from app.store.secrets import TokenStore
from app.viewmodels.background import Background
from app.viewmodels.settings import SettingsView

if TYPE_CHECKING:
    from app.engine.client import EngineClient
    from app.workers.engine_worker import EngineWorker

CLOSE_MS = 5000
ASKING = "Asking the hub"  # what the tasks say while nothing is amiss
IDLE_MS = 60_000  # the child goes after this long without a question


class HubQueries(QObject):
    """Search, file lists, whose token it is. A newer question of a kind takes the place of the older one.

    Args:
        make_client: makes the child, not started. copy_roots: where copies of files may lie.

    Signals:
        asking(bool): an answer is awaited. waits(str): why it takes longer, as "The hub asks to slow down …"; "" no more.
        searched(list of SearchHit); listed(Listing); user(str); failed(kind of question, WeftError).
    """

    asking = Signal(bool)
    waits = Signal(str)
    searched = Signal(list)
    listed = Signal(object)
    user = Signal(str)
    failed = Signal(str, object)

    def __init__(
        self,
        settings: SettingsView,
        tokens: TokenStore,
        *,
        make_client: Callable[[], EngineClient],
        copy_roots: Callable[[], list[str]],
        parent: QObject | None = None,
    ) -> None:
        super().__init__(parent)
        self._settings = settings
        self._tokens = tokens
        self._make_client = make_client
        self._copy_roots = copy_roots
        self._worker: EngineWorker | None = None
        self._ending: list[EngineWorker] = []
        self._asked: dict[int, str] = {}  # command to kind, of what is still wanted
        self._numbers: dict[str, int] = {}  # kind to the number of its latest question
        self._work = Background(self)
        self._work.done.connect(self._prepared)
        self._idle = QTimer(self)
        self._idle.setSingleShot(True)
        self._idle.setInterval(IDLE_MS)
        self._idle.timeout.connect(self.stop)

    def search(self, text: str, *, sort: str = "downloads", tags: tuple[str, ...] = (), limit: int = 100) -> None:
        self._ask("hub_search", {"text": text, "sort": sort, "tags": tags, "limit": limit})

    def list_files(self, reference: HubReference) -> None:
        self._ask("hub_files", {"reference": reference})

    def who(self, token: str) -> None:
        """Whose token this is; it need not be kept yet."""
        self._ask("hub_user", {"token": token})

    def forget(self, kind: str) -> None:
        """The answer to the latest question of this kind (a task's name) is no longer wanted."""
        self._numbers[kind] = self._numbers.get(kind, 0) + 1
        self._drop(kind)
        self.asking.emit(bool(self._asked))

    @Slot()
    def stop(self) -> None:
        """End the child; the next question starts another."""
        worker, self._worker = self._worker, None
        self._asked.clear()
        if worker is not None:
            self._ending.append(worker)
            worker.kill()

    def close(self) -> None:
        """For the window's end."""
        self.stop()
        for worker in self._ending:
            worker.wait(CLOSE_MS)
        self._work.close()

    # Inside -----------------------------------------------------------------------------------------

    def _ask(self, kind: str, parameters: dict[str, Any]) -> None:
        self._drop(kind)
        number = self._numbers[kind] = self._numbers.get(kind, 0) + 1
        self._idle.stop()
        self.asking.emit(True)
        endpoint = self._settings.now.hub_endpoint
        # The keyring may be slow, or ask to be unlocked: not in the window's thread. So may drives.
        self._work.run((kind, number, parameters), lambda: (self._tokens.get(endpoint)[0], self._copy_roots()))

    def _drop(self, kind: str) -> None:
        for command in [command for command, asked in self._asked.items() if asked == kind]:
            del self._asked[command]
            if self._worker is not None:
                self._worker.cancel(command)

    @Slot(object, object, object)
    def _prepared(self, key: object, result: object, error: object) -> None:
        assert isinstance(key, tuple)
        kind, number, parameters = key
        if number != self._numbers.get(kind):
            return
        if isinstance(error, WeftError):
            self._fail(kind, error)
            return
        assert isinstance(result, tuple)
        token, roots = result
        now = self._settings.now
        complete = {"endpoint": now.hub_endpoint, "proxy": now.proxy, "token": token, **parameters}
        if kind == "hub_files":
            complete["roots"] = roots
        try:
            text = msgspec.json.encode(complete).decode()
            self._asked[self._lane().send(protocol.RunTask(task=kind, parameters=text))] = kind
        except WeftError as dead:
            self._worker = None
            self._fail(kind, dead)

    def _lane(self) -> EngineWorker:
        if self._worker is None:
            from app.workers.engine_worker import EngineWorker

            worker = EngineWorker(self._make_client(), self)
            worker.progress.connect(self._progressed)
            worker.done.connect(self._done)
            worker.failed.connect(self._failed)
            worker.exited.connect(self._exited)
            worker.finished.connect(self._gone)
            self._worker = worker
            worker.start()
        return self._worker

    def _ended(self, command: int) -> str:
        if self.sender() is not self._worker:
            return ""
        kind = self._asked.pop(command, "")
        if not self._asked:
            self.asking.emit(False)
            self._idle.start()
        return kind

    @Slot(int, object)
    def _progressed(self, command: int, progress: Progress) -> None:
        if self.sender() is self._worker and self._asked.get(command, "hub_user") != "hub_user":
            self.waits.emit("" if progress.phase == ASKING else progress.phase)

    @Slot(int, object)
    def _done(self, command: int, result: object) -> None:
        kind = self._ended(command)
        if not kind or not isinstance(result, protocol.TaskResult):
            return
        if kind == "hub_search":
            self.searched.emit(msgspec.json.decode(result.json, type=list[SearchHit]))
        elif kind == "hub_files":
            self.listed.emit(msgspec.json.decode(result.json, type=Listing))
        else:
            self.user.emit(msgspec.json.decode(result.json, type=str))

    @Slot(int, object)
    def _failed(self, command: int, error: WeftError) -> None:
        kind = self._ended(command)
        if kind and error.kind is not ErrorKind.CANCELLED:
            self._fail(kind, error)

    @Slot(object)
    def _exited(self, _end: object) -> None:
        if self.sender() is self._worker:
            self._worker = None
            self._asked.clear()
            self.asking.emit(False)

    @Slot()
    def _gone(self) -> None:
        worker = cast("EngineWorker", self.sender())
        if worker in self._ending:
            self._ending.remove(worker)
        worker.deleteLater()

    def _fail(self, kind: str, error: WeftError) -> None:
        self.asking.emit(bool(self._asked))
        self.failed.emit(kind, error)
