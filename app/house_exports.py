"""The merge-and-export dialog, from wherever it is opened, and what happens when a result is there. Part of the composition root."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from PySide6.QtCore import QObject, Slot

from app.adapters.staging_places import remembered
from app.core.certificate_file import read_certificate
from app.core.certify_plan import Certificate
from app.core.errors import ErrorKind, WeftError
from app.core.jobs import Job, JobState
from app.core.library import ModelEntry, ModelFormat
from app.core.push_plan import PushPlan
from app.core.stack import AdapterStack
from app.viewmodels.background import Background
from app.viewmodels.leftovers import Leftovers
from app.viewmodels.tasks import parameters_of
from app.views.page import Notice

if TYPE_CHECKING:
    from app.household import Household
    from app.views.export.dialog import ExportDialog

# Tasks whose result belongs into the library, and what it is called when it is there.
_MADE = {
    "merge": "is merged",
    "export_gguf": "is exported",
    "quantize": "is quantized",
    "train": "is trained",
    "certify": "is compared with what it was made of",
    "push_hub": "is on the hub",
}
_INTO_LIBRARY = ("merge", "export_gguf", "quantize", "train")


class ExportHouse(QObject):
    """Opens export dialogs and tells when long work has ended."""

    def __init__(self, house: Household) -> None:
        super().__init__(house)
        self._house = house
        self.dialog: ExportDialog | None = None
        self._opened = 0
        house.tasks.ended.connect(self._ended)
        self.leftovers = Leftovers(house.job_store, house.tasks, self._places, self)
        self.leftovers.found.connect(self._interrupted)
        house.jobs.removed.connect(self.leftovers.forget)
        self._work = Background(self)
        self._work.done.connect(self._certificate_read)

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
            find=self._find_base,
        )
        dialog = ExportDialog(draft, house.window)
        dialog.load_wanted.connect(self._load)
        dialog.base_wanted.connect(lambda base: self._use_base(base, stack))
        self.dialog = dialog
        self._opened += 1
        dialog.destroyed.connect(partial(self._closed, self._opened))
        dialog.open()

    @Slot(object)
    def show_certificate(self, entry: ModelEntry) -> None:
        """Show the certificate that is stored with a model."""
        self._work.run(entry.name, lambda: read_certificate(Path(entry.path)))

    @Slot(object, object, object)
    def _certificate_read(self, name: object, found: object, _error: object) -> None:
        if isinstance(found, Certificate):
            from app.views.export.certificate import CertificateDialog

            CertificateDialog(found, self._house.window).open()
            return
        text = f"{name} has no certificate. One is made when a model is merged or exported, or by weft certify --store."
        self._house.window.show_notice(Notice(text=text))

    def close(self) -> None:
        """Wait for what is under way."""
        self._work.close()
        self.leftovers.close()

    def _find_base(self, name: str) -> ModelEntry | None:
        """The library's model of a hub's name, in 16 bits or more. Asked in a thread of its own."""
        last = name.rpartition("/")[2].casefold()
        library = self._house.library
        try:
            for entry in library.models(last):
                same = entry.name.rpartition("/")[2].casefold() == last
                if same and not entry.problem and entry.format in (ModelFormat.SAFETENSORS, ModelFormat.TORCH_BIN):
                    return entry
        finally:
            library.release()
        return None

    def _use_base(self, base: ModelEntry | str, stack: AdapterStack) -> None:
        if isinstance(base, str):
            self._house.downloads.find(base)
        else:
            self.open(base, stack)

    def with_token(self, job: Job, parameters: str) -> str:
        """The parameters of an upload with the hub's token, which lies in no store. Called in the job's thread."""
        if job.task != "push_hub":
            return parameters
        settings, plan = self._house.settings.settings, msgspec.json.decode(parameters, type=PushPlan)
        token = self._house.downloads.tokens.get(settings.hub_endpoint)[0]
        plan = msgspec.structs.replace(plan, endpoint=settings.hub_endpoint, proxy=settings.proxy, token=token)
        return msgspec.json.encode(plan).decode()

    def _closed(self, number: int, *_: object) -> None:
        if number == self._opened:  # another one may have taken its place
            self.dialog = None

    def _places(self) -> list[Path]:
        roots = [Path(root.path) for root in self._house.roots.roots()]
        return list(dict.fromkeys([self._models(), *roots, *remembered(self._house.paths.unfinished)]))

    @Slot(list)
    def _interrupted(self, jobs: list[Job]) -> None:
        text = f"{jobs[0].title} was interrupted and can go on." if len(jobs) == 1 else f"{len(jobs)} merges and exports were interrupted and can go on."  # fmt: skip
        self._house.window.show_notice(Notice(text=text, tone="warning", action="Show", run=self._house.show_jobs))

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
    def _ended(self, job: Job, result: object, error: WeftError | None) -> None:
        if job.task not in _MADE:
            return
        if job.state is JobState.DONE and job.task in _INTO_LIBRARY:
            self._house.refresh_library()
        if self.dialog is not None and self.dialog.shows(job.id):
            return  # it says so itself
        window = self._house.window
        if job.state is JobState.DONE:
            parameters = parameters_of(job)
            output = parameters.get("config", {}).get("output", {}).get("dir", "")
            named = (parameters.get(key) for key in ("target", "to", "store", "path"))
            name = Path(str(next(filter(None, named), output or job.title))).name
            text = f"{name} {_MADE[job.task]}."
            if job.task == "certify":
                found = msgspec.convert(result, Certificate)
                text += f" Mean KL {found.mean_kl:.2g}, the same likeliest token in {100 * found.top1_agreement:.1f} %."
            window.show_notice(Notice(text=text, tone="positive", important=True))
        elif error is not None and error.kind is not ErrorKind.CANCELLED:
            window.show_notice(
                Notice(
                    text=f"{job.title} failed. {error.message}",
                    tone="negative",
                    action="Show",
                    run=self._house.show_jobs,
                    important=True,
                )
            )
