"""Bring adapters into the library: folders, lone files, GGUF adapters and archives, many at once, each with its own end.

What is dropped is copied into Weft's own folder of adapters (or, where a person asks for it, left in place and indexed there):
downloads folders are tidied, and an adapter is small. A foreign file or folder is never written to. A copy is a PEFT
folder of its own, with the weights byte by byte as they were; where nobody recorded alpha, the person's goes into the
adapter_config.json of the copy.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

import msgspec

from app.core import adapter_stage
from app.core.adapter_content import AdapterContent, content_of
from app.core.adapter_file import WEIGHT_FILES, AdapterFile, read_adapter_file
from app.core.adapter_note import AdapterNote
from app.core.archives import archive_stem, is_archive, unpack
from app.core.errors import ErrorKind, WeftError
from app.core.library import AdapterEntry, AdapterFormat

_WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")
_MAX_FOUND = 256  # adapters of one dropped folder
_MAX_FOLDERS = 2000
_DEPTH = 6


class Outcome(StrEnum):
    """How an import ended."""

    ADDED = "added"  # it was copied into the library
    IN_PLACE = "in place"  # it is an adapter, and stays where it is: the caller adds its folder to the roots
    PRESENT = "present"  # it lies in a folder that the library indexes already
    DUPLICATE = "duplicate"  # the library has the same tensors under another name
    NEEDS_ALPHA = "needs alpha"  # ask the person, then import the same `source` again with `alphas`
    FAILED = "failed"


class ImportOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to import.

    Attributes:
        folder: Weft's own folder of adapters (`Paths.adapters`), made when it is missing.
        copy: False leaves things where they are (archives are unpacked all the same).
        alphas: alpha by `source`, as an earlier result named it, for adapters that do not record it.
        roots: folders that the library indexes already.
        duplicates: True copies what the library has already, too.
        run, title: id and name of the training run that made it, for the note beside it.
    """

    folder: str
    copy: bool = True
    alphas: dict[str, float] = {}
    roots: tuple[str, ...] = ()
    duplicates: bool = False
    run: str = ""
    title: str = ""


class ImportResult(NamedTuple):
    """What became of one adapter.

    Attributes:
        source: what was given; of several in a folder or archive, with the way inside (`pirate.zip/lora-a`).
        entry: of the adapter as it lies now; of a duplicate, what the library had before. None when it failed.
        rank: to show with the question for alpha: usual values are the rank and twice the rank.
        error: why it failed. notes: sentences worth showing.
    """

    source: str
    outcome: Outcome
    entry: AdapterEntry | None = None
    rank: int = 0
    error: WeftError | None = None
    notes: tuple[str, ...] = ()


Same = Callable[[AdapterFile], AdapterEntry | None]


