"""Everything that the details of an adapter show, read from its files. Not for the window's thread."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from app.core.adapter_file import read_adapter_file
from app.core.adapter_health import look
from app.core.adapter_note import AdapterNote, read_note
from app.core.compatibility import Compatibility, Ranked, check_paths, summary
from app.core.errors import WeftError
from app.core.formats import read_gguf_header, read_json, read_safetensors_header
from app.core.gguf_header import GgufArray
from app.core.library import AdapterEntry, AdapterFormat, ModelEntry
from app.store.adapters import AdapterStore
from app.store.database import Database
from app.viewmodels.adapter_table import adapter_format
from app.viewmodels.model_facts import flatten, short_value
from app.viewmodels.units import readable_when

MAX_FACTS = 400
MAX_CARD = 64 * 1024
MAX_UNMATCHED = 400


class Fit(msgspec.Struct, frozen=True, kw_only=True):
    """How an adapter fits one model. sentences: why the rest does not, a line for each reason."""

    model: ModelEntry
    compatibility: Compatibility
    sentences: tuple[str, ...] = ()


class AdapterFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What the panel shows besides fits and norms.

    Attributes:
        facts: (key, value) of its config and its files' metadata. files: (path below the adapter, bytes).
        card: its README, "" for none. note: where Weft got it from.
        troubles: tensors of unknown kinds, in a sentence. modules: how many it has.
        problem: what could not be read, or "".
    """

    facts: tuple[tuple[str, str], ...] = ()
    files: tuple[tuple[str, int], ...] = ()
    card: str = ""
    note: AdapterNote = AdapterNote()
    troubles: tuple[str, ...] = ()
    modules: int = 0
    problem: str = ""


def read_fit(entry: AdapterEntry, model: ModelEntry) -> Fit:
    """Hold it against a model's own headers. Raises WeftError when the adapter cannot be read."""
    found = check_paths(read_adapter_file(Path(entry.path)), model)
    return Fit(model=model, compatibility=found, sentences=tuple(summary(found)))


def read_ranked(database: Database, entry: AdapterEntry, limit: int = 12) -> list[Ranked]:
    """The best bases of the library of which something fits. Raises WeftError when the adapter cannot be read."""
    try:
        ranked = AdapterStore(database).ranked(entry)
    finally:
        database.release()
    return [each for each in ranked if each.compatibility.matched and not each.model.problem][:limit]


def find_duplicates(database: Database, cancelled: Callable[[], bool]) -> list[list[AdapterEntry]]:
    """Groups of adapters with the same tensors. Reads those of one layout; raises WeftError, CANCELLED among them."""
    try:
        return AdapterStore(database).duplicates(cancelled)
    finally:
        database.release()


def read_adapter_facts(entry: AdapterEntry) -> AdapterFacts:
    """Never raises: what is wrong is in `problem`."""
    try:
        return _facts(entry)
    except WeftError as error:
        return AdapterFacts(problem=str(error))
    except OSError as error:
        return AdapterFacts(problem=f"{entry.path} cannot be read: {error.strerror}.")


def read_troubles(entry: AdapterEntry) -> list[str]:
    """Zero, NaN and infinite tensors in sentences. Reads all of its data; raises WeftError when it cannot be read."""
    file = read_adapter_file(Path(entry.path))
    return look(file).sentences(len(file.modules))


def _facts(entry: AdapterEntry) -> AdapterFacts:
    path = Path(entry.path)
    folder = path if path.is_dir() else path.parent
    facts: list[tuple[str, str]] = []
    if path.is_dir() and (path / "adapter_config.json").is_file():
        flatten(read_json(path / "adapter_config.json"), "", facts)
    for name in entry.files:
        facts += _metadata(Path(name))
    problem, modules = entry.problem, 0
    troubles: tuple[str, ...] = ()
    try:
        file = read_adapter_file(path)
        modules = len(file.modules)
        if file.unknown:
            troubles = (f"{len(file.unknown)} of its tensors are of no known kind, such as {file.unknown[0][:80]}.",)
    except WeftError as error:
        problem = problem or str(error)
    return AdapterFacts(
        facts=tuple(facts[:MAX_FACTS]),
        files=tuple(_files(path, entry)),
        card=_card(folder) if path.is_dir() else "",
        note=read_note(path) if path.is_dir() else AdapterNote(),
        troubles=troubles,
        modules=modules,
        problem=problem,
    )


def _metadata(path: Path) -> list[tuple[str, str]]:
    """What a weight file says of itself."""
    try:
        if path.suffix.lower() == ".gguf":
            header = read_gguf_header(path, complete=False)
            found: list[tuple[str, str]] = []
            for key, value in header.metadata.items():
                found.append((key, f"{value.count:,} entries" if isinstance(value, GgufArray) else short_value(value)))
            return [*found, ("tensors", f"{len(header.tensors):,}")]
        if path.suffix.lower() == ".safetensors":
            header = read_safetensors_header(path)
            said = [(f"{path.name}: {key}", short_value(value)) for key, value in header.metadata.items()]
            types = sorted({tensor.dtype for tensor in header.tensors})
            return [*said, (f"{path.name}: tensors", f"{len(header.tensors):,} ({', '.join(types)})")]
    except WeftError:
        pass  # the adapter's `problem` says what is wrong with the file
    return []


def _files(path: Path, entry: AdapterEntry) -> list[tuple[str, int]]:
    places = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [Path(f) for f in entry.files]
    return [
        (str(p.relative_to(path)) if path.is_dir() else p.name, p.stat().st_size) for p in places[:200] if p.exists()
    ]


def _card(folder: Path) -> str:
    card = folder / "README.md"
    if not card.is_file():
        return ""
    with card.open("rb") as file:
        return file.read(MAX_CARD).decode("utf-8", "replace")


def files_of(entry: AdapterEntry) -> list[Path]:
    """What moving to the trash takes: the folder of a PEFT adapter, else the files alone."""
    path = Path(entry.path)
    for folder in (path, *path.parents):
        if folder.name.startswith("models--") and (folder / "snapshots").is_dir():
            return [folder]
    if entry.format is AdapterFormat.PEFT or path.is_dir():
        return [path]
    return [Path(name) for name in entry.files] or [path]


def unmatched_lines(fit: Fit) -> list[str]:
    """Each module that has no place in the model, and why."""
    lines = [f"{each.module}: {each.reason}" for each in fit.compatibility.unmatched[:MAX_UNMATCHED]]
    rest = len(fit.compatibility.unmatched) - len(lines)
    return [*lines, f"… and {rest:,} more"] if rest > 0 else lines


def about(entry: AdapterEntry, found: AdapterFacts) -> list[tuple[str, str]]:
    """What is known of an adapter, as (name, value); "" for what does not apply."""
    note = found.note
    return [
        ("Format", adapter_format(entry)),
        ("Base", entry.base or "not recorded"),
        ("Targets", ", ".join(entry.targets)),
        ("Modules", f"{found.modules:,}" if found.modules else ""),
        ("Trained by", note.title or entry.run),
        ("Copied from", entry.source or note.source),
        ("Added", readable_when(note.added) if note.added else ""),
        ("Alpha", "as you said; the file does not record it" if note.alpha_given else ""),
        ("Root", entry.root),
        ("Changed", readable_when(entry.modified)),
    ]
