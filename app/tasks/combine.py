"""Combine adapters into a new one, or resize one."""

from __future__ import annotations

from pathlib import Path

from app.core.combine_plan import Combined, CombinePlan
from app.core.errors import ErrorKind, WeftError
from app.engine.reporting import Report

Parameters = CombinePlan


def run(parameters: CombinePlan, report: Report) -> Combined:
    """Run it. Raises WeftError, see `combine_adapters`."""
    from app.adapters.combine_files import combine_adapters

    def progress(done: int, total: int) -> None:
        if report.cancelled:
            raise WeftError(ErrorKind.CANCELLED, "Cancelled.")
        report.progress("Combining", done, total, "modules")

    if not parameters.base:
        return combine_adapters(parameters, progress)
    from app.adapters.combine_base_torch import BaseMatrices
    from app.tasks.merge import stage_of

    parameters.check()
    stage = stage_of(Path(parameters.base))
    try:
        with BaseMatrices(stage.weights, stage.config, str(stage.path)) as base:
            return combine_adapters(parameters, progress, base)
    finally:
        stage.close()
