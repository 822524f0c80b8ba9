"""`weft merge`: a stack of adapters merged into its base, as a new model folder."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import get_args

import msgspec

from app.adapters.merge_leftovers import leftover_of
from app.cli_certify import add_certify_argument, check_text
from app.cli_library import find_folder, find_stack
from app.cli_made import tell
from app.cli_task import run_task
from app.core.certify_plan import CertifySide
from app.core.errors import ErrorKind, WeftError
from app.core.export_check import check_target
from app.core.merge_needs import merge_needs
from app.core.merge_plan import DTYPES, MergePlan, MergeResult, Packing
from app.terminal import readable_bytes

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}  # fmt: skip


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Put `merge` among the commands."""
    command = commands.add_parser("merge", help="merge adapters into a model, as a new model folder")
    command.set_defaults(run=_run)
    command.add_argument("model", metavar="MODEL", help="`starter`, a library name, or a folder of safetensors")
    command.add_argument(
        "--adapter", action="append", default=[], metavar="A[=WEIGHT]", help="an adapter by path or library name (may be repeated)"
    )  # fmt: skip
    command.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder of the merged model")
    command.add_argument("--dtype", choices=DTYPES[1:], default="", help="of the result; the base's own by default")
    command.add_argument(
        "--shard-size", default="0", metavar="SIZE", help="largest weight file, such as 5GB; the base's division by default"
    )  # fmt: skip
    command.add_argument(
        "--packed",
        choices=get_args(Packing),
        default="refuse",
        help="a base packed by GPTQ, AWQ, HQQ or bitsandbytes: refuse it (the 16-bit model is better), make 16 bits of it (also without "
        "an adapter), or (bitsandbytes) pack it again",
    )
    add_certify_argument(command)
    command.add_argument("--license", default="", help="for the model card, where the base names none")
    command.add_argument("--json", action="store_true", help="one JSON document on stdout")


def announce(plan: MergePlan) -> None:
    """Say on stderr, before anything is made, what it will take."""
    needs = merge_needs(plan)
    print(
        f"{Path(plan.target).name} takes about {readable_bytes(needs.disk)} of the drive of {needs.drive}, "
        f"of which {readable_bytes(needs.free)} are free, and {readable_bytes(needs.memory)} of memory.",
        file=sys.stderr,
    )


def _run(parsed: argparse.Namespace) -> int:
    model = find_folder(
        parsed.model,
        "adapters are merged into folders of safetensors",
        "Merge into the model that it was made from, or see `weft export`.",
    )
    check_text(parsed.certify)
    plan = MergePlan(
        model=model.path,
        stack=find_stack(parsed.adapter),
        target=str(parsed.to.expanduser().absolute()),
        dtype=parsed.dtype,
        shard_size=parse_size(parsed.shard_size),
        packed=parsed.packed,
        base_name=model.name,
        license=parsed.license,
    )
    if leftover_of(Path(plan.target)) is None:  # else a killed merge may have been about to tidy up
        check_target(Path(plan.target))
    if plan.packed == "refuse":  # what a packed base takes, its headers do not tell
        announce(plan)
    made = msgspec.convert(run_task("core", "merge", plan), MergeResult)
    again = f", {readable_bytes(made.resumed)} of it by an earlier run" if made.resumed else ""
    how = "" if made.method == "streaming" else f" (by {made.method})"
    on = any(adapter.weight for adapter in plan.stack.adapters)
    did = f"{made.changed} of {made.tensors} tensors changed" if on else f"unpacked, {made.tensors} tensors"
    sentence = f"{made.folder}: {readable_bytes(made.bytes)}{again}, {did}{how}, in {made.seconds:.1f} s."
    tell(parsed, made, made.folder, sentence, CertifySide(model=plan.model, stack=plan.stack, name=model.name))
    return 0


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `500 MB`, `2GiB` or a plain number.

    Raises:
        WeftError: BAD_INPUT.
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)\s*([a-zA-Z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS:
        raise WeftError(ErrorKind.BAD_INPUT, f"{text!r} is no size.", "Write it like 5GB or 500MB.")
    return int(float(match[1]) * _UNITS[match[2].upper()])
