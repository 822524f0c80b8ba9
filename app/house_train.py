"""Training in the window: the draft, the runs and the page. Part of the composition root."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from PySide6.QtCore import QObject, Slot

from app.core.errors import WeftError
from app.core.library import ModelEntry
from app.views.page import Notice, Page

if TYPE_CHECKING:
    from app.engine.client import EngineClient
    from app.house_loras import LorasHouse
    from app.household import Household
    from app.viewmodels.task_lane import TaskLane
    from app.viewmodels.train_files import RunFiles
    from app.viewmodels.train_runs import TrainRuns


class TrainHouse(QObject):
    """What lives as long as the window; made when the page is first shown."""

    def __init__(self, house: Household, loras: LorasHouse) -> None:
        super().__init__(house)
        self._house, self._loras = house, loras
        self._lane: TaskLane | None = None
        self._runs: TrainRuns | None = None
        self._files: RunFiles | None = None
        house.tasks.changed.connect(self._work_began)

    def runs(self) -> TrainRuns:
        """What runs say, from the first job on: also of one that is resumed before the page was looked at."""
        if self._runs is None:
            from app.store.runs import RunStore
            from app.viewmodels.train_runs import TrainRuns

            house = self._house
            self._runs = TrainRuns(house.job_store, house.tasks, RunStore(house.database), self)
        return self._runs

    @Slot()
    def _work_began(self) -> None:
        if self._runs is None and self._house.tasks.busy:
            self.runs()

    def page(self) -> Page:
        """The Train page."""
        from app.viewmodels.task_lane import TaskLane
        from app.viewmodels.train_draft import TrainDraft
        from app.viewmodels.train_files import RunFiles
        from app.views.train.page import TrainPage

        house = self._house
        self._lane = TaskLane(self._preview_client, self)
        draft = TrainDraft(
            queue=house.tasks, lane=self._lane, adapters=house.paths.adapters, machine=house.machine.now, parent=self
        )
        if house.loadout.model is not None and not house.loadout.model.problem:
            draft.set_model(house.loadout.model)
        self._files = RunFiles(house.library.find, self)
        page = TrainPage(
            draft, self.runs(), make_table=partial(house.model_table, self, mark_loaded=False), run_files=self._files
        )
        page.use_wanted.connect(self._use)
        return page

    @Slot(object)
    def train_on(self, entry: ModelEntry) -> None:
        """Go to the page and begin a run on this model."""
        self._house.window.show_page("train")
        self._house.window.page("train").train_on(entry)  # type: ignore[attr-defined]

    def close(self) -> None:
        """End the child that previews; keep what runs said."""
        if self._lane is not None:
            self._lane.close()
        if self._files is not None:
            self._files.close()
        if self._runs is not None:
            self._runs.close()

    def _preview_client(self) -> EngineClient:
        from app.engine import launch

        return launch.task_engine("core", self._house.paths, "preview-data")

    @Slot(str)
    def _use(self, path: str) -> None:
        house = self._house
        try:
            if house.loadout.model is None:
                text = "Load the model that it was trained on first, with Ctrl+L."
                house.window.show_notice(Notice(text=text, tone="warning"))
                return
            if self._loras.stack.add(Path(path)):
                house.window.show_page("chat")
        except WeftError as error:
            house.window.show_notice(Notice(text=str(error), tone="warning"))
