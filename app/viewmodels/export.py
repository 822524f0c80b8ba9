"""What the merge-and-export dialog shows: the model and stack, formats with what they need, and the jobs that make it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
from PySide6.QtCore import QObject, Signal, Slot

from app.core.certify_plan import Certificate, CertifyPlan, CertifySide
from app.core.errors import ErrorKind, WeftError
from app.core.export_plan import OWN, ExportPlan, ExportResult
from app.core.jobs import Job, JobState, Progress
from app.core.library import ModelEntry, ModelFormat
from app.core.merge_needs import MergeNeeds, merge_needs
from app.core.merge_plan import MergePlan, MergeResult
from app.core.paths import resources
from app.core.push_plan import PushPlan, PushResult
from app.core.quantized_base import base_of
from app.core.stack import AdapterStack
from app.hub.push import check_repo
from app.viewmodels import export_choices
from app.viewmodels.background import Background
from app.viewmodels.export_choices import FOLDERS, MARGIN, PACKINGS, SAFETENSORS, ExportChoice, ExportNeed
from app.viewmodels.jobs import JobCenter, Pace
from app.viewmodels.tasks import Step, TaskQueue

_IMPORTS = 600_000_000  # bytes of memory that the libraries of an export take


class ExportOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What can be said beside format, name and place. See MergePlan, ExportPlan and PushPlan.

    Attributes:
        certify: compare the result with what it was made of. text: a text file for that; "" for ours.
        push: where the result goes on the hub, `user/name` or `name`; None for nowhere. private: see PushPlan.
    """

    imatrix: str = ""
    modelfile: bool = False
    shard_size: int = 0
    dtype: str = ""
    certify: bool = True
    text: str = ""
    push: str | None = None
    private: bool = True


