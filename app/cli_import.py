"""`weft import ADAPTER...`: bring adapters into the library, from folders, lone files and archives."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec

from app.core.adapter_import import ImportOptions, ImportResult, Outcome, import_adapters
from app.core.jobs import Progress
from app.core.paths import default_paths
from app.store.adapters import AdapterStore
from app.store.database import Database
from app.store.library import LibraryStore
from app.store.refresh import library_roots, refresh
from app.store.settings import SettingsStore
from app.terminal import ProgressLine, print_json


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Put `import` among the commands."""
    command = commands.add_parser("import", help="bring adapters into the library")
    command.set_defaults(run=_run)
    command.add_argument(
        "paths", nargs="+", type=Path, metavar="ADAPTER", help="a folder, .safetensors, .bin, .gguf, .zip or .tar.*"
    )
    command.add_argument("--alpha", type=float, help="for adapters that do not record it (often the rank, or twice)")
    command.add_argument("--duplicates", action="store_true", help="copy what the library has already, too")
    command.add_argument("--json", action="store_true", help="one JSON document on stdout")


class _Row(msgspec.Struct, kw_only=True):
    source: str
    outcome: str
    name: str = ""
    path: str = ""
    rank: int = 0
    error: str = ""
    hint: str = ""
    notes: tuple[str, ...] = ()


def _run(parsed: argparse.Namespace) -> int:
    paths = default_paths()
    settings = SettingsStore(paths.settings).settings
    roots = library_roots(settings, paths)
    database = Database(paths.database)
    line = ProgressLine()
    try:
        library, adapters = LibraryStore(database), AdapterStore(database)
        refresh(library, roots)
        options = ImportOptions(
            folder=str(paths.adapters), roots=tuple(root.path for root in roots), duplicates=parsed.duplicates
        )

        def told(name: str, done: int, of: int) -> None:
            line.show(Progress(phase=f"Copying {name}", done=done, total=of, unit="bytes"))

        results = import_adapters(parsed.paths, options, same=adapters.same_as, progress=told)
        asked = {result.source: parsed.alpha for result in results if result.outcome is Outcome.NEEDS_ALPHA}
        if parsed.alpha is not None and asked:
            again = msgspec.structs.replace(options, alphas=asked)
            given = [path for path in parsed.paths if any(source.startswith(str(path.absolute())) for source in asked)]
            later = {r.source: r for r in import_adapters(given, again, same=adapters.same_as, progress=told)}
            results = [later[r.source] if r.outcome is Outcome.NEEDS_ALPHA else r for r in results]
        refresh(library, roots)
    finally:
        line.clear()
        database.close()
    if parsed.json:
        print_json([_row(result) for result in results])
    else:
        for result in results:
            _print(result)
    bad = any(result.outcome in (Outcome.FAILED, Outcome.NEEDS_ALPHA) for result in results)
    return 1 if bad else 0


def _row(result: ImportResult) -> _Row:
    entry, error = result.entry, result.error
    return _Row(
        source=result.source,
        outcome=result.outcome.value,
        name=entry.name if entry else "",
        path=entry.path if entry else "",
        rank=result.rank,
        error=error.message if error else "",
        hint=error.hint if error else "",
        notes=result.notes,
    )


def _print(result: ImportResult) -> None:
    name = result.entry.name if result.entry else ""
    match result.outcome:
        case Outcome.ADDED | Outcome.IN_PLACE:
            print(f"added {name}: {result.entry.path if result.entry else ''}")
        case Outcome.PRESENT:
            print(f"{name} is in the library already")
        case Outcome.DUPLICATE:
            print(f"{result.source} holds the same tensors as {name}, which is in the library")
        case Outcome.NEEDS_ALPHA:
            print(f"error: {result.source} does not say its alpha; its rank is {result.rank}.", file=sys.stderr)
            print(f"hint: Add --alpha {result.rank} or --alpha {2 * result.rank}, as its maker says.", file=sys.stderr)
        case Outcome.FAILED:
            assert result.error is not None
            print(f"error: {result.error.message}\nhint: {result.error.hint}", file=sys.stderr)
    for note in result.notes:
        print(f"  note: {note}")
