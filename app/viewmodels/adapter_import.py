"""Bringing adapters into the library from the window: a queue of what was dropped, its progress, and each one's end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec
from PySide6.QtCore import QObject, Signal, Slot

from app.core.adapter_import import ImportOptions, ImportResult, Outcome
from app.core.errors import WeftError
from app.core.jobs import Progress
from app.store.database import Database

if TYPE_CHECKING:
    from app.workers.adapter_import_worker import AdapterImportWorker

SUFFIXES = (
    ".safetensors",
    ".bin",
    ".pt",
    ".gguf",
    ".zip",
    ".tar",
    ".tgz",
    ".gz",
    ".bz2",
    ".xz",
)
CLOSE_MS = 10_000
HERE = (Outcome.ADDED, Outcome.IN_PLACE, Outcome.PRESENT, Outcome.DUPLICATE)


def can_import(paths: Iterable[Path]) -> bool:
    """Whether these could be adapters: folders, weight files, archives. Looks at names and kinds only."""
    listed = list(paths)
    return bool(listed) and all(path.suffix.lower() in SUFFIXES or path.is_dir() for path in listed)


class Batch(msgspec.Struct, kw_only=True):
    """What was handed over at once.

    Attributes:
        to_stack: those that are in the library then join the stack of the loaded model.
        alphas: by source, as the person said. duplicates: copy what the library has already, too.
        only: sources of the earlier results that this is about; empty for all.
    """

    paths: list[Path]
    to_stack: bool = False
    alphas: dict[str, float] = {}
    duplicates: bool = False
    only: frozenset[str] = frozenset()


class Imported(msgspec.Struct, frozen=True, kw_only=True):
    """One batch's end. error: none of it could be looked at (the disk, the database)."""

    batch: Batch
    results: list[ImportResult]
    error: WeftError | None = None

    @property
    def here(self) -> list[ImportResult]:
        """Those that are in the library now, new or not."""
        return [result for result in self.results if result.outcome in HERE and result.entry is not None]

    def of(self, outcome: Outcome) -> list[ImportResult]:
        return [result for result in self.results if result.outcome is outcome]


class AdapterImports(QObject):
    """Imports batches one after the other.

    Args:
        folder: Weft's own folder of adapters. roots: folders that are indexed now.

    Signals:
        changed: an import began, moved on or ended: see `progress`.
        ended(Imported): a batch ended. library_changed: something was copied: index it.
        alpha_wanted(list of ImportResult): nobody recorded their alpha; `give_alphas` goes on with them.
    """

    changed = Signal()
    ended = Signal(object)
    library_changed = Signal()
    alpha_wanted = Signal(list)

    def __init__(
        self, database: Database, folder: Path, roots: Callable[[], list[str]], parent: QObject | None = None
    ) -> None:
        super().__init__(parent)
        self._database = database
        self._folder = folder
        self._roots = roots
        self._waiting: list[Batch] = []
        self._batch: Batch | None = None
        self._worker: AdapterImportWorker | None = None
        self._asked: dict[
            str, tuple[Path, bool]
        ] = {}  # sources that wait for alpha: what was given, whether for the stack
        self._closing = False
        self.progress: Progress | None = None

    @property
    def busy(self) -> bool:
        return self._worker is not None or bool(self._waiting)

    @property
    def folder(self) -> Path:
        """Where copies go."""
        return self._folder

    def add(self, paths: Sequence[Path], *, to_stack: bool = False) -> None:
        """Import these; `ended` tells."""
        self._submit(Batch(paths=list(paths), to_stack=to_stack))

    def add_again(self, sources: Mapping[str, Path]) -> None:
        """Copy adapters that the library has under another name, too. sources: to what was given."""
        paths = list(dict.fromkeys(sources.values()))
        self._submit(Batch(paths=paths, duplicates=True, only=frozenset(sources)))

    def give_alphas(self, alphas: Mapping[str, float]) -> None:
        """The person said alpha, by source. Those of `alpha_wanted` that are left out are not imported."""
        known = {source: self._asked.pop(source) for source in alphas if source in self._asked}
        paths = list(dict.fromkeys(path for path, _ in known.values()))
        if paths:
            to_stack = any(stacked for _, stacked in known.values())
            self._submit(
                Batch(paths=paths, to_stack=to_stack, alphas={s: alphas[s] for s in known}, only=frozenset(known))
            )

    def ask_alpha(self, path: Path, rank: int) -> None:
        """An adapter of the library that lacks alpha: ask for it; a copy of the library's own will have it."""
        self._asked[str(path)] = (path, False)
        self.alpha_wanted.emit([ImportResult(str(path), Outcome.NEEDS_ALPHA, rank=rank)])

    def cancel(self) -> None:
        """Stop the import that runs and forget those that wait. What is complete stays."""
        self._waiting.clear()
        if self._worker is not None:
            self._worker.stop()

    def close(self) -> None:
        """For the window's end."""
        self._closing = True
        self.cancel()
        if self._worker is not None:
            self._worker.wait(CLOSE_MS)

    # Inside

    def _submit(self, batch: Batch) -> None:
        self._waiting.append(batch)
        self._next()

    def _next(self) -> None:
        if self._worker is not None or not self._waiting or self._closing:
            return
        from app.workers.adapter_import_worker import AdapterImportWorker

        batch = self._batch = self._waiting.pop(0)
        options = ImportOptions(
            folder=str(self._folder), alphas=batch.alphas, roots=tuple(self._roots()), duplicates=batch.duplicates
        )
        worker = self._worker = AdapterImportWorker(batch.paths, options, self._database, self)
        worker.progressed.connect(self._progressed)
        worker.ended.connect(self._ended)
        worker.finished.connect(self._finished)
        count = len(batch.paths)
        self.progress = Progress(phase=f"Reading {batch.paths[0].name}" if count == 1 else f"Reading {count} items")
        worker.start()
        self.changed.emit()

    @Slot(str, object, object)
    def _progressed(self, name: str, done: int, of: int) -> None:
        self.progress = Progress(phase=f"Adding {name}", done=done, total=of, unit="bytes")
        self.changed.emit()

    @Slot(list, object)
    def _ended(self, results: list[ImportResult], error: WeftError | None) -> None:
        batch = self._batch
        if batch is None or self._closing:
            return
        if batch.only:
            results = [result for result in results if result.source in batch.only]
        found = Imported(batch=batch, results=results, error=error)
        for result in found.of(Outcome.NEEDS_ALPHA):
            self._asked[result.source] = (given(result.source, batch.paths), batch.to_stack)
        if found.of(Outcome.ADDED):
            self.library_changed.emit()
        self.ended.emit(found)
        if asked := found.of(Outcome.NEEDS_ALPHA):
            self.alpha_wanted.emit(asked)

    @Slot()
    def _finished(self) -> None:
        if self._worker is not None:
            self._worker.deleteLater()
        self._worker = self._batch = self.progress = None
        self.changed.emit()
        self._next()


