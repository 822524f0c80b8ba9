"""What the library knows of adapters beyond their index: which models each fits, and which are the same by content.

Answers are kept under hashes of what decides them, so that a second look costs one query, and a changed file is read anew.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from app.core.adapter_content import AdapterContent, content_of, fit_key, structure_of
from app.core.adapter_file import AdapterFile, read_adapter_file
from app.core.compatibility import Ranked, rank_bases
from app.core.errors import WeftError
from app.core.library import AdapterEntry, ModelEntry, ModelFormat
from app.store.database import Database
from app.store.library import LibraryStore


class FitCount(msgspec.Struct, frozen=True, kw_only=True):
    """How many models of the library an adapter fits wholly, fits in part, and how many there are."""

    fits: int
    partly: int
    models: int


class _Facts(msgspec.Struct):
    fit_key: str
    structure: str
    tensors: str
    scales: str


class AdapterStore:
    """Every method may be called from any thread but the window's (they read files), and raises WeftError as
    `Database.execute` does.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._library = LibraryStore(database)

    # Fitting ------------------------------------------------------------------------------------

    def fit_counts(
        self, adapters: Iterable[str] | None = None, cancelled: Callable[[], bool] = lambda: False
    ) -> dict[str, FitCount]:
        """How many models each adapter fits, by the index alone; adapters that cannot be read are left out.

        Args:
            adapters: ids; None for all. cancelled: asked for each; what was found until then is returned.
        """
        models = self._library.models()
        keys = Counter(map(model_key, models))
        examples = {model_key(model): model for model in models}
        entries = self._library.adapters() if adapters is None else self._library.adapters_by_id(list(adapters))
        found: dict[str, FitCount] = {}
        for entry in entries:
            if cancelled():
                break
            facts = self._facts(entry)
            if facts.fit_key:
                answers = self._answers(entry, facts, examples)
                fits = sum(keys[k] for k, (matched, total) in answers.items() if total and matched == total)
                partly = sum(keys[k] for k, (matched, total) in answers.items() if 0 < matched < total)
                found[entry.id] = FitCount(fits=fits, partly=partly, models=len(models))
        return found

    def _answers(
        self, entry: AdapterEntry, facts: _Facts, examples: dict[str, ModelEntry]
    ) -> dict[str, tuple[int, int]]:
        rows = self._database.rows("SELECT model, matched, total FROM fits WHERE adapter = ?", (facts.fit_key,))
        known = {key: (matched, total) for key, matched, total in rows}
        missing = {key: model for key, model in examples.items() if key not in known}
        if missing:
            file = read_adapter_file(Path(entry.path))
            keys = {model.id: key for key, model in missing.items()}
            for ranked in rank_bases(file, missing.values()):
                known[keys[ranked.model.id]] = (ranked.compatibility.matched, ranked.compatibility.total)
            new = [(facts.fit_key, key, *known[key]) for key in missing]
            with self._database.transaction() as connection:
                connection.executemany("INSERT OR REPLACE INTO fits VALUES (?, ?, ?, ?)", new)
        return known if len(known) == len(examples) else {key: known[key] for key in examples}

    def ranked(self, adapter: AdapterEntry) -> list[Ranked]:
        """Every model of the library, the best bases of an adapter first (by the index; `check_paths` is exact).

        Raises:
            WeftError: when the adapter cannot be read.
        """
        return rank_bases(read_adapter_file(Path(adapter.path)), self._library.models())

    def adapters_for(self, model: ModelEntry) -> list[tuple[AdapterEntry, int, int]]:
        """The adapters of the library that have any place in a model: (adapter, matched, total), the best first."""
        found: list[tuple[AdapterEntry, int, int]] = []
        for entry in self._library.adapters():
            facts = self._facts(entry)
            if facts.fit_key:
                matched, total = self._answers(entry, facts, {model_key(model): model})[model_key(model)]
                if matched:
                    found.append((entry, matched, total))
        found.sort(key=lambda f: (-f[1] / max(f[2], 1), f[0].name.casefold()))
        return found

    # Content ------------------------------------------------------------------------------------

    def content(self, adapter: AdapterEntry, cancelled: Callable[[], bool] = lambda: False) -> AdapterContent:
        """Hashes of an adapter's tensors; read once, then known until its files change.

        Raises:
            WeftError: when it cannot be read; CANCELLED.
        """
        facts = self._facts(adapter)
        if not facts.tensors:
            found = content_of(read_adapter_file(Path(adapter.path)), cancelled)
            self._database.execute(
                "UPDATE adapter_facts SET tensors = ?, scales = ? WHERE id = ?",
                (found.tensors, found.scales, adapter.id),
            )
            return found
        return AdapterContent(structure=facts.structure, tensors=facts.tensors, scales=facts.scales)

    def same_as(self, file: AdapterFile, cancelled: Callable[[], bool] = lambda: False) -> AdapterEntry | None:
        """The adapter of the library that holds the same tensors, None when there is none.

        Only adapters of the same layout are read. An adapter does not count as the same as itself.
        """
        for entry in self._library.adapters():
            self._facts(entry)
        rows = self._database.rows("SELECT id FROM adapter_facts WHERE structure = ?", (structure_of(file),))
        alike = [e for e in self._library.adapters_by_id([row[0] for row in rows]) if Path(e.path) != file.path]
        if not alike:
            return None
        mine = content_of(file, cancelled)
        for entry in alike:
            try:
                if self.content(entry, cancelled).same(mine):
                    return entry
            except WeftError as error:
                if error.kind == "cancelled":
                    raise
        return None

    def duplicates(self, cancelled: Callable[[], bool] = lambda: False) -> list[list[AdapterEntry]]:
        """Groups of adapters that hold the same tensors, whatever they are called."""
        groups: dict[str, list[AdapterEntry]] = {}
        for entry in self._library.adapters():
            if structure := self._facts(entry).structure:
                groups.setdefault(structure, []).append(entry)
        found: dict[tuple[str, str], list[AdapterEntry]] = {}
        for entry in (entry for group in groups.values() if len(group) > 1 for entry in group):
            content = self.content(entry, cancelled)
            found.setdefault((content.tensors, content.scales), []).append(entry)
        return [group for group in found.values() if len(group) > 1]

    def _facts(self, adapter: AdapterEntry) -> _Facts:
        row = self._database.row(
            "SELECT f.fit_key, f.structure, f.tensors, f.scales, f.signature = a.signature, a.signature"
            " FROM adapters a LEFT JOIN adapter_facts f ON f.id = a.id WHERE a.id = ?",
            (adapter.id,),
        )
        if row is not None and row[4]:
            return _Facts(*row[:4])
        try:
            file = read_adapter_file(Path(adapter.path))
            facts = _Facts(fit_key(file), structure_of(file), "", "")
        except WeftError:
            facts = _Facts("", "", "", "")  # its `problem` says why
        if row is not None:
            values = (adapter.id, row[5], facts.fit_key, facts.structure)
            self._database.execute(
                "INSERT OR REPLACE INTO adapter_facts (id, signature, fit_key, structure) VALUES (?, ?, ?, ?)", values
            )
        return facts


def model_key(model: ModelEntry) -> str:
    """A hash of what decides which adapters fit a model, as far as the index knows it."""
    told = (model.format is ModelFormat.GGUF, model.model_type, model.architecture, model.shape)
    return hashlib.blake2b(repr(told).encode(), digest_size=12).hexdigest()