def import_adapters(
    paths: Sequence[Path],
    options: ImportOptions,
    *,
    same: Same = lambda _: None,
    progress: Callable[[str, int, int], None] = lambda _name, _done, _of: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> list[ImportResult]:
    """Import each; one that fails stops no other.

    Args:
        same: the adapter of the library with the same content (`AdapterStore.same_as`).
        progress: told a name, and bytes done of so many.
        cancelled: asked often; what is not finished then leaves nothing behind, and is not in the results.
    """
    one = _Import(options, same, progress, cancelled)
    adapter_stage.clear_stale(Path(options.folder))
    results: list[ImportResult] = []
    for path in paths:
        if cancelled():
            break
        try:
            results += one.take(path.expanduser().absolute())
        except WeftError as error:
            if error.kind is ErrorKind.CANCELLED:
                break
            results.append(ImportResult(str(path), Outcome.FAILED, error=error))
    return results


def find_adapters(path: Path) -> list[Path]:
    """The adapters at a path: itself, or all that a folder holds (a folder's own adapter hides what lies below it,
    such as the checkpoints of its training).
    """
    if path.is_file():
        beside = path.parent / "adapter_config.json"
        inside = path.name in (*WEIGHT_FILES, "adapter_config.json") and beside.is_file()
        return [path.parent if inside else path]
    return list(_below(path))


def _recognised(path: Path) -> AdapterEntry | None:
    from app.core.recognise import (
        recognise_adapter,
    )  # readers of every format: the window's first paint does not wait for them

    return recognise_adapter(path)


def _below(start: Path) -> Iterator[Path]:
    stack, seen, found = [(start, 0)], 0, 0
    while stack and seen < _MAX_FOLDERS and found < _MAX_FOUND:
        folder, depth = stack.pop()
        seen += 1
        if (folder / "adapter_config.json").is_file():
            found += 1
            yield folder
            continue
        below = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
        for path in below:
            if path.suffix.lower() in _WEIGHTS and path.is_file() and _recognised(path) is not None:
                found += 1
                yield path
        if depth < _DEPTH:
            stack += [(path, depth + 1) for path in reversed(below) if path.is_dir() and not path.is_symlink()]


class _Import:
    def __init__(
        self,
        options: ImportOptions,
        same: Same,
        progress: Callable[[str, int, int], None],
        cancelled: Callable[[], bool],
    ) -> None:
        self._options, self._same, self._progress, self._cancelled = options, same, progress, cancelled
        self._folder = Path(options.folder)
        self._batch: list[tuple[AdapterContent, AdapterEntry]] = []

    def take(self, path: Path) -> list[ImportResult]:
        if not path.exists():
            raise WeftError(ErrorKind.NOT_FOUND, f"There is no {path}.", "Check the path.")
        if path.is_file() and is_archive(path):
            return self._archive(path)
        try:
            found = find_adapters(path)
        except OSError as error:
            raise WeftError(
                ErrorKind.PERMISSION,
                f"{path} may not be read: {error.strerror}.",
                "Give your user the right to read it.",
            ) from error
        if not found:
            raise _not_one(path)
        return [self._try(adapter, _told(path, adapter), path) for adapter in found]

    def _archive(self, path: Path) -> list[ImportResult]:
        self._folder.mkdir(parents=True, exist_ok=True)
        with adapter_stage.folder(self._folder) as stage:
            inside = stage / archive_stem(path)[:100]
            told = path.name
            unpack(path, inside, progress=lambda d, o: self._progress(told, d, o), cancelled=self._cancelled)
            found = find_adapters(inside)
            if not found:
                raise WeftError(
                    ErrorKind.BAD_INPUT,
                    f"{path.name} holds no adapter.",
                    "An adapter is a folder with adapter_config.json, a .safetensors file with LoRA tensors, or a GGUF adapter.",
                )
            one = len(found) == 1
            return [
                self._try(adapter, str(path) if one else str(path / adapter.relative_to(inside)), inside, unpacked=path)
                for adapter in found
            ]

    def _try(self, adapter: Path, source: str, top: Path, unpacked: Path | None = None) -> ImportResult:
        try:
            return self._one(adapter, source, top, unpacked)
        except WeftError as error:
            if error.kind is ErrorKind.CANCELLED:
                raise
            return ImportResult(source, Outcome.FAILED, error=error)

    def _one(self, adapter: Path, source: str, top: Path, unpacked: Path | None) -> ImportResult:
        """Check everything that headers tell before a byte is copied."""
        entry = _recognised(adapter)
        if entry is None:
            raise _not_one(adapter)
        alpha = self._options.alphas.get(source)
        file = _usable(adapter, entry, alpha)
        given = alpha is not None and read_adapter_file(adapter).needs_alpha
        if not given and not unpacked and self._inside_roots(adapter):
            return ImportResult(source, Outcome.PRESENT, entry, entry.rank)
        existing, content = self._existing(file)
        if existing is not None and not self._options.duplicates:
            return ImportResult(source, Outcome.DUPLICATE, existing, existing.rank)
        if file.needs_alpha:
            return ImportResult(source, Outcome.NEEDS_ALPHA, rank=entry.rank)
        if not self._options.copy and not unpacked and not given:
            return ImportResult(source, Outcome.IN_PLACE, entry, entry.rank)
        target = self._copy(adapter, entry, file, given, top, str(unpacked or adapter))
        copied = _recognised(target)
        if copied is None:
            raise WeftError(ErrorKind.INTERNAL, f"{target} is not recognised any more.", "Report this.")
        if content is not None:
            self._batch.append((content, copied))
        return ImportResult(source, Outcome.ADDED, copied, copied.rank, notes=_notes(file))

    def _inside_roots(self, adapter: Path) -> bool:
        return any(adapter.is_relative_to(root) for root in (*self._options.roots, self._options.folder))

    def _existing(self, file: AdapterFile) -> tuple[AdapterEntry | None, AdapterContent | None]:
        content = content_of(file, self._cancelled)
        same = next((entry for before, entry in self._batch if before.same(content)), None)
        return same or self._same(file), content

    def _copy(self, adapter: Path, entry: AdapterEntry, file: AdapterFile, given: bool, top: Path, source: str) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        files = adapter_stage.files_of(adapter, entry)
        total = sum(path.stat().st_size for _, path in files)
        if shutil.disk_usage(self._folder).free < total + (16 << 20):
            raise WeftError(
                ErrorKind.DISK_FULL,
                f"{adapter.name} takes {total / 1e6:,.0f} MB, which {self._folder} has no room for.",
                "Free some space there, or leave the adapter where it is.",
            )
        name = adapter_stage.library_name(adapter, top)
        note = AdapterNote(
            source=source, added=time.time(), run=self._options.run, title=self._options.title, alpha_given=given
        )
        config = _config_of(file, entry) if adapter.is_file() and entry.format is not AdapterFormat.GGUF else None
        with adapter_stage.folder(self._folder) as stage:
            done = 0
            for inner, path in files:
                done = adapter_stage.copy_file(
                    path, stage / inner, lambda d: self._progress(name, d, total), self._cancelled, done
                )
            if entry.format is AdapterFormat.GGUF:
                return adapter_stage.publish(stage / files[0][0], self._folder / f"{name}.gguf")
            adapter_stage.write_notes(stage, config, note)
            return adapter_stage.publish(stage, self._folder / name)


def _usable(adapter: Path, entry: AdapterEntry, alpha: float | None) -> AdapterFile:
    if entry.format is AdapterFormat.TORCH_BIN or any(name.endswith((".bin", ".pt")) for name in entry.files):
        from app.core import pickle_scan

        for name in entry.files:
            pickle_scan.check(Path(name))
    file = read_adapter_file(adapter, alpha)
    if file.config.needs_changed_base or not (file.config.is_lora or file.config.kind == "TRAINABLE_TOKENS"):
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            f"{adapter.name} cannot be used. {file.problems[0]}",
            "Get it as LoRA for the plain base.",
        )
    if entry.problem or file.problems:
        raise WeftError(
            ErrorKind.CORRUPT,
            f"{adapter.name} cannot be used. {entry.problem or file.problems[0]}",
            "Get the adapter again.",
        )
    return file


