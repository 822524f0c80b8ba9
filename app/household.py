"""What every part of the house takes from: stores, view models, workers and the window. Part of the composition root."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PySide6.QtCore import QObject, Slot
from PySide6.QtWidgets import QApplication

from app.core.jobs import Job
from app.core.paths import Paths
from app.engine.environments import Environments
from app.house_downloads import DownloadsHouse
from app.store.chats import ChatStore
from app.store.database import Database
from app.store.jobs import JobStore
from app.store.library import LibraryStore
from app.store.model_settings import ModelSettings
from app.store.settings import SettingsStore
from app.viewmodels.jobs import JobCenter
from app.viewmodels.library_roots import LibraryRoots
from app.viewmodels.loadout import Loadout
from app.viewmodels.machine_watch import MachineWatch
from app.viewmodels.settings import EngineList, SettingsView
from app.viewmodels.tasks import TaskQueue
from app.views import theme
from app.views.main_window import MainWindow

if TYPE_CHECKING:
    from app.engine.client import EngineClient
    from app.viewmodels.model_table import ModelTable
    from app.workers.engine_worker import EngineWorker
    from app.workers.environment_worker import EnvironmentWorker
    from app.workers.library_worker import LibraryWorker
    from app.workers.task_worker import TaskWorker


class Household(QObject):
    """Builds what lives as long as the window, and knows nothing of the parts that use it.

    Args:
        window: a frame that is shown already.

    Attributes:
        complete: adds to a job's parameters what lies in no store. Called in the job's thread.
    """

    def __init__(self, application: QApplication, paths: Paths, window: MainWindow, look: theme.Theme) -> None:
        super().__init__(application)
        self.paths = paths
        self.window = window
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
        self.complete: Callable[[Job, str], str] = lambda _job, parameters: parameters
        self._library_worker: LibraryWorker | None = None

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

        return TaskWorker(*arguments, complete=self.complete, **keywords)

    def _environment_worker(self, name: str, repair: bool) -> EnvironmentWorker:
        from app.workers.environment_worker import EnvironmentWorker

        return EnvironmentWorker(self.environments, name, self.job_store, repair=repair)

    @Slot()
    def refresh_library(self) -> None:
        """Look at the disk again, in the library's own thread."""
        if self._library_worker is not None:
            self._library_worker.refresh()

    # What several parts offer -----------------------------------------------------------------------

    def model_table(self, parent: QObject, *, mark_loaded: bool = True) -> ModelTable:
        """The models to pick from, each with whether it fits, the loaded one marked."""
        from app.viewmodels.fitting import judge
        from app.viewmodels.model_table import ModelTable

        def loaded() -> str:
            model = self.loadout.model if mark_loaded and self.loadout.is_loaded else None
            return model.id if model is not None else ""

        return ModelTable(
            self.library, fitting=lambda entry: judge(entry, self.machine.now()), loaded=loaded, parent=parent
        )

    @Slot()
    def show_jobs(self) -> None:
        """Go to the Jobs page."""
        self.window.show_page("jobs")
