"""`weft quantize`: a model, with or without adapters, as a GPTQ, AWQ or HQQ folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec

from app.cli_certify import add_certify_argument, check_text
from app.cli_library import find_folder, find_stack
from app.cli_made import tell
from app.cli_task import ensure_environment, run_task
from app.core.certify_plan import CertifySide
from app.core.errors import ErrorKind, WeftError
from app.core.export_check import check_target
from app.core.library import ModelEntry
from app.core.paths import resources
from app.core.plain_text import read_plain
from app.core.quantize_plan import (
    BITS,
    CALIBRATED,
    CALIBRATION_TEXT,
    ENVIRONMENT,
    GROUPS,
    USUAL_GROUPS,
    QuantizePlan,
    QuantizeResult,
    check_quantize,
    packed_like,
)
from app.terminal import readable_bytes
from app.viewmodels.export_choices import MARGIN, ExportOptions, estimate, free_at


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Put `quantize` among the commands."""
    command = commands.add_parser("quantize", help="make a GPTQ, AWQ or HQQ folder of a model, with adapters merged in")
    command.set_defaults(run=_run)
    command.add_argument(
        "model", metavar="MODEL", help="`starter`, a library name, or a folder of safetensors; one that GPTQ, AWQ, HQQ or bitsandbytes has packed is unpacked first"
    )  # fmt: skip
    command.add_argument(
        "--adapter", action="append", default=[], metavar="A[=WEIGHT]", help="an adapter to merge in (may be repeated)"
    )
    command.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder of the quantized model")
    command.add_argument(
        "--method",
        choices=tuple(BITS),
        required=True,
        help="gptq or awq, calibrated on a text; or hqq, by the weights alone",
    )
    command.add_argument(
        "--bits", type=int, metavar="N", help="gptq: 2, 3, 4 (usual) or 8; awq: 4; hqq: 1, 2, 3, 4 (usual) or 8"
    )
    command.add_argument(
        "--group-size", type=int, metavar="N", help=f"weights that share a scale: {', '.join(map(str, GROUPS['gptq']))}; 128 (hqq: 64), or as a packed model has it"
    )  # fmt: skip
    command.add_argument(
        "--desc-act", action="store_true", help="gptq: columns in the order of their importance; less loss, slower to run"
    )  # fmt: skip
    command.add_argument(
        "--calibration", type=Path, metavar="FILE", help="a text like what the model will read; without it one of ours, of 40 kB"
    )  # fmt: skip
    command.add_argument("--samples", type=int, default=256, metavar="N", help="how many pieces of the text at most")
    command.add_argument("--length", type=int, default=512, metavar="N", help="tokens of a piece")
    add_certify_argument(command)
    command.add_argument("--json", action="store_true", help="one JSON document on stdout")


def announce(entry: ModelEntry, plan: QuantizePlan) -> None:
    """Say on stderr, before anything is made, what it will take of the drive."""
    options = ExportOptions(bits=plan.bits, group_size=plan.group_size)
    folder = Path(plan.target).parent
    need = estimate(entry, plan.stack, plan.method, options, free_at(folder), 0)
    between = need.disk - need.result - MARGIN
    more = f", and about {readable_bytes(between)} more while it is made, which is removed again" if between > 0 else ""
    print(
        f"{Path(plan.target).name} takes about {readable_bytes(need.result)}{more}; "
        f"{readable_bytes(need.disk_free)} are free on the drive of {folder}.",
        file=sys.stderr,
    )


def _run(parsed: argparse.Namespace) -> int:
    model = find_folder(
        parsed.model,
        "GPTQ, AWQ and HQQ are made of folders of safetensors",
        "Quantize the model that it was made from, or see `weft export` for other types of GGUF.",
    )
    check_text(parsed.certify)
    text: Path | None = None
    if parsed.method in CALIBRATED:
        chosen: Path = parsed.calibration or resources() / CALIBRATION_TEXT
        text = chosen.expanduser().absolute()
        read_plain(text)
    elif parsed.calibration:
        raise WeftError(
            ErrorKind.BAD_INPUT,
            f"{parsed.method.upper()} goes by the weights alone: no text calibrates it.",
            "Leave --calibration out.",
        )
    like = packed_like(model.quantization)  # a packed model is packed again as it was
    plan = QuantizePlan(
        model=model.path,
        stack=find_stack(parsed.adapter),
        target=str(parsed.to.expanduser().absolute()),
        method=parsed.method,
        bits=(like[0] if like[0] in BITS[parsed.method] else 4) if parsed.bits is None else parsed.bits,
        group_size=(like[1] if like[1] in GROUPS[parsed.method] else USUAL_GROUPS[parsed.method])
        if parsed.group_size is None
        else parsed.group_size,
        desc_act=parsed.desc_act,
        calibration=str(text) if text else "",
        samples=parsed.samples,
        length=parsed.length,
        base_name=model.name,
    )
    check_quantize(plan)  # before minutes are spent on an installation
    check_target(Path(plan.target))
    announce(model, plan)
    ensure_environment(ENVIRONMENT)
    made = msgspec.convert(run_task(ENVIRONMENT, "quantize", plan), QuantizeResult)
    read = f"calibrated on {made.tokens} tokens, " if made.tokens else ""
    sentence = (
        f"{made.folder}: {plan.bits} bits by {plan.method.upper()}, {readable_bytes(made.bytes)}, {made.matrices} matrices, "
        f"{read}in {made.seconds:.0f} s."
    )
    base = CertifySide(model=plan.model, stack=plan.stack, name=model.name)
    tell(parsed, made, made.folder, sentence, base, environment=ENVIRONMENT)
    return 0
