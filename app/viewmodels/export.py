"""What the merge-and-export dialog shows: the model and stack, formats with what they need, and the jobs that make it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
from PySide6.QtCore import QObject, Signal, Slot

from app.core.certify_plan import Certificate
from app.core.errors import ErrorKind, WeftError
from app.core.export_plan import OWN
from app.core.jobs import Job, JobState, Progress
from app.core.library import ModelEntry, ModelFormat
from app.core.merge_needs import MergeNeeds, merge_needs
from app.core.merge_plan import MergePlan
from app.core.push_plan import PushResult
from app.core.quantized_base import Origin, origin_of, without_mark
from app.core.stack import AdapterStack
from app.hub.push import check_repo
from app.viewmodels import export_choices
from app.viewmodels.background import Background
from app.viewmodels.export_choices import FOLDERS, PACKINGS, SAFETENSORS, ExportChoice, ExportNeed, ExportOptions
from app.viewmodels.export_plans import Chosen, Plan
from app.viewmodels.jobs import JobCenter, Pace
from app.viewmodels.tasks import Step, TaskQueue
from app.viewmodels.units import readable_bytes

__all__ = ["ExportDraft", "ExportOptions"]


class ExportDraft(QObject):
    """An export from its first choice to its end, and what follows it: the certificate, the upload.

    Args:
        models: folder under which results go by default. memory_free: bytes, asked when needed.
        find: the library's 16-bit model of a hub's name, or None.

    Signals:
        changed: choices, needs or the running job's figures changed.
        done(result): MergeResult, ExportResult or QuantizeResult. failed(WeftError).
        certified(Certificate), pushed(PushResult): what followed has ended well. follow_failed(task, WeftError).
    """

    changed = Signal()
    done = Signal(object)
    failed = Signal(object)
    certified = Signal(object)
    pushed = Signal(object)
    follow_failed = Signal(str, object)

    def __init__(
        self,
        entry: ModelEntry,
        stack: AdapterStack,
        *,
        queue: TaskQueue,
        jobs: JobCenter,
        models: Path,
        memory_free: Callable[[], int],
        find: Callable[[str], ModelEntry | None] = lambda _name: None,
        parent: QObject | None = None,
    ) -> None:
        super().__init__(parent)
        self.entry = entry
        self.stack = AdapterStack(adapters=tuple(a for a in stack.adapters if a.weight))
        self._queue, self._jobs, self._memory_free = queue, jobs, memory_free
        self.choices = export_choices.choices(entry, self.stack)
        self.format = self._default_format()
        self.folder = models
        self.options = ExportOptions()
        self._named = False  # by the user: then it stays
        self.name = ""
        self._propose()
        self.job: Job | None = None
        self.progress: Progress | None = None
        self.paused = False
        self.cancelling = False  # asked to stop, and has not yet
        self.warnings: list[str] = []
        self.following: Job | None = None  # the certificate or the upload, while it waits or runs
        self.origin = Origin()  # what a quantized model was made from
        self.base_here: ModelEntry | None = None
        self._ours: set[int] = set()  # jobs of this draft
        self._made = self.chosen  # what the job was given
        self._waits = False
        self._pace = Pace()
        self._find = find
        self._needs: dict[tuple[str, str], MergeNeeds | None] = {}
        self._work = Background(self)
        self._work.done.connect(self._worked)
        queue.progressed.connect(self._progressed)
        queue.warned.connect(self._warned)
        queue.ended.connect(self._ended)
        queue.followed.connect(self._followed)
        jobs.environment_ready.connect(self._environment_ready)
        jobs.environment_failed.connect(self._environment_failed)
        if entry.format not in (*FOLDERS, ModelFormat.GGUF) and not entry.problem:
            self._work.run("base", lambda: self._look_for_base(Path(entry.path)))
        self._measure()

    def _default_format(self) -> str:
        keys = [choice.key for choice in self.choices]
        wanted = (SAFETENSORS, OWN.name, "q4_k_m", *PACKINGS)
        return next((key for key in wanted if key in keys), "")

    # What is read of the disk: never in the window's thread -------------------------------------------

    @property
    def base(self) -> str:
        """The 16-bit model that a quantized one was made from, by its name; "" where nothing tells."""
        return self.origin.base

    @property
    def base_to_get(self) -> bool:
        """Whether the base can be used, or looked for on the hub: a model of the user's own is not there."""
        return bool(self.base) and (self.base_here is not None or not self.origin.ours or "/" in self.base)

    def _look_for_base(self, folder: Path) -> tuple[Origin, ModelEntry | None]:
        origin = origin_of(folder)
        name = without_mark(folder.name)
        if origin.adapters and name != folder.name:
            # The same merge in 16 bits, where that was kept, has all that this one had before it was packed.
            merged = self._find(name)
            if merged is not None and origin_of(Path(merged.path)) == origin:
                return Origin(base=name, ours=True), merged
        return origin, self._find(origin.base) if origin.base else None

    def _measure(self) -> None:
        """Ask the base's headers what a merge takes; until they have told, the library's entry gives an estimate."""
        if self.format != SAFETENSORS:
            return
        key = (self.options.dtype, str(self.folder))
        if key not in self._needs:
            self._needs[key] = None
            plan = self.plan()
            assert isinstance(plan, MergePlan)
            self._work.run(key, lambda: merge_needs(plan))

    @Slot(object, object, object)
    def _worked(self, key: object, result: object, error: object) -> None:
        if key == "base" and isinstance(result, tuple):
            self.origin, self.base_here = result
        elif isinstance(key, tuple) and isinstance(result, MergeNeeds):
            self._needs[key] = result
        elif error is not None:
            return  # the estimate stands; the job itself says what is wrong with the files
        self.changed.emit()

    # Choices --------------------------------------------------------------------------------------

    def choose(self, key: str) -> None:
        """Another format."""
        self.format = key
        self._propose()
        self._measure()
        self.changed.emit()

    def _propose(self) -> None:
        """A name under which nothing lies there yet, as long as the user has given none."""
        if self._named or not self.choices:
            return
        plain = export_choices.default_name(self.entry, self.stack)
        names = (plain if n == 1 else f"{plain}-{n}" for n in range(1, 1000))
        made = self.chosen
        self.name = next(
            (name for name in names if not msgspec.structs.replace(made, name=name).target.exists()), plain
        )

    def set_name(self, name: str) -> None:
        self.name, self._named = name.strip(), True
        self.changed.emit()

    def set_folder(self, folder: Path) -> None:
        self.folder = folder
        self._propose()
        self._measure()
        self.changed.emit()

    def set_options(self, options: ExportOptions) -> None:
        self.options = options
        self._propose()
        self._measure()
        self.changed.emit()

    @property
    def choice(self) -> ExportChoice | None:
        return next((choice for choice in self.choices if choice.key == self.format), None)

    @property
    def chosen(self) -> Chosen:
        """All choices as they stand."""
        return Chosen(
            entry=self.entry,
            stack=self.stack,
            format=self.format,
            name=self.name,
            folder=self.folder,
            options=self.options,
        )

    @property
    def method(self) -> str:
        """`gptq`, `awq` or `hqq`, where the format is one of them; else ""."""
        return export_choices.method_of(self.format)

    @property
    def makes_folder(self) -> bool:
        """Whether a model folder is made, and no GGUF file."""
        return self.chosen.makes_folder

    @property
    def target(self) -> Path:
        """The folder, or the GGUF file in a folder of its own, that is made."""
        return self.chosen.target

    @property
    def environment(self) -> str:
        """Where the task runs."""
        return self.chosen.environment

    @property
    def takes_imatrix(self) -> bool:
        """Whether an importance matrix makes a difference."""
        return self.chosen.takes_imatrix

    @property
    def needs_installation(self) -> bool:
        """Whether the environment has to be installed first."""
        return bool(self.format) and not self._jobs.is_ready(self.environment)

    @property
    def installation(self) -> str:
        """What is installed first, in a sentence; "" when nothing is."""
        if not self.needs_installation:
            return ""
        what = f"Quantizing by {self.method.upper()}" if self.method else "Exporting GGUF files"
        size = readable_bytes(self._jobs.expected_bytes(self.environment))
        return f"{what} needs one more engine of about {size}: it is installed first, which takes some minutes."

    def need(self) -> ExportNeed:
        """What it takes. Asks the file system how much is free."""
        free, memory_free = export_choices.free_at(self.folder), self._memory_free()
        told = self._needs.get((self.options.dtype, str(self.folder))) if self.format == SAFETENSORS else None
        if told is not None:
            return ExportNeed(
                disk=told.disk,
                result=told.disk,
                memory=told.memory,
                disk_free=free,
                memory_free=memory_free,
                drive=told.drive,
            )
        return export_choices.estimate(self.entry, self.stack, self.format, self.options, free, memory_free)

    def problem(self) -> str:
        """Why it cannot start, in a sentence; "" when it can."""
        if not self.choices:
            return export_choices.refusal(self.entry, self.base)
        if wrong := export_choices.name_problem(self.name):
            return wrong
        if self.target.exists():
            return f"{self.target.name} exists there already. Choose another name."
        choice = self.choice
        if choice is not None and choice.imatrix and not self.options.imatrix:
            return f"{choice.title} needs an importance matrix: choose a text for it."
        if self.options.push is not None:
            try:
                check_repo(self.options.push)
            except WeftError as error:
                return f"{error.message} {error.hint}"
        need = self.need()
        return need.problem if need.disk > need.disk_free else ""

    # Running --------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        return self._waits or (self.job is not None and self._queue.is_active(self.job.id))

    def owns(self, job: int) -> bool:
        """Whether a job is this export, or follows it."""
        return job in self._ours

    @property
    def waits_for_installation(self) -> bool:
        return self._waits

    @property
    def speed(self) -> float:
        """Units a second, 0 while unknown."""
        return self._pace.speed

    @property
    def seconds_left(self) -> float | None:
        return self._pace.left(self.progress) if self.progress is not None else None

    def start(self) -> None:
        """Make it: as a job, after the environment is there. Raises WeftError when the store cannot be written."""
        if self.running or self.problem():
            return
        if self.needs_installation:
            self._waits = True
            self._jobs.install(self.environment)
            self.changed.emit()
        else:
            self._submit()

    def _submit(self) -> None:
        self._waits, self.paused, self.cancelling, self.progress, self._pace = False, False, False, None, Pace()
        made = self._made = self.chosen
        self.job = self._queue.submit(
            made.task, made.title, made.plan(), environment=made.environment, then=made.steps()
        )
        self._ours = {self.job.id}
        self.changed.emit()

    def plan(self) -> Plan:
        """What the task is given."""
        return self.chosen.plan()

    def steps(self) -> list[Step]:
        """What follows the export."""
        return self.chosen.steps()

    def cancel(self) -> None:
        """Stop; what was written goes. An installation goes on by itself."""
        if self._waits:
            self._waits = False
            self.changed.emit()
        elif self.job is not None and self.running:
            self.cancelling = True
            self.changed.emit()
            self._queue.cancel(self.job.id)

    def pause(self, paused: bool) -> None:
        """Hold the job, or what follows it, or let it go on."""
        job = self.following or self.job
        if job is not None:
            self.paused = paused
            self._pace.hold(paused)
            self._queue.adjust(job.id, {"paused": paused})
            self.changed.emit()

    def cancel_following(self) -> None:
        """Stop the certificate or the upload; the export stays."""
        if self.following is not None:
            self._queue.cancel(self.following.id)

    @Slot(int, object)
    def _progressed(self, job: int, progress: Progress) -> None:
        if job in self._ours:
            self.progress = progress
            self._pace.add(progress)
            self.changed.emit()

    @Slot(int, str)
    def _warned(self, job: int, sentence: str) -> None:
        if self.job is not None and job == self.job.id:
            self.warnings.append(sentence)

    @Slot(int, object)
    def _followed(self, before: int, job: Job) -> None:
        if before in self._ours:
            self._ours.add(job.id)
            self.following, self.progress, self._pace, self.paused = job, None, Pace(), False
            self.changed.emit()

    @Slot(object, object, object)
    def _ended(self, job: Job, result: object, error: WeftError | None) -> None:
        if self.following is not None and job.id == self.following.id:
            self._follow_ended(job, result, error)
        if self.job is None or job.id != self.job.id:
            return
        self.job, self.cancelling = job, False
        if error is not None or job.state is not JobState.DONE:
            self.failed.emit(error or WeftError(ErrorKind.CRASHED, job.message, job.hint))
        else:
            self.done.emit(self._made.result(result))
        self.changed.emit()

    def _follow_ended(self, job: Job, result: object, error: WeftError | None) -> None:
        self.following = None
        if error is not None or job.state is not JobState.DONE:
            self.follow_failed.emit(job.task, error or WeftError(ErrorKind.CRASHED, job.message, job.hint))
        elif job.task == "certify":
            self.certified.emit(msgspec.convert(result, Certificate))
        else:
            self.pushed.emit(msgspec.convert(result, PushResult))
        self.changed.emit()

    @Slot(str)
    def _environment_ready(self, name: str) -> None:
        if self._waits and name == self.environment:
            self._submit()

    @Slot(str, object)
    def _environment_failed(self, name: str, error: WeftError) -> None:
        if self._waits and name == self.environment:
            self._waits = False
            self.failed.emit(error)
            self.changed.emit()
