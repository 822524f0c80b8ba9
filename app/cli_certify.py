"""`weft certify A B`: how far two models are apart over the same tokens."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import msgspec

from app.cli_library import find_model, find_stack
from app.cli_task import ensure_environment, run_task
from app.core.certify_plan import Certificate, CertifyPlan, CertifySide, environment_of, lines, verdict
from app.core.errors import ErrorKind, WeftError
from app.core.paths import resources
from app.terminal import print_json


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Put `certify` among the commands."""
    command = commands.add_parser(
        "certify", help="compare two models over a text: logit difference, KL, agreement, perplexity"
    )
    command.set_defaults(run=_run)
    command.add_argument("a", metavar="A", help="the model that counts: `starter`, a library name, or a path")
    command.add_argument("b", metavar="B", help="the model that was made of it: a folder or a GGUF file")
    command.add_argument(
        "--adapter", action="append", default=[], metavar="PATH[=WEIGHT]", help="an adapter that is live on A (may be repeated)"
    )  # fmt: skip
    command.add_argument("--text", type=Path, metavar="FILE", help="a text file in UTF-8; a text of ours without it")
    command.add_argument("--tokens", type=int, default=2048, metavar="N", help="how much of the text at most")
    command.add_argument("--window", type=int, default=512, metavar="N", help="tokens that are read together")
    command.add_argument(
        "--store", type=Path, metavar="PATH", help="a folder or file that the certificate is put beside"
    )
    command.add_argument("--json", action="store_true", help="one JSON document on stdout")


def add_certify_argument(command: argparse.ArgumentParser) -> None:
    """Put `--certify` among a command's options."""
    command.add_argument(
        "--certify",
        nargs="?",
        const="",
        metavar="TEXT",
        help="then compare the result with the model and its live adapters, over a text file or a text of ours, "
        "and store the certificate beside it",
    )


def certify(
    a: CertifySide,
    b: CertifySide,
    text: str,
    store: str,
    *,
    tokens: int = 2048,
    window: int = 512,
    environment: str = "",
) -> Certificate:
    """Compare in a child of the environment that both models can be loaded in; installed where it is not there.

    Args:
        text: a text file; "" for the text that comes with the program. store: see CertifyPlan.
        environment: one that is there and loads both; "" for the smallest that does.

    Raises:
        WeftError: what the task raises.
    """
    plan = CertifyPlan(a=a, b=b, text=text or str(resources() / "certificate_text.txt"), tokens=tokens, window=window, store=store)  # fmt: skip
    name = environment or environment_of(a, b)
    ensure_environment(name)
    return msgspec.convert(run_task(name, "certify", plan), Certificate)


def certify_result(base: CertifySide, made: str, text: str, *, quiet: bool, environment: str = "") -> Certificate:
    """The certificate of what was made of a base and a stack, stored beside it and printed."""
    text = check_text(text)
    found = certify(base, CertifySide(model=made), text, made, environment=environment)
    if not quiet:
        print_certificate(found)
    return found


def print_certificate(found: Certificate) -> None:
    """Print a certificate in words."""
    print("\n".join(lines(found)))
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    if found.files:
        print(f"stored: {', '.join(found.files)}")


def check_text(text: str | None) -> str:
    """The path of a text that `--certify` names, "" for none; before anything is begun. Raises WeftError NOT_FOUND."""
    return str(_text(Path(text))) if text else ""


def certified_json(made: msgspec.Struct, found: Certificate | None) -> str:
    """A result with its certificate as one JSON document."""
    document = msgspec.to_builtins(made)
    if found is not None:
        document["certificate"] = _document(found)
    return msgspec.json.format(msgspec.json.encode(document), indent=2).decode()


def _document(found: Certificate) -> dict[str, Any]:
    return {**msgspec.to_builtins(found), "verdict": verdict(found)}


def _text(path: Path) -> Path:
    path = path.expanduser().absolute()
    if not path.is_file():
        raise WeftError(ErrorKind.NOT_FOUND, f"There is no text {path}.", "Check the path.")
    return path


def _run(parsed: argparse.Namespace) -> int:
    a, b = find_model(parsed.a), find_model(parsed.b)
    found = certify(
        CertifySide(model=a.path, stack=find_stack(parsed.adapter), name=a.name),
        CertifySide(model=b.path, name=b.name),
        str(_text(parsed.text)) if parsed.text else "",
        str(parsed.store.expanduser().absolute()) if parsed.store else "",
        tokens=parsed.tokens,
        window=parsed.window,
    )
    if parsed.json:
        print_json(_document(found))
    else:
        print_certificate(found)
    return 0
