"""`weft compare MODEL -p PROMPT --stack a=1,b=0.5 --stack base`: one prompt, several adapter stacks, the same seed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from app.cli_engine import (
    add_load_arguments,
    add_sampling_arguments,
    conversation,
    loaded_engine,
    sampling_for,
    sampling_given,
)
from app.cli_events import Asked
from app.cli_library import find_model, find_stack
from app.core.errors import ErrorKind, WeftError
from app.core.paths import default_paths
from app.core.stack import AdapterStack
from app.engine import protocol
from app.engine.client import EngineClient
from app.store.database import Database
from app.store.stacks import StackStore
from app.terminal import ProgressLine, print_json

BASE = "base"
_DONE, _INTERRUPTED = 0, 130


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Put `compare` among the commands."""
    compare = commands.add_parser("compare", help="one prompt under several adapter stacks, side by side")
    compare.set_defaults(run=_run)
    add_load_arguments(compare)
    compare.add_argument("-p", "--prompt", required=True, help="what all of them answer")
    compare.add_argument("--system", default="", metavar="S", help="the system prompt")
    compare.add_argument(
        "--stack",
        action="append",
        required=True,
        metavar="A[=W],B[=W]",
        help="adapters by path or library name with their weights, a saved stack's name, or `base` (two or more times)",
    )
    add_sampling_arguments(compare)
    compare.add_argument("--json", action="store_true", help="one JSON document on stdout")


def _run(parsed: argparse.Namespace) -> int:
    given = sampling_given(parsed)
    if not parsed.prompt.strip():
        raise WeftError(ErrorKind.BAD_INPUT, "The prompt is empty.", "Write it after -p.")
    stacks = [find_named_stack(text) for text in parsed.stack]
    if len(stacks) < 2:
        raise WeftError(
            ErrorKind.BAD_INPUT,
            "One stack alone has nothing to be compared with.",
            "Add --stack base, or another stack.",
        )
    messages = tuple(conversation(parsed.system, parsed.prompt))
    rows = tuple(protocol.BatchRow(adapters=stack, messages=messages) for stack in stacks)
    model = find_model(parsed.model, parsed.loader)
    with loaded_engine(parsed, model, AdapterStack(), also=stacks) as engine:
        sampling = sampling_for(model, given)
        printer = _Printer([] if parsed.json else stacks)
        texts, result = _answer(engine, protocol.GenerateBatch(rows=rows, sampling=sampling), printer)
    if parsed.json:
        print_json(_document(parsed, stacks, texts, result))
    elif result.note:
        print(f"note: {result.note}", file=sys.stderr)
    return _INTERRUPTED if any(row.finish_reason == "cancelled" for row in result.rows) else _DONE


def find_named_stack(text: str) -> AdapterStack:
    """A stack as it is typed: `base`, the name of a saved one, or adapters with weights, parted by commas.

    Raises:
        WeftError: as `find_stack`; BAD_INPUT for an empty one.
    """
    if not text.strip():
        raise WeftError(ErrorKind.BAD_INPUT, "A stack is empty.", "Write --stack base for the model without adapters.")
    if text.strip().casefold() == BASE:
        return AdapterStack()
    if "=" not in text and not Path(text).expanduser().exists() and (saved := _saved(text)) is not None:
        return saved
    if Path(text.rpartition("=")[0] or text).expanduser().exists():  # a path may hold commas
        return find_stack([text])
    return find_stack([part for part in text.split(",") if part.strip()])


def _saved(name: str) -> AdapterStack | None:
    database = Database(default_paths().database)
    try:
        return StackStore(database).get(name).stack
    except WeftError as error:
        if error.kind is not ErrorKind.NOT_FOUND:
            raise
        return None
    finally:
        database.close()


def _answer(
    engine: EngineClient, command: protocol.GenerateBatch, printer: _Printer
) -> tuple[list[str], protocol.GeneratedBatch]:
    """Run the batch; Ctrl+C stops it and keeps what came. Returns the rows' texts, and the result."""
    texts: list[list[str]] = [[] for _ in command.rows]
    line = ProgressLine()
    asked = Asked(engine, command)
    for event in asked:
        if isinstance(event, protocol.Tokens) and event.id == asked.id:
            line.clear()
            texts[event.row].append(event.text)
            printer.say(texts)
        elif isinstance(event, protocol.ProgressEvent):
            line.show(event.progress)
        elif isinstance(event, protocol.Log) and event.level in ("warning", "error"):
            line.clear()
            print(f"note: {event.text}", file=sys.stderr)
    line.clear()
    result = asked.result(protocol.GeneratedBatch)
    printer.finish(texts, result)
    return ["".join(pieces) for pieces in texts], result


class _Printer:
    """Sections, one a stack. The first streams as it comes; what the others say waits for their turn.

    Args:
        stacks: of the rows; none prints nothing.
    """

    def __init__(self, stacks: Sequence[AdapterStack]) -> None:
        self._stacks = stacks
        self._printed = 0  # pieces of the first row
        self._begun = False

    def say(self, texts: list[list[str]]) -> None:
        if not self._stacks or not texts[0]:
            return
        if not self._begun:
            self._begun = True
            self._heading(0)
        print("".join(texts[0][self._printed :]), end="", flush=True)
        self._printed = len(texts[0])

    def finish(self, texts: list[list[str]], result: protocol.GeneratedBatch) -> None:
        for number in range(len(self._stacks)):
            if number or not self._begun:
                self._heading(number)
                print("".join(texts[number]), end="")
            row = result.rows[number]
            speed = f", {row.tokens / row.seconds:.1f} tokens/s" if row.seconds > 0 else ""
            print(f"\n({row.tokens} tokens{speed}, {row.finish_reason})\n", flush=True)

    def _heading(self, number: int) -> None:
        print(f"── {self._stacks[number].title} ──", flush=True)


def _document(
    parsed: argparse.Namespace, stacks: Sequence[AdapterStack], texts: list[str], result: protocol.GeneratedBatch
) -> dict[str, Any]:
    return {
        "model": parsed.model,
        "prompt": parsed.prompt,
        "together": not result.note,
        "note": result.note,
        "rows": [
            {
                "stack": stack.title,
                "adapters": stack.adapters,
                "text": text,
                "tokens": row.tokens,
                "tokens_per_second": row.tokens / row.seconds if row.seconds > 0 else 0.0,
                "finish_reason": row.finish_reason,
                "prompt_tokens": row.prompt_tokens,
                "reused_tokens": row.reused_tokens,
                "seed": row.seed,
            }
            for stack, text, row in zip(stacks, texts, result.rows, strict=True)
        ],
    }