def _notes(file: AdapterFile) -> tuple[str, ...]:
    if not file.unknown:
        return ()
    return (f"{len(file.unknown)} of its tensors are of no known kind and are left out when it is used.",)


def _config_of(file: AdapterFile, entry: AdapterEntry) -> Mapping[str, object]:
    """An adapter_config.json for a lone file, as its tensors and the person tell it."""
    tails = sorted({name.rpartition(".")[2] for name, module in file.modules.items() if module.loras})
    dora = any(lora.magnitude is not None for module in file.modules.values() for lora in module.loras)
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": file.config.base or entry.base or None,
        "r": entry.rank,
        "lora_alpha": file.config.alpha,
        "use_dora": dora,
        "target_modules": tails,
        "task_type": "CAUSAL_LM",
    }


def _told(top: Path, adapter: Path) -> str:
    return str(adapter) if top != adapter and top.is_dir() else str(top)


def _not_one(path: Path) -> WeftError:
    from app.core.recognise import recognise_model

    model = recognise_model(path)
    if model is not None:
        return WeftError(ErrorKind.BAD_INPUT, f"{path.name} is a model, not an adapter.", "Add it on the Models page.")
    if path.suffix.lower() in _WEIGHTS and re.search(r"lora", path.name, re.IGNORECASE):
        hint = "LoRAs of image generators are of no use to language models."
    else:
        hint = (
            "An adapter is a folder with adapter_config.json, a .safetensors file with LoRA tensors, or a GGUF adapter."
        )
    return WeftError(ErrorKind.BAD_INPUT, f"{os.fspath(path)} holds no adapter.", hint)
