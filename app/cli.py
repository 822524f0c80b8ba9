"""The command line: the window's tasks, headless. Thin: it parses, calls the rooms below, and prints."""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from app import (
    __version__,
    cli_certify,
    cli_check,
    cli_combine,
    cli_compare,
    cli_convert,
    cli_download,
    cli_export,
    cli_import,
    cli_merge,
    cli_perplexity,
    cli_push,
    cli_quantize,
    cli_train,
)
from app.backends import specs
from app.backends.base import Capability
from app.cli_engine import (
    add_adapter_arguments,
    add_load_arguments,
    add_sampling_arguments,
    conversation,
    loaded_engine,
    sampling_for,
    sampling_given,
)
from app.cli_events import Asked
from app.cli_library import find_model, find_stack
from app.cli_parser import CommandParser
from app.core.conversation import Message
from app.core.errors import ErrorKind, WeftError
from app.core.paths import default_paths
from app.core.roots import Root
from app.core.sampling import Sampling
from app.engine import machine, protocol
from app.engine.client import EngineClient
from app.engine.environments import USABLE, Environments
from app.store.database import Database
from app.store.library import LibraryStore
from app.store.refresh import library_roots, refresh
from app.store.settings import SettingsStore
from app.terminal import ProgressLine, print_error, print_json, readable_bytes, readable_count, table

