"""The merge-and-export dialog, from wherever it is opened, and what happens when a result is there. Part of the composition root."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from PySide6.QtCore import QObject, Slot

from app.core.errors import ErrorKind, WeftError
from app.core.jobs import Job, JobState
from app.core.library import ModelEntry
from app.core.stack import AdapterStack
from app.viewmodels.tasks import parameters_of
from app.views.page import Notice

if TYPE_CHECKING:
    from app.house import House
    from app.views.export.dialog import ExportDialog

# Tasks whose result belongs into the library, and what it is called when it is there.
_MADE = {"merge": "is merged", "export_gguf": "is exported", "train": "is trained"}


class ExportHouse(QObject):
    """Opens export dialogs and tells when long work has ended."""

    def __init__(self, house: House) -> None:
        super().__init__(house)
        self._house = house
        self.dialog: ExportDialog | None = None
        house.tasks.ended.connect(self._ended)

    @Slot()
    def open_loaded(self) -> None:
        """Export the model and the stack that are chosen now."""
        loadout = self._house.loadout
        if loadout.model is not None:
            self.open(loadout.model, loadout.stack)

    @Slot(object)
    def open_model(self, entry: ModelEntry) -> None:
        """Export a model: with the stack if it is the loaded one."""
        loadout = self._house.loadout
        same = loadout.model is not None and loadout.model.id == entry.id
        self.open(entry, loadout.stack if same else AdapterStack())

    @Slot(object, object)
    def open(self, entry: ModelEntry, stack: AdapterStack) -> None:
        """Open the dialog for a model and a stack."""
        from app.viewmodels.export import ExportDraft
        from app.views.export.dialog import ExportDialog

        house = self._house
        house.machine.measured()
        draft = ExportDraft(
            entry,
            stack,
            queue=house.tasks,
            jobs=house.jobs,
            models=self._models(),
            memory_free=lambda: house.machine.now().ram_free,
        )
        dialog = ExportDialog(draft, house.window)
        dialog.load_wanted.connect(self._load)
        dialog.destroyed.connect(self._closed)
        self.dialog = dialog
        dialog.open()

    @Slot()
    def _closed(self) -> None:
        self.dialog = None

    def _models(self) -> Path:
        chosen = self._house.settings.settings.downloads
        return Path(chosen) if chosen else self._house.paths.models

    @Slot(str)
    def _load(self, path: str) -> None:
        from app.core.recognise import recognise_model

        try:
            entry = recognise_model(Path(path))
            if entry is None:
                raise WeftError(ErrorKind.NOT_FOUND, f"{path} is no model any more.", "Look at the folder.")
            self._house.loadout.load(entry)
        except WeftError as error:
            self._house.window.show_notice(Notice(text=str(error), tone="warning"))

    @Slot(object, object, object)
    def _ended(self, job: Job, _result: object, error: WeftError | None) -> None:
        if job.task not in _MADE:
            return
        if job.state is JobState.DONE:
            self._house.refresh_library()
        if self.dialog is not None and self.dialog.job == job.id:
            return  # it says so itself
        window = self._house.window
        if job.state is JobState.DONE:
            parameters = parameters_of(job)
            output = parameters.get("config", {}).get("output", {}).get("dir", "")
            name = Path(str(parameters.get("target") or parameters.get("to") or output or job.title)).name
            window.show_notice(Notice(text=f"{name} {_MADE[job.task]}.", tone="positive", important=True))
        elif error is not None and error.kind is not ErrorKind.CANCELLED:
            window.show_notice(
                Notice(
                    text=f"{job.title} failed. {error.message}",
                    tone="negative",
                    action="Show",
                    run=self._show_jobs,
                    important=True,
                )
            )

    def _show_jobs(self) -> None:
        self._house.window.show_page("jobs")
