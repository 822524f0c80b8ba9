"""Rows of a batch answered one after the other, for loaders that cannot compute different stacks together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import msgspec

from app.core.stack import AdapterStack
from app.engine.protocol import BatchRow, Generate, GenerateBatch, Generated, GeneratedBatch, Loaded
from app.engine.reporting import Report

NOTHING = Generated(finish_reason="cancelled", tokens=0, prompt_tokens=0)


class RowReport:
    """The report of one row: its text bears the row's number, its progress says which of how many it is."""

    def __init__(self, report: Report, row: int, place: int, rows: int, told: set[str]) -> None:
        self._report, self._row, self._where, self._told = report, row, f"{place} of {rows}", told

    def progress(self, phase: str, done: float = 0, total: float = 0, unit: str = "") -> None:
        self._report.progress(f"{phase} ({self._where})", done, total, unit)

    def tokens(self, text: str, count: int, row: int = 0) -> None:
        self._report.tokens(text, count, self._row)

    def log(self, level: Literal["debug", "info", "warning", "error"], text: str) -> None:
        """Each sentence once a batch: rows share adapters and templates."""
        if text not in self._told:
            self._told.add(text)
            self._report.log(level, text)

    def loaded(self, event: Loaded) -> None:
        self._report.loaded(event)

    def metric(self, step: int, values: Mapping[str, float]) -> None:
        self._report.metric(step, values)

    def news(self, json: str) -> None:
        self._report.news(json)

    @property
    def cancelled(self) -> bool:
        return self._report.cancelled

    def on_cancel(self, callback: Callable[[], None]) -> None:
        self._report.on_cancel(callback)

    def on_adjust(self, callback: Callable[[str], None]) -> None:
        self._report.on_adjust(callback)


def request_of(batch: GenerateBatch, row: BatchRow, seed: int | None = None) -> Generate:
    """What a row would be asked alone. `seed`: where neither the row nor the sampling has one."""
    wanted = next((number for number in (row.seed, batch.sampling.seed, seed) if number is not None), None)
    sampling = batch.sampling if wanted is None else msgspec.structs.replace(batch.sampling, seed=wanted)
    return Generate(
        messages=row.messages,
        prompt=row.prompt,
        continue_last=batch.continue_last,
        sampling=sampling,
        reserve=batch.reserve,
    )


def answer_in_turn(backend: Any, batch: GenerateBatch, report: Report, note: str) -> GeneratedBatch:
    """Set each row's stack and generate; the stack that was on is on again afterwards, whatever happened.

    Rows of the same stack follow each other, beginning with the stack that is on, so that what their prompts share is read
    once. When cancelled, rows that had not begun come back with no tokens. A stack that is refused is so before any row begins.

    Args:
        backend: a backends.base.Backend; its `stack` and `baked` say what is on.
        note: why rows are not computed together, for the result.
    """
    present, baked = backend.stack, backend.baked
    numbers = sorted(range(len(batch.rows)), key=lambda n: _first_of(batch.rows, n, present))
    done = dict.fromkeys(numbers, NOTHING)
    told: set[str] = set()
    wanted = [row.adapters for place, row in enumerate(batch.rows) if _first_of(batch.rows, place, present) == place]
    if len(batch.rows) > 1:  # half of what cannot be had whole is of no use
        backend.check_adapters(wanted, RowReport(report, 0, 1, 1, told))
    seed: int | None = None  # the first that was drawn by chance: rows differ in nothing but their stack
    try:
        for place, number in enumerate(numbers, 1):
            if report.cancelled:
                break
            row = batch.rows[number]
            one = RowReport(report, number, place, len(numbers), told)
            if row.adapters != backend.stack:
                backend.set_adapters(row.adapters, one)
            done[number] = backend.generate(request_of(batch, row, seed), one)
            seed = done[number].seed if row.seed is None else seed
    finally:
        if backend.stack != present or backend.baked != baked:
            backend.set_adapters(present, RowReport(report, 0, 1, 1, told), baked=baked)
    return GeneratedBatch(rows=tuple(done[number] for number in range(len(batch.rows))), note=note)


def _first_of(rows: tuple[BatchRow, ...], number: int, present: AdapterStack) -> int:
    """Where the first row with this row's stack is; -1 for the stack that is on."""
    if rows[number].adapters == present:
        return -1
    return next(n for n, row in enumerate(rows) if row.adapters == rows[number].adapters)
