"""Measure an adapter: the norm of each module's change, matrices of zeros, numbers that are none, ranks that are not used."""

from __future__ import annotations

import math
import time
from pathlib import Path

from app.adapters import health
from app.core.adapter_file import read_adapter_file
from app.core.adapter_plans import HealthPlan, HealthReport, ModuleNorm
from app.core.errors import ErrorKind, WeftError
from app.core.module_names import place_of
from app.engine.reporting import Report

Parameters = HealthPlan


def run(parameters: HealthPlan, report: Report) -> HealthReport:
    """Read all of an adapter's tensors once.

    Raises:
        WeftError: when it cannot be read; CANCELLED.
    """
    started = time.perf_counter()
    file = read_adapter_file(Path(parameters.path), parameters.alpha)
    if file.problems:
        raise WeftError(
            ErrorKind.CORRUPT, f"{file.path.name} cannot be measured. {file.problems[0]}", "Get the adapter again."
        )

    def told(done: int, total: int) -> None:
        if report.cancelled:
            raise WeftError(ErrorKind.CANCELLED, "Cancelled.")
        report.progress("Measuring", done, total, "modules")

    measured = health.measure(file, told)
    modules = tuple(
        ModuleNorm(
            layer=one.layer,
            module=one.name,
            tail=place_of(one.name).tail,
            norm=one.norm if math.isfinite(one.norm) else None,
            rank=one.rank,
            used=one.used,
            trouble=one.trouble,
            kind=one.kind,
        )
        for one in measured
    )
    whole = tuple(name for name, module in file.modules.items() if module.saved)
    return HealthReport(
        modules=modules, whole=whole, sentences=tuple(health.sentences(measured)), seconds=time.perf_counter() - started
    )
