"""Jobs that make adapters of adapters: combine, resize, convert. What each made is told when it is in its place."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
from PySide6.QtCore import QObject, Signal, Slot

from app.core.combine_plan import Combined, CombinePlan
from app.core.convert_plan import Converted, ConvertPlan
from app.core.errors import ErrorKind, WeftError
from app.core.jobs import Job
from app.core.library import AdapterEntry, AdapterFormat, ModelEntry
from app.viewmodels.jobs import JobCenter
from app.viewmodels.tasks import TaskQueue

MAX_NAME = 100


class Made(msgspec.Struct, frozen=True, kw_only=True):
    """What a job made. text: what happened, with the energy that was kept; path: "" when it failed."""

    title: str
    text: str
    tone: str
    path: str = ""
    error: WeftError | None = None


class AdapterJobs(QObject):
    """Submits plans to the queue and listens for their ends.

    Args:
        folder: Weft's own folder of adapters: results go there.

    Signals:
        made(Made): a job of this kind ended well or badly. library_changed: index the folder again.
    """

    made = Signal(object)
    library_changed = Signal()

    def __init__(self, tasks: TaskQueue, jobs: JobCenter, folder: Path, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._tasks = tasks
        self._jobs = jobs
        self._folder = folder
        tasks.ended.connect(self._ended)

    # Names

    def place(self, name: str, suffix: str = "") -> Path:
        """Where an adapter of this name would lie. Raises WeftError BAD_INPUT for no name, or one that is taken."""
        if why := self.refusal(name, suffix):
            raise WeftError(ErrorKind.BAD_INPUT, why, "Choose another name.")
        return self._folder / f"{clean_name(name)}{suffix}"

    def refusal(self, name: str, suffix: str = "") -> str:
        """Why a new adapter cannot bear this name, "" when it can."""
        clean = clean_name(name)
        if not clean:
            return "Give it a name."
        if (self._folder / f"{clean}{suffix}").exists():
            return f"There is an adapter {clean} already."
        return ""

    def free_name(self, wanted: str, suffix: str = "") -> str:
        """This name, or with a number where it is taken."""
        base = clean_name(wanted) or "adapter"
        name, number = base, 2
        while self.refusal(name, suffix):
            name, number = f"{base[: MAX_NAME - 6]}-{number}", number + 1
        return name

    # Jobs

    def combine(self, plan: CombinePlan) -> Job:
        """Make one adapter of several, or resize one. Raises WeftError for a plan that cannot be."""
        plan.check()
        one = len(plan.adapters.adapters) == 1
        verb = f"Resize {plan.adapters.adapters[0].name}" if one else f"Combine {plan.adapters.title}"
        return self._tasks.submit("combine", verb[:200], plan, environment="core", resource="cpu")

    def convert(self, entry: AdapterEntry, model: ModelEntry, name: str) -> Job:
        """A GGUF adapter becomes a PEFT folder, any other a GGUF adapter. Raises WeftError for a name that cannot be."""
        back = entry.format is AdapterFormat.GGUF
        target = self.place(name, "" if back else ".gguf")
        plan = ConvertPlan(adapter=entry.path, model=model, to=str(target))
        what = "PEFT" if back else "GGUF"
        environment = "core" if self._jobs.is_ready("core") else "llamacpp"
        return self._tasks.submit(
            "convert_adapter", f"Convert {entry.name} to {what}"[:200], plan, environment=environment
        )

    @Slot(object, object, object)
    def _ended(self, job: Job, result: object, error: WeftError | None) -> None:
        if job.task not in ("combine", "convert_adapter"):
            return
        if error is not None or not isinstance(result, dict):
            if error is not None and error.kind is not ErrorKind.CANCELLED:
                self.made.emit(Made(title=job.title, text=str(error), tone="negative", error=error))
            return
        if job.task == "combine":
            combined = msgspec.convert(result, Combined)
            text, path, notes = combined_words(combined), combined.adapter, combined.notes
        else:
            converted = msgspec.convert(result, Converted)
            text, path, notes = "It is in the library now.", converted.adapter, converted.notes
        self.library_changed.emit()
        self.made.emit(
            Made(title=job.title, text=" ".join([text, *notes]), tone="warning" if notes else "positive", path=path)
        )


def combined_words(made: Combined) -> str:
    """What came of it, with the energy that was kept."""
    name = Path(made.adapter).name
    text = f"{name}: {made.modules:,} modules of rank {made.rank}."
    if made.energy is None:
        return f"{text} How near it comes to the sum is not known for this method."
    if made.energy >= 1.0 and made.lowest is None:
        return f"{text} It is exact."
    worst = ""
    if made.lowest is not None and made.lowest_module:
        worst = f"; the least of any module is {made.lowest:.2%} ({made.lowest_module})"
    return f"{text} Energy kept: {made.energy:.2%}{worst}."


def clean_name(name: str) -> str:
    """A name that every file system takes."""
    text = re.sub(r'[<>:"/\\|?*\x00-\x1f]+', "-", " ".join(name.split())).strip(" .-")[:MAX_NAME]
    return f"{text}-" if re.fullmatch(r"(?i)con|prn|aux|nul|com\d|lpt\d", text) else text


def combined_name(names: list[str]) -> str:
    """A name made of those of the adapters."""
    short = [name.rpartition("/")[2] for name in names]
    return "+".join(short[:4])[: MAX_NAME - 8] or "combined"
