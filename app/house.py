"""House: everything that lives as long as the window, and the ties between it. Part of the composition root.

Built after the window's first paint; pages when they are first shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PySide6.QtCore import QObject, QProcess, QStandardPaths, QTimer, Slot
from PySide6.QtWidgets import QApplication, QWidget

from app import logs
from app.core.errors import ErrorKind, WeftError
from app.core.jobs import JobState
from app.core.library import ModelEntry, ModelFormat
from app.core.paths import Paths, resources
from app.engine.environments import Environments
from app.house_downloads import DownloadsHouse
from app.house_exports import ExportHouse
from app.house_loras import LorasHouse
from app.house_questions import HouseQuestions
from app.house_train import TrainHouse
from app.store.chats import ChatStore
from app.store.database import Database
from app.store.jobs import JobStore
from app.store.library import LibraryStore, starter
from app.store.model_settings import ModelSettings
from app.store.settings import SettingsStore
from app.viewmodels.jobs import INSTALL, JobCenter, environment_of
from app.viewmodels.library_roots import LibraryRoots
from app.viewmodels.loadout import Loadout, LoadoutState
from app.viewmodels.machine_watch import MachineWatch
from app.viewmodels.settings import EngineList, SettingsView
from app.viewmodels.tasks import TaskQueue
from app.views import theme
from app.views.main_window import MainWindow
from app.views.page import Notice, Page, PaletteCommand

if TYPE_CHECKING:
    from app.engine.client import EngineClient
    from app.workers.engine_worker import EngineWorker
    from app.workers.environment_worker import EnvironmentWorker
    from app.workers.library_worker import LibraryWorker
    from app.workers.task_worker import TaskWorker

PALETTE_MODELS = 1000
SETTLE_MS = 40  # a timer of 0 would come before the first page's paint, which waits for the screen


class House(QObject):
    """Builds stores, view models, workers and the window.

    Args:
        window: a frame that is shown already; it is furnished here.
        reporter: brings unexpected exceptions here.
    """

    def __init__(
        self, application: QApplication, paths: Paths, window: MainWindow, look: theme.Theme, reporter: logs.Reporter
    ) -> None:
        super().__init__(application)
        self._application = application
        self.paths = paths
        self.settings = SettingsStore(paths.settings)
        self.database = Database(paths.database)
        self.chats = ChatStore(self.database)
        self.job_store = JobStore(self.database)
        self.library = LibraryStore(self.database)
        self.model_settings = ModelSettings(self.database)
        self.environments = Environments(paths.environments)
        self.theme = look
        self.theme.set_appearance(self.settings.settings.appearance)
        self.machine = MachineWatch(self)
        self.settings_view = SettingsView(self.settings, self)
        self.roots = LibraryRoots(self.settings, paths, self)
        self.tasks = TaskQueue(
            self.job_store, make_client=self._task_client, make_worker=self._task_worker, logs=paths.logs, parent=self
        )
        self.jobs = JobCenter(self.job_store, self.environments, self._environment_worker, self, tasks=self.tasks)
        self.engines = EngineList(self.environments, self.jobs, self)
        self.loadout = Loadout(
            make_worker=self._engine_worker,
            library=self.library,
            model_settings=self.model_settings,
            settings=self.settings,
            environments=self.jobs,
            machine=self.machine.measured,
            log_of=lambda loader: paths.logs / f"engine-{loader}.log",
            parent=self,
        )
        self.downloads = DownloadsHouse(
            self.database, self.settings_view, paths, machine=self.machine.now, state=window.state, parent=self
        )
        self._library_worker: LibraryWorker | None = None
        self.exports = ExportHouse(self)
        self.training = TrainHouse(self)
        self._arguments: list[str] = []
        self.window = window
        self.loras = LorasHouse(self)
        self.questions = HouseQuestions(window, self.loadout, self.environments, self.engines, paths.logs, self)
        self._builders = {
            "chat": self._chat_page,
            "compare": self._compare_page,
            "models": self._models_page,
            "loras": self.loras.page,
            "train": self.training.page,
            "jobs": self._jobs_page,
            "settings": self._settings_page,
        }
        self._tie(reporter)

    # Pages ------------------------------------------------------------------------------------------

    def build(self, name: str) -> Page:
        """Make the page of this name (see `app.rail`)."""
        return self._builders[name]()

    def _chat_page(self) -> Page:
        from app.views.chat.page import ChatPage

        return ChatPage(self.chats, self.loadout, self.settings, pick_model=self._open_picker)

    def _compare_page(self) -> Page:
        from app.store.preferences import PreferenceStore
        from app.viewmodels.chat_presets import Presets
        from app.viewmodels.compare import Compare
        from app.views.compare.page import ComparePage

        model = Compare(self.loadout, PreferenceStore(self.paths.data / "preferences.jsonl"), self)
        return ComparePage(model, Presets(self.settings), pick_model=self._open_picker)

    def _models_page(self) -> Page:
        from app.views.models.page import ModelsPage

        page = ModelsPage(
            library=self.library,
            loadout=self.loadout,
            model_settings=self.model_settings,
            settings=self.settings_view,
            roots=self.roots,
            machine=self.machine,
            refresh=self.refresh_library,
            adapters=self.loras.adapters_for,
        )
        page.details.adapter_wanted.connect(self.loras.show_adapter)
        page.code_wanted.connect(self.questions.review_code)
        page.export_wanted.connect(self.exports.open_model)
        page.certificate_wanted.connect(self.exports.show_certificate)
        page.train_wanted.connect(self.training.train_on)
        page.dropped = self.loras.take
        return page

    def _jobs_page(self) -> Page:
        from app.views.jobs.page import JobsPage

        return JobsPage(jobs=self.jobs)

    def _settings_page(self) -> Page:
        from app.views.settings.page import SettingsPage

        page = SettingsPage(
            settings=self.settings_view,
            roots=self.roots,
            engines=self.engines,
            paths=self.paths,
            hub=self.downloads.hub_section,
        )
        page.remove_environment.connect(self.questions.removal)
        return page

    def _header(self) -> QWidget:
        from app.viewmodels.fitting import judge
        from app.viewmodels.model_table import ModelTable
        from app.views.loadout_bar import LoadoutBar

        def table() -> ModelTable:
            return ModelTable(
                self.library,
                fitting=lambda entry: judge(entry, self.machine.now()),
                loaded=lambda: (
                    self.loadout.model.id if self.loadout.is_loaded and self.loadout.model is not None else ""
                ),
                parent=self,
            )

        bar = LoadoutBar(
            loadout=self.loadout,
            jobs=self.jobs,
            make_table=table,
            machine=self.machine.now,
            stack=self.loras.stack,
            dropped=self.loras.take_for_stack,
            fill_menu=self.loras.fill_stack_menu,
        )
        bar.models_wanted.connect(self._show_models)
        bar.jobs_wanted.connect(self._show_jobs)
        bar.options_wanted.connect(self._show_options)
        bar.export_wanted.connect(self.exports.open_loaded)
        return bar

    # Workers ----------------------------------------------------------------------------------------

    def _engine_worker(self, loader: str) -> EngineWorker:
        from app.engine import launch
        from app.workers.engine_worker import EngineWorker

        return EngineWorker(launch.engine_for(loader, self.paths))

    def _task_client(self, environment: str, log: Path) -> EngineClient:
        # Called in the job's own thread.
        from app.engine import launch

        variables = {"WEFT_CACHE": str(self.paths.cache)}
        if not environment:
            return launch.own_engine(self.paths, log.stem, variables)
        return launch.task_engine(environment, self.paths, log.stem, variables)

    def _task_worker(self, *arguments: Any, **keywords: Any) -> TaskWorker:
        from app.workers.task_worker import TaskWorker

        return TaskWorker(*arguments, complete=self.exports.with_token, **keywords)

    def _environment_worker(self, name: str, repair: bool) -> EnvironmentWorker:
        from app.workers.environment_worker import EnvironmentWorker

        return EnvironmentWorker(self.environments, name, self.job_store, repair=repair)

    @Slot()
    def refresh_library(self) -> None:
        """Look at the disk again, in the library's own thread."""
        if self._library_worker is not None:
            self._library_worker.refresh()

    # Opening and closing ----------------------------------------------------------------------------

    def open(self, arguments: Sequence[str] = ()) -> None:
        """Furnish the window; what its first page does not need starts after it is shown."""
        self._arguments = list(arguments)
        self.window.furnish(
            build=self.build,
            header=self._header,
            commands=self._commands,
            notify=self._notify,
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
        self.machine.known.connect(self._machine_known)
        self.machine.start()
        self.downloads.open()
        self.exports.leftovers.look()
        for sentence in (self.database.notice, *self.settings.problems):
            if sentence:
                self.window.show_notice(Notice(text=sentence, tone="warning"))
        self._take(self._arguments)

    @Slot()
    def _machine_known(self) -> None:
        """What there is to run models on has been measured: now a load can tell whether it fits."""
        if self.settings.settings.load_last:
            self._load_first_model()
        self._prepare_engines()

    def _load_first_model(self) -> None:
        """The model used last, else the starter; it waits for its environment if that is not there yet."""
        entry: ModelEntry | None = None
        last = self.settings.settings.last_model
        try:
            entry = self.library.model(last) if last else None
        except WeftError:
            entry = None  # it is gone: the starter then
        if entry is not None and entry.problem:
            text = (
                f"{entry.name}, the model used last, cannot be loaded: {entry.problem} The starter is loaded instead."
            )
            self.window.show_notice(Notice(text=text, tone="warning"))
            entry = None
        try:
            self.loadout.load(entry or starter())
        except WeftError as error:
            self.window.show_notice(Notice(text=str(error), tone="warning"))

    def _prepare_engines(self) -> None:
        """Install what was never tried, and go on with what was cut short. What somebody cancelled or removed stays so."""
        last: dict[str, JobState] = {}
        for job in self.job_store.jobs(500):  # newest first
            if job.task == INSTALL:
                last.setdefault(environment_of(job), job.state)
        for name, spec in self.environments.specs().items():
            if spec.on_demand and name not in last:
                continue
            if not self.jobs.is_ready(name) and last.get(name, JobState.CRASHED) is JobState.CRASHED:
                self.jobs.install(name)

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
        loadout, jobs = self.loadout, self.jobs
        loadout.environment_wanted.connect(self._environment_wanted)
        jobs.environment_ready.connect(self._environment_ready)
        jobs.environment_failed.connect(self._environment_failed)
        jobs.changed.connect(self._badge)
        jobs.progressed.connect(self._badge)
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

    @Slot(str)
    def _environment_wanted(self, name: str) -> None:
        self.jobs.install(name)

    @Slot(str)
    def _environment_ready(self, name: str) -> None:
        self.window.show_notice(
            Notice(text=f"The engine is ready: {self.jobs.title(name)}.", tone="positive", important=True)
        )
        self.loadout.environment_ready(name)
        self._answer_with_what_there_is()

    def _answer_with_what_there_is(self) -> None:
        """The starter waits for an environment that failed: the one that is ready runs the starter's other file."""
        now = self.loadout
        if now.state is not LoadoutState.FAILED or now.model is None or now.model.format is ModelFormat.GGUF:
            return
        if now.model.path.startswith(str(resources() / "starter")) and now.loader is not None:
            if self.jobs.is_ready(now.loader.environment):
                return
            try:
                other = starter("starter (gguf)")
                if self.jobs.is_ready(now.planner.choose_loader(other).environment):
                    now.load(other)
            except WeftError as error:
                self.window.show_notice(Notice(text=str(error), tone="warning"))

    @Slot(str, object)
    def _environment_failed(self, name: str, error: WeftError) -> None:
        self.loadout.environment_failed(name, error)
        if error.kind is not ErrorKind.CANCELLED:
            self.window.show_notice(
                Notice(
                    text=f"{self.jobs.title(name)} could not be installed. {error.message}",
                    tone="negative",
                    action="Show",
                    run=self._show_jobs,
                    important=True,
                )
            )

    @Slot()
    def _badge(self, *_: object) -> None:
        self.window.rail.set_badge("jobs", self.jobs.fraction)

    # Going places -----------------------------------------------------------------------------------

    @Slot()
    def _show_models(self) -> None:
        self.window.show_page("models")

    @Slot()
    def _show_jobs(self) -> None:
        self.window.show_page("jobs")

    @Slot(object)
    def _show_options(self, entry: ModelEntry) -> None:
        self.window.show_page("models")
        self.window.page("models").show_model(entry.id)  # type: ignore[attr-defined]

    def _open_picker(self) -> None:
        self.window.show_page("chat")
        bar = self.window.header
        if bar is not None:
            bar.open_picker()  # type: ignore[attr-defined]

    def _commands(self) -> list[PaletteCommand]:
        """What Ctrl+K offers besides pages: the loadout, appearance, logs, and every model by name."""
        from app.views.dialogs import open_locally

        loadout = self.loadout
        found = [
            PaletteCommand(
                title="Choose a model…", group="Model", icon="models", run=self._open_picker, shortcut="Ctrl+L"
            ),
            PaletteCommand(
                title="Eject the model", group="Model", icon="eject", run=loadout.unload, enabled=loadout.is_loaded
            ),
            PaletteCommand(
                title="Load the model again",
                group="Model",
                icon="reload",
                run=loadout.reload,
                enabled=loadout.model is not None,
            ),
            PaletteCommand(
                title="Merge and export…",
                group="Model",
                icon="export",
                run=self.exports.open_loaded,
                enabled=loadout.model is not None,
            ),
        ]
        for value, text in (
            ("system", "Colours like the system"),
            ("light", "Light colours"),
            ("dark", "Dark colours"),
        ):
            found.append(
                PaletteCommand(
                    title=text,
                    group="Appearance",
                    icon="appearance",
                    run=lambda value=value: self.settings_view.set("appearance", value),
                )
            )
        found.append(
            PaletteCommand(title="Open the logs", group="Weft", icon="log", run=lambda: open_locally(self.paths.logs))
        )
        try:
            entries = self.library.models(limit=PALETTE_MODELS)
        except WeftError:
            entries = []
        for entry in entries:
            found.append(
                PaletteCommand(
                    title=f"Load {entry.name}",
                    group="Model",
                    icon="load",
                    run=lambda entry=entry: loadout.load(entry),
                    enabled=not entry.problem,
                )
            )
        return found

    def _notify(self, heading: str, text: str) -> None:
        """Tell the desktop: through its tray, else through its notification service; the task bar's entry asks for attention."""
        from PySide6.QtWidgets import QSystemTrayIcon

        self._application.alert(self.window)
        if not QSystemTrayIcon.isSystemTrayAvailable() or not QSystemTrayIcon.supportsMessages():
            # GNOME has no tray. Its service is spoken to by the command that every desktop brings for it.
            command = QStandardPaths.findExecutable("notify-send")
            if command:
                QProcess.startDetached(command, ["--app-name=Weft", "--", heading, text])
            return
        tray = QSystemTrayIcon(self.window.windowIcon(), self)
        tray.messageClicked.connect(self.window.come_to_front)
        tray.show()
        tray.showMessage(heading, text, self.window.windowIcon(), 8000)
        QTimer.singleShot(12_000, tray, tray.deleteLater)
