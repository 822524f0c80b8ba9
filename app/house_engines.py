"""Engines in the window: which environments are installed at the start, what is loaded first, and what becomes of a load
that waits for an environment. Part of the composition root.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from PySide6.QtCore import QObject, Slot

from app.core.errors import ErrorKind, WeftError
from app.core.jobs import JobState
from app.core.library import ModelEntry, ModelFormat
from app.core.paths import resources
from app.store.library import starter
from app.viewmodels.jobs import INSTALL, environment_of
from app.viewmodels.loadout import LoadoutState
from app.views.page import Notice

if TYPE_CHECKING:
    from app.household import Household


class EnginesHouse(QObject):
    """Ties the loadout, the environments and their installations together."""

    def __init__(self, house: Household) -> None:
        super().__init__(house)
        self._house = house
        house.loadout.environment_wanted.connect(self._environment_wanted)
        house.jobs.environment_ready.connect(self._environment_ready)
        house.jobs.environment_failed.connect(self._environment_failed)

    @Slot()
    def machine_known(self) -> None:
        """What there is to run models on has been measured: now a load can tell whether it fits."""
        # Nobody has picked one meanwhile, nor handed one over at the start.
        if self._house.settings.settings.load_last and self._house.loadout.model is None:
            self.load_first_model()
        self.prepare_environments()

    def load_first_model(self) -> None:
        """The model used last, else the starter; it waits for its environment if that is not there yet."""
        entry: ModelEntry | None = None
        last = self._house.settings.settings.last_model
        try:
            entry = self._house.library.model(last) if last else None
        except WeftError:
            entry = None  # it is gone: the starter then
        if entry is not None and entry.problem:
            text = (
                f"{entry.name}, the model used last, cannot be loaded: {entry.problem} The starter is loaded instead."
            )
            self._house.window.show_notice(Notice(text=text, tone="warning"))
            entry = None
        try:
            self._house.loadout.load(entry or starter())
        except WeftError as error:
            self._house.window.show_notice(Notice(text=str(error), tone="warning"))

    def prepare_environments(self) -> None:
        """Install what was never tried, and go on with what was cut short. What somebody cancelled or removed stays so."""
        last: dict[str, JobState] = {}
        for job in self._house.job_store.jobs(500):  # newest first
            if job.task == INSTALL:
                last.setdefault(environment_of(job), job.state)
        for name, spec in self._house.environments.specs().items():
            if spec.on_demand and name not in last:
                continue
            if not self._house.jobs.is_ready(name) and last.get(name, JobState.CRASHED) is JobState.CRASHED:
                self._house.jobs.install(name)

    @Slot(str)
    def _environment_wanted(self, name: str) -> None:
        self._house.jobs.install(name)

    @Slot(str)
    def _environment_ready(self, name: str) -> None:
        self._house.window.show_notice(
            Notice(text=f"The engine is ready: {self._house.jobs.title(name)}.", tone="positive", important=True)
        )
        self._house.loadout.environment_ready(name)
        self._answer_with_what_there_is()

    def _answer_with_what_there_is(self) -> None:
        """The starter waits for an environment that failed: the one that is ready runs the starter's other file."""
        now = self._house.loadout
        if now.state is not LoadoutState.FAILED or now.model is None or now.model.format is ModelFormat.GGUF:
            return
        if now.model.path.startswith(str(resources() / "starter")) and now.loader is not None:
            if self._house.jobs.is_ready(now.loader.environment):
                return
            try:
                other = starter("starter (gguf)")
                if self._house.jobs.is_ready(now.planner.choose_loader(other).environment):
                    now.load(other)
            except WeftError as error:
                self._house.window.show_notice(Notice(text=str(error), tone="warning"))

    @Slot(str, object)
    def _environment_failed(self, name: str, error: WeftError) -> None:
        self._house.loadout.environment_failed(name, error)
        if error.kind is not ErrorKind.CANCELLED:
            self._house.window.show_notice(
                Notice(
                    text=f"{self._house.jobs.title(name)} could not be installed. {error.message}",
                    tone="negative",
                    action="Show",
                    run=self._house.show_jobs,
                    important=True,
                )
            )
