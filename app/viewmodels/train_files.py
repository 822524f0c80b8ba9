"""A run's settings as files: RUN.toml read and written, and a folder for another machine. In a thread of its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from PySide6.QtCore import QObject, Signal, Slot

from app.core.errors import ErrorKind, WeftError
from app.core.library import ModelEntry
from app.core.paths import resources
from app.store.toml_text import dump
from app.training import run_export, run_file
from app.training.run_config import RunConfig, TrainParameters
from app.viewmodels.background import Background


class RunFiles(QObject):
    """Reads and writes what a run is made of.

    Args:
        find_model: a model of the library by name or path; raises WeftError NOT_FOUND.

    Signals:
        opened(RunConfig, ModelEntry or None, str): a RUN.toml; the sentence says what of it is not there.
        written(str): a sentence for what was written. failed(WeftError).
    """

    opened = Signal(object, object, str)
    written = Signal(str)
    failed = Signal(object)

    def __init__(self, find_model: Callable[[str], ModelEntry], parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._find_model = find_model
        self._background = Background(self)
        self._background.done.connect(self._done)

    def open(self, path: Path) -> None:
        """Read a RUN.toml; `opened` follows."""
        find = self._find_model

        def work() -> tuple[RunConfig, ModelEntry | None, str]:
            config = run_file.read(path)
            try:
                return config, find(config.model.path) if config.model.path else None, ""
            except WeftError as error:
                return config, None, str(error)

        self._background.run("open", work)

    def save(self, config: RunConfig, path: Path) -> None:
        """Write a RUN.toml that `weft train` takes; `written` follows."""

        def work() -> str:
            _write(path, dump(run_file.to_table(config)))
            return f"Saved {path.name}. The same run without the window: weft train {path}"

        self._background.run("save", work)

    def export(self, config: RunConfig, model: ModelEntry, folder: Path) -> None:
        """Write the folder that trains on another machine; `written` follows."""
        parameters = TrainParameters(config=config, model=model)
        text = dump(run_file.to_table(config))

        def work() -> str:
            pins = run_export.requirements_of(resources() / "environments" / "core.toml")
            run_export.export(parameters, folder, pins, text)
            return f"{folder} holds the run with its data. Its README says how to start it on the other machine."

        self._background.run("export", work)

    def close(self) -> None:
        """Wait for what is being written."""
        self._background.finish()

    @Slot(object, object, object)
    def _done(self, key: object, result: object, error: WeftError | None) -> None:
        if error is not None:
            self.failed.emit(error)
        elif key == "open" and isinstance(result, tuple):
            self.opened.emit(*result)
        else:
            self.written.emit(str(result))


def _write(path: Path, text: str) -> None:
    staged = path.with_name(f".partial-{path.name}")
    try:
        with staged.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    except OSError as error:
        staged.unlink(missing_ok=True)
        raise WeftError(
            ErrorKind.PERMISSION, f"{path} cannot be written: {error.strerror}.", "Choose another folder."
        ) from error