class ExportDraft(QObject):
    """An export from its first choice to its end, and what follows it: the certificate, the upload.

    Args:
        models: folder under which results go by default. memory_free: bytes, asked when needed.
        find: the library's 16-bit model of a hub's name, or None.

    Signals:
        changed: choices, needs or the running job's figures changed.
        done(result): MergeResult or ExportResult. failed(WeftError).
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
        self.name = export_choices.default_name(entry, self.stack)
        self.folder = models
        self.options = ExportOptions()
        self.job: Job | None = None
        self.progress: Progress | None = None
        self.paused = False
        self.warnings: list[str] = []
        self.following: Job | None = None  # the certificate or the upload, while it waits or runs
        self.base = ""  # the 16-bit model that a quantized one was made from, by its hub's name
        self.base_here: ModelEntry | None = None
        self._ours: set[int] = set()  # jobs of this draft
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

    def _look_for_base(self, folder: Path) -> tuple[str, ModelEntry | None]:
        name = base_of(folder)
        return name, self._find(name) if name else None

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
            self.base, self.base_here = result
        elif isinstance(key, tuple) and isinstance(result, MergeNeeds):
            self._needs[key] = result
        elif error is not None:
            return  # the estimate stands; the job itself says what is wrong with the files
        self.changed.emit()

    # Choices --------------------------------------------------------------------------------------

    def choose(self, key: str) -> None:
        """Another format."""
        self.format = key
        self._measure()
        self.changed.emit()

    def set_name(self, name: str) -> None:
        self.name = name.strip()
        self.changed.emit()

    def set_folder(self, folder: Path) -> None:
        self.folder = folder
        self._measure()
        self.changed.emit()

    def set_options(self, options: ExportOptions) -> None:
        self.options = options
        self._measure()
        self.changed.emit()

    @property
    def choice(self) -> ExportChoice | None:
        return next((choice for choice in self.choices if choice.key == self.format), None)

    @property
    def makes_folder(self) -> bool:
        """Whether a model folder is made, and no GGUF file."""
        return self.format in PACKINGS

    @property
    def target(self) -> Path:
        """The folder, or the GGUF file in a folder of its own, that is made."""
        if self.makes_folder:
            return self.folder / self.name
        kind = self.entry.quantization if self.format == OWN.name else self.format
        return self.folder / self.name / f"{self.name}-{(kind or self.format).upper()}.gguf"

    @property
    def environment(self) -> str:
        """Where the task runs."""
        return "core" if self.makes_folder else "export"

    @property
    def needs_installation(self) -> bool:
        """Whether the environment has to be installed first."""
        return bool(self.format) and not self._jobs.is_ready(self.environment)

    def need(self) -> ExportNeed:
        """What it takes. Asks the file system how much is free."""
        result, between = export_choices.sizes(self.entry, self.format, self.options.dtype)
        free = export_choices.free_at(self.folder)
        told = self._needs.get((self.options.dtype, str(self.folder))) if self.format == SAFETENSORS else None
        if told is not None:
            return ExportNeed(
                disk=told.disk,
                result=told.disk,
                memory=told.memory,
                disk_free=free,
                memory_free=self._memory_free(),
                drive=told.drive,
            )
        largest = export_choices.largest(self.entry)
        memory = _IMPORTS + (largest if self.makes_folder else 3 * largest)
        if self.options.imatrix and not self.makes_folder:
            memory += between or result
        return ExportNeed(
            disk=result + between + MARGIN,
            result=result,
            memory=memory,
            disk_free=free,
            memory_free=self._memory_free(),
        )

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
        self._waits, self.paused, self.progress, self._pace = False, False, None, Pace()
        title = f"Merge {self.name}" if self.makes_folder else f"Export {self.target.name}"
        task = "merge" if self.makes_folder else "export_gguf"
        self.job = self._queue.submit(task, title, self.plan(), environment=self.environment, then=self.steps())
        self._ours = {self.job.id}
        self.changed.emit()

    def plan(self) -> MergePlan | ExportPlan:
        """What the task is given."""
        options = self.options
        if self.makes_folder:
            return MergePlan(
                model=self.entry.path,
                stack=self.stack,
                target=str(self.target),
                dtype=options.dtype if self.format == SAFETENSORS else "",
                shard_size=options.shard_size,
                packed=PACKINGS[self.format],
                base_name=self.entry.name,
            )
        return ExportPlan(
            model=self.entry.path,
            stack=self.stack,
            target=str(self.target),
            type=self.format,
            name=self.name,
            imatrix=options.imatrix if self.choice is not None and self.takes_imatrix else "",
            modelfile=options.modelfile,
        )

    @property
    def takes_imatrix(self) -> bool:
        """Whether an importance matrix makes a difference: only where llama.cpp quantizes."""
        return not self.makes_folder and self.format not in ("f32", "f16", "bf16", "q8_0", OWN.name)

    def steps(self) -> list[Step]:
        """What follows the export: the certificate first, so that it goes up with the rest."""
        options, made, found = self.options, str(self.target), list[Step]()
        if options.certify:
            plan = CertifyPlan(
                a=CertifySide(model=self.entry.path, stack=self.stack, name=self.entry.name),
                b=CertifySide(model=made, name=self.target.name),
                text=options.text or str(resources() / "certificate_text.txt"),
                store=made,
            )
            found.append(
                Step(task="certify", title=f"Certify {self.name}", parameters=plan, environment=self.environment)
            )
        if options.push is not None:
            path = made if self.makes_folder else str(self.target.parent)
            push = PushPlan(path=path, repo=check_repo(options.push), private=options.private)
            title = f"Upload {self.name} to {options.push}"
            found.append(
                Step(
                    task="push_hub",
                    title=title,
                    parameters=push,
                    environment="",
                    resource="network",
                    always=bool(found),  # what could not be compared was made all the same
                )
            )
        return found

    def cancel(self) -> None:
        """Stop; what was written goes. An installation goes on by itself."""
        if self._waits:
            self._waits = False
            self.changed.emit()
        elif self.job is not None:
            self._queue.cancel(self.job.id)

    def pause(self, paused: bool) -> None:
        """Hold the job, or let it go on."""
        if self.job is not None:
            self.paused = paused
            self._queue.adjust(self.job.id, {"paused": paused})
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
            self.following, self.progress, self._pace = job, None, Pace()
            self.changed.emit()

    @Slot(object, object, object)
    def _ended(self, job: Job, result: object, error: WeftError | None) -> None:
        if self.following is not None and job.id == self.following.id:
            self._follow_ended(job, result, error)
        if self.job is None or job.id != self.job.id:
            return
        self.job = job
        if error is not None or job.state is not JobState.DONE:
            self.failed.emit(error or WeftError(ErrorKind.CRASHED, job.message, job.hint))
        else:
            kind = MergeResult if self.makes_folder else ExportResult
            self.done.emit(msgspec.convert(result, kind))
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
