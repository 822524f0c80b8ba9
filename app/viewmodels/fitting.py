"""Does a model fit, in words: for the table, the loadout bar and the question before a load."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from app import backends
from app.backends.base import Spec
from app.core.errors import WeftError
from app.core.library import ModelEntry
from app.core.memory import Estimate, Fit, Machine, fit
from app.core.options import OptionValue, build
from app.viewmodels.units import readable_bytes

_WORDS = {Fit.GPU: "GPU", Fit.GPU_RAM: "GPU + RAM", Fit.RAM: "RAM", Fit.NO: "No", Fit.UNKNOWN: "–"}
_TONES = {Fit.GPU: "positive", Fit.GPU_RAM: "positive", Fit.RAM: "positive", Fit.NO: "negative", Fit.UNKNOWN: "plain"}


class Fitting(msgspec.Struct, frozen=True, kw_only=True):
    """Where a model fits, with the numbers.

    Attributes:
        word: one or two words for a table. numbers: the sentences for a tooltip.
    """

    fit: Fit
    word: str
    tone: str
    numbers: str
    estimate: Estimate | None = None


def breakdown(estimate: Estimate, machine: Machine) -> str:
    """The numbers behind an estimate, a line each."""
    lines = [
        f"Weights {readable_bytes(estimate.weights)}, context {readable_bytes(estimate.cache)}, "
        f"overhead {readable_bytes(estimate.overhead)}: about {readable_bytes(estimate.total)} in all.",
        f"Main memory: needs {readable_bytes(estimate.ram)}, {readable_bytes(machine.ram_free)} of "
        f"{readable_bytes(machine.ram_total)} is free.",
    ]
    if machine.gpus:
        total = sum(gpu.total for gpu in machine.gpus)
        lines.append(
            f"Graphics memory: needs {readable_bytes(estimate.gpu)}, {readable_bytes(machine.vram_free)} of {readable_bytes(total)} is free."
        )
    return "\n".join(lines)


def judge(
    entry: ModelEntry, machine: Machine, spec: Spec | None = None, options: Mapping[str, OptionValue] | None = None
) -> Fitting:
    """Where a model fits with a loader (the best for it when none is named) and changed options."""
    if entry.problem:
        return Fitting(fit=Fit.UNKNOWN, word="–", tone="plain", numbers=entry.problem)
    try:
        if spec is None:
            spec = backends.choose(entry, ready=lambda _: True, cuda=bool(machine.gpus))
        estimate = spec.estimate(entry, build(spec.options, dict(options or {})), machine)
    except WeftError as error:
        return Fitting(fit=Fit.UNKNOWN, word="–", tone="plain", numbers=error.message)
    found = fit(estimate, machine)
    return Fitting(
        fit=found,
        word=_WORDS[found],
        tone=_TONES[found],
        estimate=estimate,
        numbers=f"{spec.title}\n{breakdown(estimate, machine)}",
    )
