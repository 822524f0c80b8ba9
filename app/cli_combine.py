"""`weft combine`: one adapter of several, or another rank for one."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import get_args

import msgspec

from app.cli_library import find_folder, find_stack
from app.cli_task import run_task
from app.core.combine_plan import METHODS, Combined, CombinePlan, Dtype, Sign, uses_rank
from app.terminal import print_json


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Put `combine` among the commands."""
    command = commands.add_parser(
        "combine",
        help="make one adapter of several, or change the rank of one",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="methods:\n" + "\n".join(f"  {name:20} {text}" for name, text in METHODS.items()),
    )
    command.set_defaults(run=_run)
    command.add_argument(
        "--adapter", action="append", required=True, metavar="PATH[=WEIGHT]", help="an adapter (repeat it for each)"
    )
    command.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder of the new adapter")
    command.add_argument(
        "--method", choices=list(METHODS), metavar="METHOD", help="see below; cat, which is exact, or svd with --rank"
    )
    command.add_argument(
        "--density", type=float, default=0.5, help="share of values that is kept (ties, dare, magnitude)"
    )
    command.add_argument("--sign", choices=get_args(Sign), default="total", help="how ties elects a sign")
    command.add_argument(
        "--rank", type=_rank, default=0, help="of the result, for svd methods; resizes a single adapter"
    )
    command.add_argument(
        "--base", default="", metavar="MODEL", help="for DoRAs, which only the svd methods take: the model that they were trained on"
    )  # fmt: skip
    command.add_argument("--clamp", type=float, default=1.0, help="quantile beyond which svd's values are cut")
    command.add_argument("--seed", type=int, default=0, help="of what dare drops")
    command.add_argument("--dtype", choices=get_args(Dtype), default="float32", help="of the saved matrices")
    command.add_argument("--json", action="store_true", help="one JSON document on stdout")


def _rank(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def _base(name: str) -> str:
    """The folder of the model that DoRAs are taken against."""
    if not name:
        return ""
    use = "the differences of a DoRA are taken from folders of safetensors"
    return find_folder(name, use, "Name the model that the GGUF was made from.").path


def _run(parsed: argparse.Namespace) -> int:
    method = parsed.method or ("svd" if parsed.rank or parsed.base else "cat")
    plan = CombinePlan(
        adapters=find_stack(parsed.adapter),
        to=str(parsed.to.expanduser().absolute()),
        method=method,
        density=parsed.density,
        sign=parsed.sign,
        rank=parsed.rank,
        clamp=parsed.clamp,
        seed=parsed.seed,
        dtype=parsed.dtype,
        base=_base(parsed.base),
    )
    plan.check()
    made = msgspec.convert(run_task("core", "combine", plan), Combined)
    if parsed.json:
        print_json(made)
        return 0
    print(f"{made.adapter}: {made.modules} modules of rank {made.rank}, by {method}.")
    if uses_rank(method) and made.energy is not None:
        worst = f"; the least of any module: {made.lowest:.2%} ({made.lowest_module})" if made.lowest_module else ""
        print(f"Energy kept: {made.energy:.2%}{worst}.")
    for note in made.notes:
        print(f"note: {note}", file=sys.stderr)
    return 0
