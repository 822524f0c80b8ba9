"""What the merge-and-export dialog shows: the model and stack, formats with what they need, and the job that makes it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
from PySide6.QtCore import QObject, Signal, Slot

from app.core.errors import ErrorKind, WeftError
from app.core.export_plan import TYPES, ExportPlan, ExportResult
from app.core.jobs import Job, JobState, Progress
from app.core.library import ModelEntry, ModelFormat
from app.core.merge_plan import MergePlan, MergeResult
from app.core.stack import AdapterStack
from app.viewmodels.jobs import JobCenter, Pace
from app.viewmodels.tasks import TaskQueue
from app.viewmodels.units import readable_bytes

SAFETENSORS = "safetensors"
FOLDERS = (ModelFormat.SAFETENSORS, ModelFormat.TORCH_BIN)
_IMPORTS = 600_000_000  # bytes of memory that the libraries take
_MERGE_MEMORY = 400_000_000
_MARGIN = 64 * 1024 * 1024
_BITS = {"F32": 32, "FLOAT32": 32}


class ExportChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One format. key: `safetensors` or a GGUF type. title, help: as shown. imatrix: it needs an importance matrix."""

    key: str
    title: str
    help: str
    imatrix: bool = False


class ExportOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What can be said beside format, name and place. See MergePlan and ExportPlan."""

    imatrix: str = ""
    modelfile: bool = False
    shard_size: int = 0
    dtype: str = ""


class ExportNeed(msgspec.Struct, frozen=True, kw_only=True):
    """What an export takes, in bytes: on disk while it runs, of it the result, in memory; and what is free."""

    disk: int
    result: int
    memory: int
    disk_free: int
    memory_free: int

    @property
    def sentence(self) -> str:
        between = self.disk - self.result
        way = f", {readable_bytes(between)} more while it is made" if between > 2 * _MARGIN else ""
        return (
            f"About {readable_bytes(self.result)}{way}; {readable_bytes(self.disk_free)} are free there. "
            f"Memory: about {readable_bytes(self.memory)} of {readable_bytes(self.memory_free)} free."
        )

    @property
    def problem(self) -> str:
        if self.disk > self.disk_free:
            return f"{readable_bytes(self.disk - self.disk_free)} are missing on that drive. Make room, or choose another place."
        if self.memory > self.memory_free > 0:
            return "There is less memory free than this takes. Eject the model or close other programs first."
        return ""


class ExportDraft(QObject):
    """An export from its first choice to its end.

    Args:
        models: folder under which results go by default. memory_free: bytes, asked when needed.

    Signals:
        changed: choices, needs or the running job's figures changed.
        done(result): MergeResult or ExportResult. failed(WeftError).
    """

    changed = Signal()
    done = Signal(object)
    failed = Signal(object)

    def __init__(
        self,
        entry: ModelEntry,
        stack: AdapterStack,
        *,
        queue: TaskQueue,
        jobs: JobCenter,
        models: Path,
        memory_free: Callable[[], int],
        parent: QObject | None = None,
    ) -> None:
        super().__init__(parent)
        self.entry = entry
        self.stack = AdapterStack(adapters=tuple(a for a in stack.adapters if a.weight))
        self._queue, self._jobs, self._memory_free = queue, jobs, memory_free
        self.choices = choices(entry, self.stack)
        self.format = self._default_format()
        self.name = default_name(entry, self.stack)
        self.folder = models
        self.options = ExportOptions()
        self.job: Job | None = None
        self.progress: Progress | None = None
        self.paused = False
        self.warnings: list[str] = []
        self._waits = False
        self._pace = Pace()
        queue.progressed.connect(self._progressed)
        queue.warned.connect(self._warned)
        queue.ended.connect(self._ended)
        jobs.environment_ready.connect(self._environment_ready)
        jobs.environment_failed.connect(self._environment_failed)

    def _default_format(self) -> str:
        keys = [choice.key for choice in self.choices]
        return SAFETENSORS if SAFETENSORS in keys else "q4_k_m" if "q4_k_m" in keys else ""

    # Choices --------------------------------------------------------------------------------------

    def choose(self, key: str) -> None:
        """Another format."""
        self.format = key
        self.changed.emit()

    def set_name(self, name: str) -> None:
        self.name = name.strip()
        self.changed.emit()

    def set_folder(self, folder: Path) -> None:
        self.folder = folder
        self.changed.emit()

    def set_options(self, options: ExportOptions) -> None:
        self.options = options
        self.changed.emit()

    @property
    def choice(self) -> ExportChoice | None:
        return next((choice for choice in self.choices if choice.key == self.format), None)

    @property
    def target(self) -> Path:
        """The folder, or the GGUF file in a folder of its own, that is made."""
        if self.format == SAFETENSORS:
            return self.folder / self.name
        return self.folder / self.name / f"{self.name}-{self.format.upper()}.gguf"

    @property
    def environment(self) -> str:
        """Where the task runs."""
        return "core" if self.format == SAFETENSORS else "export"

    @property
    def needs_installation(self) -> bool:
        """Whether the environment has to be installed first."""
        return bool(self.format) and not self._jobs.is_ready(self.environment)

    def need(self) -> ExportNeed:
        """What it takes. Asks the file system how much is free."""
        result, between = sizes(self.entry, self.format, self.options.dtype)
        memory = _MERGE_MEMORY + _IMPORTS if self.format == SAFETENSORS else _IMPORTS + 3 * largest(self.entry)
        if self.options.imatrix and self.format != SAFETENSORS:
            memory += between or result
        return ExportNeed(
            disk=result + between + _MARGIN,
            result=result,
            memory=memory,
            disk_free=free_at(self.folder),
            memory_free=self._memory_free(),
        )

    def problem(self) -> str:
        """Why it cannot start, in a sentence; "" when it can."""
        if not self.choices:
            return refusal(self.entry)
        if not self.name:
            return "It needs a name."
        if re.search(r'[<>:"/\\|?*\x00-\x1f]', self.name) or self.name.strip(". ") != self.name or len(self.name) > 120:
            return 'A name has at most 120 characters, none of < > : " / \\ | ? *, and no point at its ends.'
        if self.target.exists():
            return f"{self.target.name} exists there already. Choose another name."
        choice = self.choice
        if choice is not None and choice.imatrix and not self.options.imatrix:
            return f"{choice.title} needs an importance matrix: choose a text for it."
        need = self.need()
        return need.problem if need.disk > need.disk_free else ""

    # Running --------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        return self._waits or (self.job is not None and self._queue.is_active(self.job.id))

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
        title = f"Export {self.target.name}" if self.format != SAFETENSORS else f"Merge {self.name}"
        task = "merge" if self.format == SAFETENSORS else "export_gguf"
        self.job = self._queue.submit(task, title, self.plan(), environment=self.environment)
        self.changed.emit()

    def plan(self) -> MergePlan | ExportPlan:
        """What the task is given."""
        options = self.options
        if self.format == SAFETENSORS:
            return MergePlan(
                model=self.entry.path,
                stack=self.stack,
                target=str(self.target),
                dtype=options.dtype,
                shard_size=options.shard_size,
                base_name=self.entry.name,
            )
        return ExportPlan(
            model=self.entry.path,
            stack=self.stack,
            target=str(self.target),
            type=self.format,
            name=self.name,
            imatrix=options.imatrix,
            modelfile=options.modelfile,
        )

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

    @Slot(int, object)
    def _progressed(self, job: int, progress: Progress) -> None:
        if self.job is not None and job == self.job.id:
            self.progress = progress
            self._pace.add(progress)
            self.changed.emit()

    @Slot(int, str)
    def _warned(self, job: int, sentence: str) -> None:
        if self.job is not None and job == self.job.id:
            self.warnings.append(sentence)

    @Slot(object, object, object)
    def _ended(self, job: Job, result: object, error: WeftError | None) -> None:
        if self.job is None or job.id != self.job.id:
            return
        self.job = job
        if error is not None or job.state is not JobState.DONE:
            self.failed.emit(error or WeftError(ErrorKind.CRASHED, job.message, job.hint))
        else:
            kind = MergeResult if self.format == SAFETENSORS else ExportResult
            self.done.emit(msgspec.convert(result, kind))
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


def choices(entry: ModelEntry, stack: AdapterStack) -> list[ExportChoice]:
    """Formats that a model can be exported to; none for what cannot."""
    if entry.problem or entry.format not in (*FOLDERS, ModelFormat.GGUF):
        return []
    found = [
        ExportChoice(key=each.name, title=f"GGUF {each.name.upper()}", help=each.help, imatrix=each.imatrix)
        for each in TYPES.values()
    ]
    if entry.format in FOLDERS and stack.adapters:
        sentence = "A model folder like the base's, in its own precision: exact, and every program reads it."
        found.insert(0, ExportChoice(key=SAFETENSORS, title="Safetensors", help=sentence))
    return found


def refusal(entry: ModelEntry) -> str:
    """Why a model has no formats to export to."""
    if entry.problem:
        return entry.problem
    return (
        f"{entry.name} is quantized ({entry.format.value} {entry.quantization}): a merge into it would be rounded away. "
        "Export from the 16-bit model that it was made from."
    )


def default_name(entry: ModelEntry, stack: AdapterStack) -> str:
    """A name made from the base's and the adapters', as a file may be called."""
    base = entry.name.rpartition("/")[2].removesuffix(".gguf")
    if entry.format is ModelFormat.GGUF and entry.quantization:
        base = re.sub(rf"[-_. ]?{re.escape(entry.quantization)}$", "", base, flags=re.IGNORECASE)
    names = [base, *(a.name or Path(a.path).stem for a in stack.adapters if a.weight)]
    joined = "-".join(re.sub(r"[^\w.+-]+", "-", name).strip("-.") for name in names)
    return joined[:100].strip("-.") or "model"


def weights_of(entry: ModelEntry) -> int:
    """How many weights a model has, as far as its headers tell."""
    return entry.parameters or (entry.weight_bytes or entry.bytes) // 2


def sizes(entry: ModelEntry, key: str, dtype: str = "") -> tuple[int, int]:
    """Bytes of the result, and of what lies on disk beside it while it is made."""
    weights = weights_of(entry)
    if key == SAFETENSORS:
        own = entry.weight_bytes or entry.bytes
        return (weights * (4 if dtype == "float32" else 2) if dtype else own), 0
    kind = TYPES.get(key)
    if kind is None:
        return 0, 0
    result = int(weights * kind.bits / 8)
    return result, 0 if kind.direct and entry.format is not ModelFormat.GGUF else weights * 2


def largest(entry: ModelEntry) -> int:
    """Bytes of the largest tensor in float32, or a guess at it."""
    shape = entry.shape
    widest = max(shape.vocabulary, shape.intermediate)
    return 4 * widest * shape.hidden if widest and shape.hidden else weights_of(entry) // 10


def free_at(folder: Path) -> int:
    """Bytes free on the drive on which a folder lies, or would lie."""
    for place in (folder, *folder.parents):
        try:
            return shutil.disk_usage(place).free
        except OSError:
            continue
    return 0
