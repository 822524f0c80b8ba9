"""`weft check ADAPTER MODEL`: does it fit, and is it sound? From headers, without a machine-learning library."""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec

from app.cli_library import find_adapter, find_model
from app.cli_task import run_task
from app.core.adapter_file import AdapterFile, read_adapter_file
from app.core.adapter_health import Health, look
from app.core.adapter_plans import HealthPlan, HealthReport, ModuleNorm
from app.core.compatibility import Compatibility, Verdict, check_paths, summary
from app.core.library import ModelEntry
from app.core.paths import default_paths
from app.engine.environments import USABLE, Environments
from app.terminal import print_json

STATUS = {Verdict.FITS: 0, Verdict.PARTLY: 3, Verdict.NOT_AT_ALL: 4}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Put `check` among the commands."""
    check = commands.add_parser("check", help="whether an adapter fits a model; exit 0 fits, 3 partly, 4 not at all")
    check.set_defaults(run=_run)
    check.add_argument("adapter", metavar="ADAPTER", help="a folder, a file, or a library name")
    check.add_argument("model", metavar="MODEL", help="`starter`, a library name, or a path")
    check.add_argument("--alpha", type=float, help="for an adapter that does not record it")
    check.add_argument("--deep", action="store_true", help="measure the norm and the used rank of each module, too")
    check.add_argument("--json", action="store_true", help="one JSON document on stdout")


class _Report(msgspec.Struct, kw_only=True):
    adapter: str
    model: str
    verdict: str
    compatibility: Compatibility
    health: Health | None
    problems: list[str]
    deep: HealthReport | None = None


def _run(parsed: argparse.Namespace) -> int:
    path = find_adapter(parsed.adapter)
    adapter = read_adapter_file(path, parsed.alpha)
    model = find_model(parsed.model)
    found = check_paths(adapter, model)
    health = look(adapter) if not adapter.problems else None
    deep = _measure(path, parsed) if parsed.deep and not adapter.problems else None
    if parsed.json:
        report = _Report(
            adapter=str(path),
            model=model.path,
            verdict=found.verdict.value,
            compatibility=found,
            health=health,
            problems=health.sentences(found.total) if health else adapter.problems,
            deep=deep,
        )
        print_json(report)
    else:
        print("\n".join(_lines(adapter, model, found, health) + (_deep_lines(deep) if deep else [])))
    return STATUS[found.verdict]


def _lines(adapter: AdapterFile, model: ModelEntry, found: Compatibility, health: Health | None) -> list[str]:
    verdict = {
        Verdict.FITS: "It fits",
        Verdict.PARTLY: "It fits in part",
        Verdict.NOT_AT_ALL: "It does not fit",
    }[found.verdict]
    lines = [f"{verdict}: {found.matched} of {found.total} modules of {adapter.path.name} match {model.name}."]
    lines += [f"  unmatched: {line}" for line in summary(found)]
    if found.base:
        same = {True: ", which is this model", False: ", which does not bear this model's name", None: ""}
        lines.append(f"  recorded base: {found.base}{same[found.same_base]}")
    lines += [f"  note: {line}" for line in found.warnings]
    if health is not None:
        told = health.sentences(found.total)
        lines += [f"  health: {line}" for line in told or ["no zeros and no broken numbers in its matrices"]]
    return lines


def _measure(path: Path, parsed: argparse.Namespace) -> HealthReport:
    """Measure in an engine's environment: any that is installed has numpy."""
    environments = Environments(default_paths().environments)
    usable = [name for name in ("core", "llamacpp") if environments.state(name) in USABLE]
    plan = HealthPlan(path=str(path), alpha=parsed.alpha)
    found = run_task(usable[0] if usable else "core", "adapter_health", plan, quiet=parsed.json)
    return msgspec.convert(found, HealthReport)


def _deep_lines(report: HealthReport) -> list[str]:
    """A row for each kind of module: norms over the layers as bars, and what is odd."""
    tails: dict[str, list[ModuleNorm]] = {}
    for module in report.modules:
        tails.setdefault(module.tail, []).append(module)
    width = max((len(tail) for tail in tails), default=0)
    lines = ["  norms of s·B·A by layer:"]
    for tail, modules in tails.items():
        norms = [module.norm or 0.0 for module in sorted(modules, key=lambda module: module.layer)]
        highest = max(norms)
        bars = "".join(_BARS[round(norm / highest * (len(_BARS) - 1))] if highest else _BARS[0] for norm in norms)
        lines.append(f"    {tail:{width}}  {bars}  {min(norms):.3g} to {highest:.3g}")
    lines += [f"  {sentence}" for sentence in report.sentences or ("nothing odd",)]
    return lines


_BARS = " ▁▂▃▄▅▆▇█"
