"""`weft export`: a model, with or without adapters, as a GGUF file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec

from app.cli_certify import add_certify_argument, check_text
from app.cli_library import find_model, find_stack
from app.cli_made import tell
from app.cli_task import ensure_environment, run_task
from app.core.certify_plan import CertifySide
from app.core.export_check import check_export
from app.core.export_plan import OWN, TYPES, ExportPlan, ExportResult, gguf_type
from app.core.library import ModelEntry
from app.core.plain_text import read_plain
from app.terminal import readable_bytes
from app.viewmodels.export_choices import free_at, sizes

ENVIRONMENT = "export"


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Put `export` among the commands."""
    command = commands.add_parser(
        "export",
        help="make a GGUF file of a model, with adapters merged in",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="types:\n"
        + "\n".join(
            f"  {each.name:8} {each.help}{' Needs --imatrix.' if each.imatrix else ''}"
            for each in (*TYPES.values(), OWN)
        ),
    )
    command.set_defaults(run=_run)
    command.add_argument("model", metavar="MODEL", help="`starter`, a library name, or a path")
    command.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="PATH[=WEIGHT]",
        help="an adapter to merge in (may be repeated)",
    )
    command.add_argument("--to", type=Path, required=True, metavar="FILE.gguf", help="the file that is made")
    command.add_argument("--type", default="q4_k_m", metavar="TYPE", help="see below; q4_k_m is the usual choice")
    command.add_argument("--name", default="", help="what the file calls the model")
    command.add_argument("--imatrix", type=Path, metavar="TEXT", help="a text by which quantizing weighs what matters")
    command.add_argument(
        "--imatrix-chunks", type=int, default=100, metavar="N", help="how many pieces of 512 tokens of it; 0 for all"
    )
    command.add_argument(
        "--pre-tokenizer",
        default="",
        metavar="NAME",
        help="llama.cpp's name of the tokenizer's kind, where it does not recognise it",
    )
    command.add_argument("--modelfile", action="store_true", help="write a Modelfile for Ollama beside it")
    add_certify_argument(command)
    command.add_argument("--json", action="store_true", help="one JSON document on stdout")


def announce(entry: ModelEntry, plan: ExportPlan) -> None:
    """Say on stderr, before anything is made, what it will take of the drive: the result, and what lies there on the way."""
    result, between = sizes(entry, plan.type)
    target = Path(plan.target)
    way = (
        f", and about {readable_bytes(between)} more for a 16-bit file on the way, which is removed again"
        if between
        else ""
    )
    free = readable_bytes(free_at(target.parent))
    print(f"{target.name} takes about {readable_bytes(result)}{way}; {free} are free.", file=sys.stderr)


def _run(parsed: argparse.Namespace) -> int:
    gguf_type(parsed.type)  # before minutes are spent on an installation
    check_text(parsed.certify)
    model = find_model(parsed.model, "transformers")
    plan = ExportPlan(
        model=model.path,
        stack=find_stack(parsed.adapter),
        target=str(parsed.to.expanduser().absolute()),
        type=parsed.type.lower(),
        name=parsed.name,
        imatrix=str(parsed.imatrix.expanduser().absolute()) if parsed.imatrix else "",
        imatrix_chunks=parsed.imatrix_chunks,
        pre_tokenizer=parsed.pre_tokenizer,
        modelfile=parsed.modelfile,
    )
    check_export(plan)
    if plan.imatrix:
        read_plain(Path(plan.imatrix))  # before minutes are spent on an installation
    announce(model, plan)
    ensure_environment(ENVIRONMENT)
    made = msgspec.convert(run_task(ENVIRONMENT, "export_gguf", plan), ExportResult)
    sentence = f"{made.file}: {made.type}, {readable_bytes(made.bytes)}, {made.tensors} tensors."
    tell(parsed, made, made.file, sentence, CertifySide(model=plan.model, stack=plan.stack, name=model.name))
    return 0
