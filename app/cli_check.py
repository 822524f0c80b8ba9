"""`weft check ADAPTER MODEL`: does it fit, and is it sound? From headers, without a machine-learning library."""

from __future__ import annotations

import argparse

import msgspec

from app.cli_library import find_adapter, find_model
from app.core.adapter_file import AdapterFile, read_adapter_file
from app.core.adapter_health import Health, look
from app.core.compatibility import Compatibility, Verdict, check_paths, summary
from app.core.library import ModelEntry

STATUS = {Verdict.FITS: 0, Verdict.PARTLY: 3, Verdict.NOT_AT_ALL: 4}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Put `check` among the commands."""
    check = commands.add_parser("check", help="whether an adapter fits a model; exit 0 fits, 3 partly, 4 not at all")
    check.set_defaults(run=_run)
    check.add_argument("adapter", metavar="ADAPTER", help="a folder, a file, or a library name")
    check.add_argument("model", metavar="MODEL", help="`starter`, a library name, or a path")
    check.add_argument("--alpha", type=float, help="for an adapter that does not record it")
    check.add_argument("--json", action="store_true", help="one JSON document on stdout")


class _Report(msgspec.Struct, kw_only=True):
    adapter: str
    model: str
    verdict: str
    compatibility: Compatibility
    health: Health | None
    problems: list[str]


def _run(parsed: argparse.Namespace) -> int:
    path = find_adapter(parsed.adapter)
    adapter = read_adapter_file(path, parsed.alpha)
    model = find_model(parsed.model)
    found = check_paths(adapter, model)
    health = look(adapter) if not adapter.problems else None
    if parsed.json:
        report = _Report(
            adapter=str(path),
            model=model.path,
            verdict=found.verdict.value,
            compatibility=found,
            health=health,
            problems=health.sentences(found.total) if health else adapter.problems,
        )
        print(msgspec.json.format(msgspec.json.encode(report), indent=2).decode())
    else:
        print("\n".join(_lines(adapter, model, found, health)))
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
