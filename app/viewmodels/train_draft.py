"""What is about to be trained: base, data, method and settings, checked as they change, with a preview of the data."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from PySide6.QtCore import QObject, QTimer, Signal, Slot

from app.core.errors import ErrorKind, WeftError
from app.core.jobs import Job, Progress
from app.core.library import ModelEntry, ModelFormat
from app.core.memory import Machine
from app.core.options import OptionValue
from app.store.toml_text import dump
from app.training import methods, run_file
from app.training.data_config import DataConfig, PreviewParameters, PreviewResult
from app.training.estimate import RunEstimate, estimate
from app.training.run_config import MethodConfig, ModelConfig, OutputConfig, RunConfig, TrainConfig, TrainParameters
from app.viewmodels.task_lane import TaskLane
from app.viewmodels.tasks import TaskQueue
from app.viewmodels.units import readable_bytes

PREVIEW_MS = 500
PREVIEW_ROWS = 2_000  # read for a preview; a run reads all
TRAINABLE = (ModelFormat.SAFETENSORS, ModelFormat.TORCH_BIN, ModelFormat.GGUF)
PRESETS: dict[str, tuple[dict[str, OptionValue], dict[str, OptionValue]]] = {
    # name: changed fields of [method] and [train]
    "Balanced": ({}, {}),
    "Quick try": ({"r": 8, "alpha": 16.0}, {"epochs": 1.0}),
    "Voice or style": ({"r": 16, "alpha": 32.0}, {"epochs": 3.0}),
    "Thorough": ({"r": 32, "alpha": 64.0, "rslora": False, "dora": True}, {"epochs": 4.0, "learning_rate": 1e-4}),
    # Models of a few million weights learn nothing at the usual learning rate.
    "Tiny model": ({}, {"learning_rate": 3e-3, "batch_size": 8, "gradient_accumulation": 1, "epochs": 12.0}),
    "Least memory": (
        {"r": 8, "alpha": 16.0},
        {"batch_size": 1, "gradient_accumulation": 16, "gradient_checkpointing": True, "optimizer": "adamw_8bit"},
    ),
}
DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt", ".md")


class TrainDraft(QObject):
    """A run that is being set up.

    Args:
        lane: runs the task `preview_data`, the latest question alone.
        adapters: the folder in which the new adapter appears. machine: what there is.

    Signals:
        changed: anything did. previewed: the preview is another one, or failed (`preview_error`).
    """

    changed = Signal()
    previewed = Signal()

    def __init__(
        self,
        *,
        queue: TaskQueue,
        lane: TaskLane,
        adapters: Path,
        machine: Callable[[], Machine],
        parent: QObject | None = None,
    ) -> None:
        super().__init__(parent)
        self._queue = queue
        self._lane = lane
        self._adapters = adapters
        self._machine = machine
        self.model: ModelEntry | None = None
        self.files: tuple[str, ...] = ()
        self.name = ""
        self._name_typed = False
        self.values: dict[str, dict[str, OptionValue]] = {"model": {}, "data": {}, "method": {}, "train": {}}
        self.mapping: dict[str, str] = {}
        self.result: PreviewResult | None = None
        self.preview_error: WeftError | None = None
        self.previewing = False
        self._previewed_for: PreviewParameters | None = None
        lane.answered.connect(self._preview_came)
        lane.failed.connect(self._preview_failed)
        self._timer = QTimer(self)
        self._timer.setSingleShot(True)
        self._timer.setInterval(PREVIEW_MS)
        self._timer.timeout.connect(self._preview)

    # Choices --------------------------------------------------------------------------------------

    def set_model(self, entry: ModelEntry | None) -> None:
        """Train on this model."""
        self.model = entry
        self._rename()
        self._touched()

    def add_files(self, paths: list[Path]) -> list[str]:
        """Take data files and folders. Returns names of those that hold no data that training reads."""
        refused = [path.name for path in paths if not (path.is_dir() or path.suffix.lower() in DATA_SUFFIXES)]
        taken = [str(path.absolute()) for path in paths if path.name not in refused]
        self.files = tuple(dict.fromkeys([*self.files, *taken]))
        self._rename()
        self._touched()
        return refused

    def remove_file(self, path: str) -> None:
        """Take a file out."""
        self.files = tuple(file for file in self.files if file != path)
        self._touched()

    def set_values(self, section: str, values: Mapping[str, OptionValue]) -> None:
        """Changed fields of a section: `model`, `data`, `method` or `train`."""
        self.values[section] = dict(values)
        self._touched()

    def set_mapping(self, mapping: Mapping[str, str]) -> None:
        """Which column is which field, where they differ."""
        self.mapping = {field: column for field, column in mapping.items() if column}
        self._touched()

    def set_name(self, name: str) -> None:
        """The new adapter's name."""
        self._name_typed = bool(name.strip())
        self.name = name.strip()
        self._rename()
        self.changed.emit()

    def use_preset(self, name: str) -> None:
        """Set method and settings to a preset's."""
        method, train = PRESETS[name]
        self.values["method"], self.values["train"] = dict(method), dict(train)
        self._touched()

    def use_config(self, config: RunConfig) -> None:
        """Begin with the settings of an earlier run; the model stays the one that is chosen."""
        for section in ("model", "data", "method", "train"):
            part = getattr(config, section)
            default = type(part)()
            skip = (
                ("path", "files", "mapping", "held_out_files", "max_length", "packing", "seed")
                if section in ("model", "data")
                else ()
            )
            self.values[section] = {
                info.name: getattr(part, info.name)
                for info in msgspec.structs.fields(part)
                if info.name not in skip and getattr(part, info.name) != getattr(default, info.name)
            }
        self.files, self.mapping = config.data.files, dict(config.data.mapping)
        self._name_typed = False
        self._rename()
        self._touched()

    def _rename(self) -> None:
        if self._name_typed:
            return
        stem = Path(self.files[0]).stem if self.files else ""
        model = self.model.name.rpartition("/")[2] if self.model is not None else ""
        joined = "-".join(re.sub(r"[^\w.+-]+", "-", part).strip("-.") for part in (model, stem) if part)[:80].strip(
            "-."
        )
        name, number = joined, 2
        while name and self._taken(name):
            name, number = f"{joined}-{number}", number + 1
        self.name = name

    def _taken(self, name: str) -> bool:
        return (self._adapters / name).exists() or (self._adapters / f"{name}.training").exists()

    def _touched(self) -> None:
        self.changed.emit()
        self._timer.start()

    # What follows ---------------------------------------------------------------------------------

    def config(self) -> RunConfig:
        """The run as it stands. Raises msgspec.ValidationError for values out of range."""
        path = self.model.path if self.model is not None else ""
        data = msgspec.convert({**self.values["data"], "files": self.files, "mapping": self.mapping}, DataConfig)
        return RunConfig(
            model=msgspec.convert({**self.values["model"], "path": path}, ModelConfig),
            data=data,
            method=msgspec.convert(self.values["method"], MethodConfig),
            train=msgspec.convert(self.values["train"], TrainConfig),
            output=OutputConfig(dir=str(self._adapters / self.name) if self.name else ""),
        )

    def problem(self) -> str:
        """Why it cannot start, in a sentence; "" when it can."""
        if self.model is None:
            return "Choose the model to train on."
        if self.model.problem or self.model.format not in TRAINABLE:
            return f"{self.model.name} cannot be trained on ({self.model.format.value}). Choose a 16-bit model or a GGUF file."
        if not self.files:
            return "Add the examples to train on."
        if re.search(r'[<>:"/\\|?*\x00-\x1f]', self.name) or not self.name or len(self.name) > 120:
            return "The new adapter needs a name that a folder can have."
        if self._taken(self.name):
            return f"There is an adapter or an unfinished run called {self.name} already."
        try:
            methods.check(self.config())
        except (WeftError, msgspec.ValidationError) as error:
            return str(error)
        if self.preview_error is not None and self.preview_error.kind is not ErrorKind.CANCELLED:
            return str(self.preview_error)
        report = self.result.report if self.result is not None and not self.previewing else None
        if report is not None and not report.examples and not report.partial:
            return "None of these rows can be trained on. The list beside says why."
        return ""

    def notes(self) -> list[str]:
        """What works, with a caveat."""
        try:
            return methods.check(self.config())
        except (WeftError, msgspec.ValidationError):
            return []

    def estimate(self) -> RunEstimate | None:
        """What it will take; None before a model is chosen."""
        if self.model is None:
            return None
        tokens = self.result.report.tokens if self.result is not None else 0
        try:
            return estimate(self.config(), self.model, tokens=tokens)
        except (WeftError, msgspec.ValidationError):
            return None

    def estimate_words(self) -> tuple[str, bool]:
        """The estimate as a sentence, and whether it fits into what is free."""
        found = self.estimate()
        if found is None:
            return "", True
        machine = self._machine()
        device = self.values["model"].get("device", "auto")
        free = machine.vram_free if machine.gpus and device != "cpu" else machine.ram_free
        where = "graphics memory" if machine.gpus and device != "cpu" else "memory"
        words = (
            f"About {readable_bytes(found.total)} of {where}, {readable_bytes(free)} free; "
            f"{found.trainable:,} parameters are trained; a checkpoint takes {readable_bytes(found.checkpoint)}."
        )
        return words, not free or found.total <= free

    # Preview --------------------------------------------------------------------------------------

    @Slot()
    def _preview(self) -> None:
        if self.model is None or not self.files:
            self.result, self.preview_error, self.previewing, self._previewed_for = None, None, False, None
            self.previewed.emit()
            return
        try:
            config = self.config()
        except (WeftError, msgspec.ValidationError):
            return  # the field says what is wrong
        wanted = PreviewParameters(data=config.data_config(), model=self.model.path, first=20, most_rows=PREVIEW_ROWS)
        if wanted == self._previewed_for:
            return
        self._previewed_for = wanted
        self.previewing = True
        self._lane.ask(wanted, "preview_data", wanted)
        self.previewed.emit()

    @Slot(object, object)
    def _preview_came(self, key: object, result: object) -> None:
        if key == self._previewed_for:
            self._show_preview(msgspec.convert(result, PreviewResult), None)

    @Slot(object, object)
    def _preview_failed(self, key: object, error: WeftError) -> None:
        if key == self._previewed_for:
            self._show_preview(None, error)

    def _show_preview(self, result: PreviewResult | None, error: WeftError | None) -> None:
        self.previewing, self.result, self.preview_error = False, result, error
        self.previewed.emit()
        self.changed.emit()

    def preview_again(self) -> None:
        """Read the data anew: its files may have changed."""
        self._previewed_for = None
        self._preview()

    # Starting -------------------------------------------------------------------------------------

    def start(self) -> Job:
        """Submit the run. Raises WeftError when it cannot be."""
        if problem := self.problem():
            raise WeftError(ErrorKind.BAD_INPUT, problem, "Correct it, then start.")
        assert self.model is not None
        config = self.config()
        parameters = TrainParameters(
            config=config, model=self.model, resume="if_there", run_file=dump(run_file.to_table(config))
        )
        device = config.model.device
        resource = "gpu0" if self._machine().gpus and device != "cpu" else "cpu"
        job = self._queue.submit("train", f"Train {self.name}", parameters, environment="core", resource=resource)
        self._name_typed = False
        self._rename()
        self.changed.emit()
        return job


class RunState(QObject):
    """A run as it goes: its metrics by step, samples and notes.

    Signals:
        changed: something was added.
    """

    changed = Signal()

    def __init__(self, job: Job, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self.job = job
        self.progress: Progress | None = None
        self.metrics: dict[str, dict[int, float]] = {}
        self.samples: list[tuple[int, tuple[tuple[str, str], ...]]] = []
        self.notes: list[str] = []
        self.paused = False
        self.error: WeftError | None = None
        self.result: dict[str, Any] | None = None

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Take a metric; a resumed run says some steps again."""
        for name, value in values.items():
            self.metrics.setdefault(name, {})[step] = value

    def series(self, name: str) -> tuple[tuple[float, float], ...]:
        """Points of a metric in order of step."""
        return tuple((float(step), value) for step, value in sorted(self.metrics.get(name, {}).items()))

    def latest(self, name: str) -> float | None:
        """The last value of a metric."""
        found = self.metrics.get(name)
        return found[max(found)] if found else None
