"""What a load is refused for, or asked about, before it starts."""

from __future__ import annotations

from app.core.errors import ErrorKind, WeftError
from app.core.library import ModelEntry
from app.viewmodels.loadout_words import CodeQuestion, FitQuestion
from app.workers.load_plan import LoadPlan, LoadPlanner


def damage(entry: ModelEntry) -> WeftError | None:
    """Why a model cannot be loaded by any loader; None when it can."""
    if not entry.problem:
        return None
    return WeftError(
        ErrorKind.CORRUPT, f"{entry.name} cannot be loaded. {entry.problem}", "Download or copy it once more."
    )


def question_before(
    planner: LoadPlanner, plan: LoadPlan, *, freed: int, anyway: bool
) -> FitQuestion | CodeQuestion | None:
    """What is to be asked before this load; None for nothing.

    Args:
        freed: bytes that the model loaded now will give back first.
        anyway: it is to be loaded although it does not fit.

    Raises:
        WeftError: the model's own code cannot be read.
    """
    if planner.wants_code(plan):
        return code_question(planner, plan)
    short = None if anyway else planner.shortage(plan, freed=freed)
    if short is None:
        return None
    return FitQuestion(
        entry=plan.entry,
        loader=plan.spec,
        options=plan.options,
        estimate=short.estimate,
        machine=short.machine,
        message=short.message,
    )


def code_question(planner: LoadPlanner, plan: LoadPlan) -> CodeQuestion:
    """Ask whether the model's own code may run. Raises WeftError when it cannot be read."""
    code = planner.code(plan.entry)
    return CodeQuestion(entry=plan.entry, loader=plan.spec, options=plan.options, files=code.files, digest=code.digest)
