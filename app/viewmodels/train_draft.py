"""What is about to be trained: base, data, method and settings, checked as they change, with a preview of the data."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
from PySide6.QtCore import QObject, QTimer, Signal, Slot

from app.core.errors import ErrorKind, WeftError
from app.core.jobs import Job
from app.core.library import ModelEntry
from app.core.memory import Machine
from app.core.options import OptionValue
from app.store.toml_text import dump
from app.training import methods, run_file
from app.training.data_config import DataConfig, PreviewParameters, PreviewResult
from app.training.estimate import RunEstimate, check_room, estimate
from app.training.module_names import Modules, ModulesParameters
from app.training.run_config import MethodConfig, ModelConfig, OutputConfig, RunConfig, TrainConfig, TrainParameters
from app.viewmodels.task_lane import TaskLane
from app.viewmodels.tasks import TaskQueue
from app.viewmodels.train_presets import presets
from app.viewmodels.units import readable_bytes, readable_seconds

PREVIEW_MS = 500
PREVIEW_ROWS = 2_000  # read for a preview; a run reads all
DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt", ".md")


class TrainDraft(QObject):
    """A run that is being set up.

    Args:
        lane: runs the task `preview_data`, the latest question alone.
        adapters: the folder in which the new adapter appears. machine: what there is.

    Signals:
        changed: anything did. previewed: the preview is another one, or failed (`preview_error`).
        modules_known: `modules` is another one.
    """

    changed = Signal()
    previewed = Signal()
    modules_known = Signal()

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
        self.held_out_files: tuple[str, ...] = ()
        self.modules: Modules | None = None
        self._modules_asked = ""
        self._submitted: dict[str, int] = {}  # adapter -> job, of this session
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
        """Train on this model; a preset that is chosen is fitted to it."""
        chosen = self.preset
        if self.model is None or entry is None or self.model.path != entry.path:
            self.modules, self._modules_asked = None, ""
            self.modules_known.emit()
        self.model = entry
        if chosen:
            self._take_preset(chosen)
        self._rename()
        self._touched()

    def add_files(self, paths: list[Path], *, held_out: bool = False) -> list[str]:
        """Take data files and folders, to train on or to measure on. Returns names of those that training cannot read."""
        refused = [path for path in paths if not (path.is_dir() or path.suffix.lower() in DATA_SUFFIXES)]
        taken = [str(path.absolute()) for path in paths if path not in refused]
        if held_out:
            self.held_out_files = tuple(dict.fromkeys([*self.held_out_files, *taken]))
        else:
            self.files = tuple(dict.fromkeys([*self.files, *taken]))
        self._rename()
        self._touched()
        return [path.name for path in refused]

    def remove_file(self, path: str, *, held_out: bool = False) -> None:
        """Take a file out. With the last one goes which column is what."""
        if held_out:
            self.held_out_files = tuple(file for file in self.held_out_files if file != path)
        else:
            self.files = tuple(file for file in self.files if file != path)
        if not self.files:
            self.mapping = {}
        self._rename()
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

    @property
    def preset(self) -> str:
        """The preset whose settings these are; "" for settings of one's own."""
        now = (self.values["method"], self.values["train"])
        return next((name for name, preset in presets(self.model).items() if preset == now), "")

    def use_preset(self, name: str) -> None:
        """Set method and settings to a preset's."""
        self._take_preset(name)
        self._touched()

    def _take_preset(self, name: str) -> None:
        method, train = presets(self.model)[name]
        self.values["method"], self.values["train"] = dict(method), dict(train)

    def set_targets(self, names: list[str]) -> None:
        """Train these modules; none named means all linear ones."""
        method = {name: value for name, value in self.values["method"].items() if name != "targets"}
        self.set_values("method", {**method, "targets": ", ".join(names)} if names else method)

    @property
    def targets(self) -> list[str]:
        """Names of the chosen modules; empty for all linear ones."""
        found = run_file.names(str(self.values["method"].get("targets", "all-linear")))
        return [] if found == ["all-linear"] else found

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
        self.held_out_files = config.data.held_out_files
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
        job = self._submitted.get(name)
        if job is not None and self._queue.is_active(job):
            return True  # it waits, and has no folder yet
        return (self._adapters / name).exists() or (self._adapters / f"{name}.training").exists()

    def _touched(self) -> None:
        self.changed.emit()
        self._timer.start()

    # What follows ---------------------------------------------------------------------------------

    def config(self) -> RunConfig:
        """The run as it stands. Raises msgspec.ValidationError for values out of range."""
        path = self.model.path if self.model is not None else ""
        given = {"files": self.files, "mapping": self.mapping, "held_out_files": self.held_out_files}
        data = msgspec.convert({**self.values["data"], **given}, DataConfig)
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
        if self.model.problem:
            return f"{self.model.name} cannot be used: {self.model.problem}"
        if self.model.format not in methods.TRAINABLE:
            kind = self.model.format.value.upper()
            return f"{self.model.name} cannot be trained on ({kind}). Choose a 16-bit, GPTQ, AWQ or HQQ model or a GGUF file."
        if not self.files:
            return "Add the examples to train on."
        if re.search(r'[<>:"/\\|?*\x00-\x1f]', self.name) or not self.name or len(self.name) > 120:
            return "The new adapter needs a name that a folder can have."
        if self._taken(self.name):
            return f"There is an adapter or an unfinished run called {self.name} already."
        try:
            config = self.config()
            methods.check(config)
            methods.check_base(config, self.model)
            methods.check_machine(config, len(self._machine().gpus))
            check_room(config, self.model, card=self._on_card)
        except (WeftError, msgspec.ValidationError) as error:
            return str(error)
        if self.preview_error is not None and self.preview_error.kind is not ErrorKind.CANCELLED:
            return str(self.preview_error)
        report = self.result.report if self.result is not None and not self.previewing else None
        if report is not None and not report.examples and not report.partial:
            return "None of these rows can be trained on. The list beside says why."
        return self._wrong_kind(config)

    def _wrong_kind(self, config: RunConfig) -> str:
        """Whether the data is of the kind that the objective learns from."""
        report = self.result.report if self.result is not None and not self.previewing else None
        kinds = {file.format for file in report.files if file.format} if report is not None else set[str]()
        if not kinds:
            return ""
        if config.train.objective == "sft" and "preference" in kinds:
            return "The data holds preferences (chosen, rejected): choose dpo or orpo at Learn by."
        if config.train.objective != "sft" and "preference" not in kinds:
            return f"{config.train.objective} learns from rows with prompt, chosen and rejected, and the data has none. Choose sft at Learn by."
        return ""

    def notes(self) -> list[str]:
        """What works, with a caveat."""
        try:
            config = self.config()
            return [*methods.check(config), *methods.check_machine(config, len(self._machine().gpus))]
        except (WeftError, msgspec.ValidationError):
            return []

    def estimate(self) -> RunEstimate | None:
        """What it will take; None before a model is chosen."""
        if self.model is None:
            return None
        report = self.result.report if self.result is not None else None
        whole = report if report is not None and not report.partial and report.examples else None
        share = 1 - whole.held_out / whole.examples if whole is not None else 0.0
        try:
            return estimate(
                self.config(),
                self.model,
                tokens=round(whole.tokens * share) if whole is not None else 0,
                examples=round(whole.examples * share) if whole is not None else 0,
                flops=self.modules.flops if self.modules is not None else 0.0,
                card=self._on_card,
            )
        except (WeftError, msgspec.ValidationError):
            return None

    @property
    def _on_card(self) -> bool:
        return bool(self._machine().gpus) and self.values["model"].get("device", "auto") != "cpu"

    def estimate_words(self) -> tuple[str, bool]:
        """The estimate as a sentence, and whether it fits into what is free."""
        found = self.estimate()
        if found is None:
            return "", True
        machine = self._machine()
        free = machine.vram_free if self._on_card else machine.ram_free
        where = "graphics memory" if self._on_card else "memory"
        time = f"Takes about {readable_seconds(found.seconds)}. " if found.seconds else ""
        words = time + (
            f"About {readable_bytes(found.total)} of {where}, {readable_bytes(free)} free; "
            f"{found.trainable:,} parameters are trained; a checkpoint takes {readable_bytes(found.checkpoint)}."
            + (f" The optimizer's state takes {readable_bytes(found.file)} of the disk." if found.file else "")
        )
        return words, not free or found.total <= free

    # Preview --------------------------------------------------------------------------------------

    @Slot()
    def _preview(self) -> None:
        if self.model is None or not self.files:
            self.result, self.preview_error, self.previewing, self._previewed_for = None, None, False, None
            self.previewed.emit()
            self._ask_further()
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

    def _ask_further(self) -> None:
        """After the first rows: the model's modules, then all rows. One question at a time, the latest goes before."""
        if self.model is None or self.previewing:
            return
        if self._modules_asked != self.model.path and not self.model.problem and self.model.format in methods.TRAINABLE:
            self._modules_asked = self.model.path
            wanted = ModulesParameters(model=self.model)
            self._lane.ask(wanted, "train_modules", wanted)
        elif self.result is not None and self.result.report.partial and self._previewed_for is not None:
            whole = msgspec.structs.replace(self._previewed_for, most_rows=0)
            self._lane.ask(whole, "preview_data", whole)

    def _is_whole(self, key: object) -> bool:
        """Whether an answer is that of the preview over all rows."""
        now = self._previewed_for
        return now is not None and key == msgspec.structs.replace(now, most_rows=0)

    @Slot(object, object)
    def _preview_came(self, key: object, result: object) -> None:
        if isinstance(key, ModulesParameters):
            if self.model is not None and key.model.path == self.model.path:
                self.modules = msgspec.convert(result, Modules)
                self.modules_known.emit()
                self.changed.emit()
        elif key == self._previewed_for or self._is_whole(key):
            self._show_preview(msgspec.convert(result, PreviewResult), None)
        else:
            return
        self._ask_further()

    @Slot(object, object)
    def _preview_failed(self, key: object, error: WeftError) -> None:
        if isinstance(key, ModulesParameters):
            self._ask_further()  # its names are not offered then; the run itself says what is wrong with the model
        elif key == self._previewed_for:
            self._show_preview(None, error)
            self._ask_further()

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
        resource = "gpu0" if self._on_card else "cpu"
        job = self._queue.submit("train", f"Train {self.name}", parameters, environment="core", resource=resource)
        self._submitted[self.name] = job.id
        self._name_typed = False
        self._rename()
        self.changed.emit()
        return job