def given(source: str, paths: Sequence[Path]) -> Path:
    """Which of the paths that were handed over a result's source comes from (`pirate.zip/lora-a` from `pirate.zip`)."""
    place = Path(source)
    absolute = [path.expanduser().absolute() for path in paths]
    return next((path for path in absolute if path == place or path in place.parents), place)


Tone = Literal["info", "positive", "warning", "negative"]


def words(result: ImportResult) -> tuple[str, Tone]:
    """What became of one, in a sentence, and its tone."""
    entry = result.entry
    match result.outcome:
        case Outcome.ADDED:
            text = "Added to the library."
        case Outcome.IN_PLACE | Outcome.PRESENT:
            text = "In the library already: it lies in a folder that Weft indexes."
        case Outcome.DUPLICATE:
            text = f"The library has it already, as {entry.name if entry is not None else 'another'}: the same tensors."
            return text, "info"
        case Outcome.NEEDS_ALPHA:
            return "Its alpha is not recorded, and was not said. It is not in the library.", "warning"
        case _:
            return (str(result.error) if result.error is not None else "It could not be added."), "negative"
    return " ".join([text, *result.notes]), "warning" if result.notes else "positive"


def summary(found: Imported) -> tuple[str, Tone]:
    """A batch in one sentence, and its tone."""
    if found.error is not None:
        return str(found.error), "negative"
    if len(found.results) == 1:
        text, tone = words(found.results[0])
        name = found.results[0].entry.name if found.results[0].entry else Path(found.results[0].source).name
        return f"{name}: {text}", tone
    counts = (
        (len(found.of(Outcome.ADDED)), "added"),
        (len(found.of(Outcome.PRESENT)) + len(found.of(Outcome.IN_PLACE)), "in the library already"),
        (len(found.of(Outcome.DUPLICATE)), "the same as one that is there"),
        (len(found.of(Outcome.NEEDS_ALPHA)), "without alpha"),
        (len(found.of(Outcome.FAILED)), "not added"),
    )
    parts = [f"{count} {what}" for count, what in counts if count]
    if not parts:
        return "Nothing was added.", "info"
    return f"Adapters: {', '.join(parts)}.", "warning" if counts[3][0] or counts[4][0] else "positive"
