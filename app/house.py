"""House: the parts that live as long as the window, and the ties between them. Part of the composition root.

Built after the window's first paint. What they take from lies in `household.py`; what belongs to one topic (pages, engines,
downloads, …) in `house_<topic>.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from PySide6.QtCore import QTimer, Slot
from PySide6.QtWidgets import QApplication

from app import logs
from app.core.errors import WeftError
from app.core.paths import Paths
from app.house_commands import palette_commands
from app.house_engines import EnginesHouse
from app.house_exports import ExportHouse
from app.house_loras import LorasHouse
from app.house_notify import DesktopNotices
from app.house_pages import HousePages
from app.house_questions import HouseQuestions
from app.house_train import TrainHouse
from app.household import Household
from app.views import theme
from app.views.main_window import MainWindow
from app.views.page import Notice

SETTLE_MS = 40  # a timer of 0 would come before the first page's paint, which waits for the screen


class House(Household):
    """Builds the parts, ties them together, opens and closes.

    Args:
        window: a frame that is shown already; it is furnished here.
        reporter: brings unexpected exceptions here.
    """

    def __init__(
        self, application: QApplication, paths: Paths, window: MainWindow, look: theme.Theme, reporter: logs.Reporter
    ) -> None:
        super().__init__(application, paths, window, look)
        self._arguments: list[str] = []
        self.exports = ExportHouse(self)
        self.complete = self.exports.with_token
        self.loras = LorasHouse(self, self.exports)
        self.training = TrainHouse(self, self.loras)
        self.questions = HouseQuestions(window, self.loadout, self.environments, self.engines, paths.logs, self)
        self.pages = HousePages(self, self.exports, self.loras, self.training, self.questions)
        self.desktop = DesktopNotices(application, window)
        self.running = EnginesHouse(self)
        self._tie(reporter)

    # Opening and closing ----------------------------------------------------------------------------

    def open(self, arguments: Sequence[str] = ()) -> None:
        """Furnish the window; what its first page does not need starts after it is shown."""
        self._arguments = list(arguments)
        self.window.furnish(
            build=self.pages.build,
            header=self.pages.header,
            commands=partial(palette_commands, self, self.pages, self.exports),
            notify=self.desktop.tell,
            sort=self.loras.take,
        )
        QTimer.singleShot(SETTLE_MS, self, self._settle)

    @Slot()
    def _settle(self) -> None:
        """After the first paint: watch the disk and the machine, prepare engines, load the model."""
        from app.workers.library_worker import LibraryWorker

        if self.job_store.mark_interrupted():
            self.tasks.changed.emit()  # a page that was there at once shows them as running still
        worker = LibraryWorker(self.library, self.roots.roots(), self)
        worker.changed.connect(self._library_changed)
        worker.scanning.connect(self._scanning)
        worker.problem.connect(self._library_problem)
        self._library_worker = worker
        worker.start()
        self.machine.known.connect(self.running.machine_known)
        self.machine.start()
        self.downloads.open()
        self.exports.leftovers.look()
        for sentence in (self.database.notice, *self.settings.problems):
            if sentence:
                self.window.show_notice(Notice(text=sentence, tone="warning"))
        self._take(self._arguments)

    @Slot(list)
    def second_start(self, arguments: Sequence[str]) -> None:
        """Another start handed over its arguments."""
        self.window.come_to_front()
        self._take(arguments)

    def _take(self, arguments: Sequence[str]) -> None:
        for link in [argument for argument in arguments if "://" in argument][:4]:
            self.downloads.take_link(link)
        files = [Path(argument) for argument in arguments if "://" not in argument]
        if files and not self.window.take(files):
            self.window.show_notice(
                Notice(
                    text=f"Weft has no use for {files[0].name}. It opens models and adapters: folders, .gguf, .safetensors or .zip files.",
                    tone="warning",
                )
            )

    def close(self) -> None:
        """Stop every worker and let go of the files. Nothing runs on after this, whatever goes wrong on the way."""
        worker = self._library_worker
        for what, step in (
            ("the pages", self.window.close_pages),
            ("the loaded model", self.loadout.close),
            ("downloads", self.downloads.close),
            ("adapters being added", self.loras.close),
            ("previews", self.training.close),
            ("long tasks", self.tasks.close),
            ("jobs", self.jobs.close),
            ("what exports have under way", self.exports.close),
            ("engine environments", self.engines.close),
            ("the machine's figures", self.machine.close),
            ("the library", worker.stop if worker is not None else None),
            ("the database", self.database.close),
        ):
            try:
                if step is not None:
                    step()
            except Exception:  # noqa: BLE001  (a full disk must not keep the threads that come after from being ended)
                logs.log.exception("Closing %s failed", what)

    # Ties -------------------------------------------------------------------------------------------

    def _tie(self, reporter: logs.Reporter) -> None:
        self.jobs.changed.connect(self._badge)
        self.jobs.progressed.connect(self._badge)
        self.roots.changed.connect(self._roots_changed)
        self.settings_view.changed.connect(self._setting_changed)
        self.settings_view.failed.connect(self.window.show_error)
        self.engines.failed.connect(self.window.show_error)
        self.downloads.notice.connect(self.window.show_notice)
        self.downloads.badge.connect(self._download_badge)
        self.downloads.library_changed.connect(self.refresh_library)
        self.downloads.settings_wanted.connect(self._show_hub_settings)
        self.window.window_wanted.connect(self._open_window)
        self.window.closing.connect(self.downloads.close_window)
        reporter.unexpected.connect(self.questions.unexpected)
        # Unfinished work is saved while the window still stands.
        self.window.closing.connect(self.machine.close)

    @Slot(str)
    def _open_window(self, name: str) -> None:
        assert name == "downloads"
        self.downloads.show_window()

    @Slot(object)
    def _download_badge(self, fraction: float | None) -> None:
        self.window.rail.set_badge("downloads", fraction)

    @Slot()
    def _show_hub_settings(self) -> None:
        self.window.come_to_front()
        self.window.show_page("settings")
        page = self.window.built("settings")
        if page is not None:
            page.show_section("hub")  # type: ignore[attr-defined]

    @Slot()
    def _library_changed(self) -> None:
        for page in (self.window.built("models"), self.window.built("loras")):
            if page is not None:
                page.library_changed()  # type: ignore[attr-defined]

    @Slot(bool)
    def _scanning(self, scanning: bool) -> None:
        for page in (self.window.built("models"), self.window.built("loras")):
            if page is not None:
                page.set_scanning(scanning)  # type: ignore[attr-defined]

    @Slot(object)
    def _library_problem(self, error: WeftError) -> None:
        self.window.show_notice(Notice(text=str(error), tone="warning"))

    @Slot()
    def _roots_changed(self) -> None:
        if self._library_worker is not None:
            self._library_worker.set_roots(self.roots.roots())

    @Slot(str)
    def _setting_changed(self, name: str) -> None:
        if name == "appearance":
            self.theme.set_appearance(self.settings.settings.appearance)

    @Slot()
    def _badge(self, *_: object) -> None:
        self.window.rail.set_badge("jobs", self.jobs.fraction)
