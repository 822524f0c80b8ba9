"""`weft perplexity MODEL --text FILE`: how well a model, under an adapter stack, foresees a text."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from app.backends.base import Capability
from app.cli_engine import add_adapter_arguments, add_load_arguments, loaded_engine
from app.cli_events import Asked
from app.cli_library import find_model, find_stack
from app.core.errors import ErrorKind, WeftError
from app.engine import protocol
from app.engine.client import EngineClient
from app.terminal import ProgressLine, print_json

LONGEST = 12 * 1024 * 1024  # bytes of text that go to an engine in one message, room for escapes left


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Put `perplexity` among the commands."""
    command = commands.add_parser("perplexity", help="how well a model foresees a text; lower is better")
    command.set_defaults(run=_run)
    add_load_arguments(command)
    command.add_argument("--text", required=True, metavar="FILE", help="a text file in UTF-8, or - for standard input")
    command.add_argument(
        "--window",
        type=int,
        default=0,
        metavar="N",
        help="tokens seen at once; the loaded context unless told otherwise",
    )
    command.add_argument(
        "--stride",
        type=int,
        default=0,
        metavar="N",
        help="tokens between windows; smaller gives each token more before it",
    )
    add_adapter_arguments(command)
    command.add_argument("--json", action="store_true", help="one JSON document on stdout")


def _run(parsed: argparse.Namespace) -> int:
    if parsed.window < 0 or parsed.stride < 0 or parsed.window == 1:
        raise WeftError(
            ErrorKind.BAD_INPUT, "A window has two tokens at least, a stride one.", "Correct --window or --stride."
        )
    text = _read(parsed.text)
    stack = find_stack(parsed.adapter)
    model = find_model(parsed.model, parsed.loader)
    with loaded_engine(parsed, model, stack, baked=parsed.bake, needs=Capability.PERPLEXITY) as engine:
        started = time.monotonic()
        scored = _score(engine, protocol.Score(text=text, window=parsed.window, stride=parsed.stride))
    if parsed.json:
        found = {
            "model": parsed.model,
            "stack": stack.title,
            "perplexity": scored.perplexity,
            "nll": scored.nll,
            "tokens": scored.tokens,
            "window": parsed.window,
            "stride": parsed.stride,
            "seconds": time.monotonic() - started,
        }
        print_json(found)
    else:
        print(
            f"perplexity {scored.perplexity:.4f}  (nll {scored.nll:.4f} over {scored.tokens:,} tokens; {stack.title})"
        )
    return 0


def _read(name: str) -> str:
    """Raises WeftError NOT_FOUND, PERMISSION or BAD_INPUT."""
    try:
        data = sys.stdin.buffer.read(LONGEST + 1) if name == "-" else _bytes_of(Path(name).expanduser())
        text = data.decode()
    except FileNotFoundError as error:
        raise WeftError(ErrorKind.NOT_FOUND, f"There is no file {name}.", "Name a text file after --text.") from error
    except OSError as error:
        raise WeftError(
            ErrorKind.PERMISSION, f"{name} cannot be read: {error.strerror}.", "Name a text file after --text."
        ) from error
    except UnicodeDecodeError as error:
        raise WeftError(
            ErrorKind.BAD_INPUT, f"{name} is no text in UTF-8 (byte {error.start:,}).", "Save it as UTF-8 first."
        ) from error
    if len(data) > LONGEST:
        raise WeftError(ErrorKind.BAD_INPUT, f"{name} is longer than {LONGEST / 1e6:.0f} MB.", "Score a part of it.")
    return text


def _bytes_of(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(LONGEST + 1)


def _score(engine: EngineClient, command: protocol.Score) -> protocol.Scored:
    line = ProgressLine()
    asked = Asked(engine, command)
    try:
        for event in asked:
            if isinstance(event, protocol.ProgressEvent):
                line.show(event.progress)
    finally:
        line.clear()
    return asked.result(protocol.Scored)