DONE, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str]) -> int:
    """Run one command. Returns the exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    try:
        parsed = _parser().parse_args(arguments)
        return parsed.run(parsed)
    except WeftError as error:
        if error.kind is ErrorKind.CANCELLED:
            return INTERRUPTED
        print_error(error)
        return FAILED
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away (`weft models | head`): not an error of ours.
        with contextlib.suppress(OSError):
            sys.stdout.close()
        return DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="weft",
        description="Run language models on your own machine. Without arguments: the window.",
        epilog="From a source folder, `python3 run.py` stands for `weft`, and takes three more: `test` runs the tests, "
        "`environments` lists, installs, repairs and removes the engines, `--launcher` puts an icon into the desktop's menu.",
    )
    parser.add_argument("--version", action="version", version=f"weft {__version__}")
    commands: Any = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=CommandParser)

    loaders = commands.add_parser("loaders", help="what each loader can do on this machine, with reasons")
    loaders.set_defaults(run=_loaders)
    models = commands.add_parser("models", help="the models in the library")
    models.set_defaults(run=_models)
    adapters = commands.add_parser("adapters", help="the adapters in the library")
    adapters.set_defaults(run=_adapters)
    for command in (models, adapters):
        command.add_argument(
            "--root", action="append", type=Path, default=[], metavar="DIR", help="look only here (may be repeated)"
        )

    chat = commands.add_parser("chat", help="talk to a model; without -p, a conversation")
    chat.set_defaults(run=_chat)
    add_load_arguments(chat)
    chat.add_argument("-p", "--prompt", help="one prompt, then exit")
    chat.add_argument("--system", default="", metavar="S", help="the system prompt")
    add_adapter_arguments(chat)
    add_sampling_arguments(chat)
    download = cli_download.add_command(commands)
    cli_check.add_parser(commands)
    cli_import.add_parser(commands)
    cli_convert.add_parser(commands)
    cli_compare.add_parser(commands)
    cli_perplexity.add_parser(commands)
    cli_train.add_parser(commands)
    cli_combine.add_parser(commands)
    cli_export.add_parser(commands)
    cli_quantize.add_parser(commands)
    cli_certify.add_parser(commands)
    cli_push.add_parser(commands)
    cli_merge.add_parser(commands)
    for command in (loaders, models, adapters, chat, download):
        command.add_argument("--json", action="store_true", help="one JSON document on stdout")
    return parser


# The library -----------------------------------------------------------------------------------


def _loaders(parsed: argparse.Namespace) -> int:
    here = machine.probe()
    environments = Environments(default_paths().environments)
    rows: list[dict[str, Any]] = []
    for spec in specs().values():
        state = environments.state(spec.environment)
        reason = ""
        if spec.needs_cuda and not here.gpus:
            reason = "needs an NVIDIA graphics card"
        elif state not in USABLE:
            reason = f"its environment {spec.environment!r} is {state.value}; it is installed on first use"
        rows.append(
            {
                "id": spec.id,
                "title": spec.title,
                "formats": sorted(f.value for f in spec.formats),
                "environment": spec.environment,
                "available": not (spec.needs_cuda and not here.gpus),
                "ready": not reason,
                "reason": reason,
                "capabilities": {c.value: c in spec.capabilities for c in Capability},
            }
        )
    if parsed.json:
        print_json(rows)
        return DONE
    header = ["loader", "loads", *(c.value for c in Capability), "here"]
    cells = [
        [
            row["id"],
            ", ".join(row["formats"]),
            *("yes" if row["capabilities"][c.value] else "no" for c in Capability),
            row["reason"] or "ready",
        ]
        for row in rows
    ]
    print(table(header, cells))
    return DONE


def _models(parsed: argparse.Namespace) -> int:
    with _library(parsed.root) as library:
        entries = library.models()
    if parsed.json:
        print_json(entries)
        return DONE
    _print_table(
        ["name", "format", "architecture", "parameters", "size", "context", "where"],
        [
            [
                entry.name,
                f"{entry.format.value} {entry.quantization}".strip(),
                entry.architecture or "–",
                readable_count(entry.parameters),
                readable_bytes(entry.bytes),
                str(entry.shape.context or "–"),
                f"{entry.path}{f'  ({entry.problem})' if entry.problem else ''}",
            ]
            for entry in entries
        ],
        "No models found. Try `weft chat starter`.",
    )
    return DONE


def _adapters(parsed: argparse.Namespace) -> int:
    with _library(parsed.root) as library:
        entries = library.adapters()
    if parsed.json:
        print_json(entries)
        return DONE
    _print_table(
        ["name", "kind", "rank", "alpha", "base", "size", "where"],
        [
            [
                entry.name,
                entry.kind,
                str(entry.rank or "–"),
                f"{entry.alpha:g}" if entry.alpha else "–",
                entry.base or "–",
                readable_bytes(entry.bytes),
                f"{entry.path}{f'  ({entry.problem})' if entry.problem else ''}",
            ]
            for entry in entries
        ],
        "No adapters found.",
    )
    return DONE


@contextlib.contextmanager
def _library(roots: Sequence[Path]) -> Iterator[LibraryStore]:
    """The library, brought up to date; with roots, one of these alone that is forgotten afterwards."""
    paths = default_paths()
    with contextlib.ExitStack() as stack:
        if roots:
            where = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="weft-")))
            wanted = [_root(path) for path in roots]
            database = Database(where / "library.sqlite")
        else:
            wanted = library_roots(SettingsStore(paths.settings).settings, paths)
            database = Database(paths.database)
        stack.callback(database.close)
        library = LibraryStore(database)
        refresh(library, wanted, problem=_print_problem)
        yield library


def _root(path: Path) -> Root:
    if not path.is_dir():
        raise WeftError(ErrorKind.NOT_FOUND, f"There is no folder {path}.", "Name an existing folder after --root.")
    return Root(path=str(path.absolute()))


def _print_problem(problem: WeftError) -> None:
    print(f"note: {problem.message}", file=sys.stderr)


# Chat ------------------------------------------------------------------------------------------


def _chat(parsed: argparse.Namespace) -> int:
    given = sampling_given(parsed)
    if parsed.prompt is not None and not parsed.prompt.strip():
        raise WeftError(
            ErrorKind.BAD_INPUT, "The prompt is empty.", "Write it after -p, or leave -p away for a conversation."
        )
    stack = find_stack(parsed.adapter)
    model = find_model(parsed.model, parsed.loader)
    with loaded_engine(parsed, model, stack, baked=parsed.bake) as engine:
        sampling = sampling_for(model, given)
        if parsed.prompt is not None:
            answer = _answer(engine, conversation(parsed.system, parsed.prompt), sampling, quiet=parsed.json)
            if parsed.json:
                print_json(answer)
            return INTERRUPTED if answer["finish_reason"] == "cancelled" else DONE
        return _converse(engine, parsed, sampling)


def _answer(
    engine: EngineClient, messages: Sequence[Message], sampling: Sampling, *, quiet: bool = False
) -> dict[str, Any]:
    """Stream one answer to stdout; Ctrl+C stops it and keeps what came. Returns what `chat --json` prints."""
    started = time.perf_counter()
    first = 0.0
    text: list[str] = []
    line = ProgressLine()
    asked = Asked(engine, protocol.Generate(messages=tuple(messages), sampling=sampling))
    for event in asked:
        if isinstance(event, protocol.Tokens) and event.text:
            line.clear()
            first = first or time.perf_counter() - started
            text.append(event.text)
            if not quiet:
                print(event.text, end="", flush=True)
        elif isinstance(event, protocol.ProgressEvent):
            line.show(event.progress)
    line.clear()
    result = asked.result(protocol.Generated)
    if not quiet:
        print(flush=True)
    if result.dropped_messages:
        print(f"note: the {result.dropped_messages} oldest messages no longer fit into the context", file=sys.stderr)
    return {
        "text": "".join(text),
        "tokens": result.tokens,
        "tokens_per_second": result.tokens / result.seconds if result.seconds > 0 else 0.0,
        "time_to_first_token": first,
        "finish_reason": result.finish_reason,
        "prompt_tokens": result.prompt_tokens,
        "reused_tokens": result.reused_tokens,
        "dropped_messages": result.dropped_messages,
        "seed": result.seed,
    }


def _converse(engine: EngineClient, parsed: argparse.Namespace, sampling: Sampling) -> int:
    """Turns from stdin until its end (Ctrl+D); Ctrl+C stops an answer, and at the prompt leaves."""
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() line editing and a history)
        print(f"Talking to {parsed.model}. Ctrl+C stops an answer, Ctrl+D ends.", file=sys.stderr)
    messages = conversation(parsed.system)
    answers: list[dict[str, Any]] = []
    while True:
        try:
            turn = input("› " if interactive else "")
        except EOFError:
            break
        if not turn.strip():
            continue
        messages.append(Message(role="user", content=turn))
        answer = _answer(engine, messages, sampling, quiet=parsed.json)
        messages.append(Message(role="assistant", content=answer["text"]))
        answers.append(answer)
    if parsed.json:
        print_json(answers)
    elif interactive:
        print(file=sys.stderr)
    return DONE


# Output ----------------------------------------------------------------------------------------


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]], empty: str) -> None:
    print(table(header, rows) if rows else empty)
