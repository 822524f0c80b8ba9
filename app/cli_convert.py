"""`weft convert ADAPTER MODEL --to PATH`: an adapter for llama.cpp, or for transformers, of one of the other kind."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec

from app.cli_library import find_adapter, find_model
from app.cli_task import run_task
from app.core.convert_plan import Converted, ConvertPlan
from app.core.errors import ErrorKind, WeftError
from app.core.paths import default_paths
from app.engine.environments import USABLE, Environments
from app.terminal import print_json


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Put `convert` among the commands."""
    command = commands.add_parser("convert", help="an adapter in PEFT's format as GGUF, or the other way")
    command.set_defaults(run=_run)
    command.add_argument("adapter", metavar="ADAPTER", help="a folder, a file, or a library name; .gguf becomes PEFT")
    command.add_argument("model", metavar="MODEL", help="the base: its headers tell how matrices are named and ordered")
    command.add_argument(
        "--to", type=Path, required=True, metavar="PATH", help="FILE.gguf, or the folder of a PEFT adapter"
    )
    command.add_argument("--json", action="store_true", help="one JSON document on stdout")


def _run(parsed: argparse.Namespace) -> int:
    adapter, target = find_adapter(parsed.adapter), parsed.to.expanduser().absolute()
    back = adapter.suffix.lower() == ".gguf"
    if back == (target.suffix.lower() == ".gguf"):
        wanted = "a folder: a GGUF adapter becomes a PEFT folder" if back else "a file that ends in .gguf"
        raise WeftError(ErrorKind.BAD_INPUT, f"{target.name} is not {wanted}.", "Give another --to.")
    plan = ConvertPlan(adapter=str(adapter), model=find_model(parsed.model), to=str(target))
    found = Environments(default_paths().environments)
    environment = next((name for name in ("core", "llamacpp") if found.state(name) in USABLE), "core")
    made = msgspec.convert(run_task(environment, "convert_adapter", plan), Converted)
    if parsed.json:
        print_json(made)
        return 0
    print(f"{made.adapter}: {made.bytes:,} bytes.")
    for note in made.notes:
        print(f"note: {note}", file=sys.stderr)
    return 0
