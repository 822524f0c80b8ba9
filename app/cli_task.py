"""A task from the command line: run in a child of its environment, progress on stderr, Ctrl+C cancels it cleanly."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from app.cli_events import Asked
from app.core.errors import ErrorKind, WeftError
from app.core.paths import Paths, default_paths
from app.engine import launch, protocol
from app.engine.client import EngineClient
from app.engine.environments import USABLE, Environments
from app.terminal import ProgressLine

STAGED = frozenset({"merge", "export_gguf", "quantize"})  # tasks that make their result beside its target


def ensure_environment(name: str) -> None:
    """Install an engine environment, with its progress on stderr, where it is not there.

    Raises:
        WeftError: as `Environments.install`.
    """
    environments = Environments(default_paths().environments)
    if environments.state(name) not in USABLE:
        environments.install_for_command_line(name)


def run_task(
    environment: str,
    task: str,
    parameters: msgspec.Struct,
    *,
    paths: Paths | None = None,
    variables: dict[str, str] | None = None,
    on_metric: Callable[[int, dict[str, float]], str | None] | None = None,
    on_news: Callable[[str], str | None] | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Run a task to its end and return its result.

    Args:
        environment: name of the environment whose Python runs it; "" for the window's own.
        variables: more environment variables for the child.
        on_metric, on_news: called with each; a text that they return is printed on stderr as a line.
        quiet: no progress line (warnings are printed all the same).

    Raises:
        WeftError: ENVIRONMENT when it is not installed; what the task raises; CRASHED; CANCELLED after Ctrl+C.
    """
    paths = paths or default_paths()
    client = _client(environment, paths, f"{task}-command", variables)
    with _staged(paths, task, parameters):
        return _followed(client, task, parameters, on_metric, on_news, quiet)


@contextlib.contextmanager
def _staged(paths: Paths, task: str, parameters: msgspec.Struct) -> Iterator[None]:
    """Note where the result is made while it is, and clear away what a cancelled job was ended in the middle of."""
    if task not in STAGED:
        yield
        return
    from app.adapters import merge_leftovers, staging_places

    target = Path(str(getattr(parameters, "target", "")))
    staging_places.remember(paths.unfinished, target)
    try:
        yield
    except WeftError as error:
        if error.kind is ErrorKind.CANCELLED:
            left = merge_leftovers.leftover_of(target)
            if left is not None:
                merge_leftovers.sweep(left)
            print(f"note: cancelled; nothing of {target.name} was kept", file=sys.stderr)
        raise
    finally:
        if merge_leftovers.leftover_of(target) is None:
            staging_places.forget(paths.unfinished, target)


def _followed(
    client: EngineClient,
    task: str,
    parameters: msgspec.Struct,
    on_metric: Callable[[int, dict[str, float]], str | None] | None,
    on_news: Callable[[str], str | None] | None,
    quiet: bool,
) -> dict[str, Any]:
    line = ProgressLine()
    client.start()
    try:
        asked = Asked(client, protocol.RunTask(task=task, parameters=msgspec.json.encode(parameters).decode()))
        for event in asked:
            text: str | None = None
            match event:
                case protocol.ProgressEvent() if not quiet:
                    line.show(event.progress)
                case protocol.Metric() if on_metric is not None:
                    text = on_metric(event.step, event.values)
                case protocol.News() if on_news is not None:
                    text = on_news(event.json)
                case protocol.Log() if event.level in ("warning", "error"):
                    text = f"{event.level}: {event.text}"
                case _:
                    pass
            if text:
                line.clear()
                print(text, file=sys.stderr)
        found = json.loads(asked.result(protocol.TaskResult).json)
        return found if isinstance(found, dict) else {"result": found}
    finally:
        line.clear()
        client.shutdown()


def _client(environment: str, paths: Paths, log_name: str, variables: dict[str, str] | None) -> EngineClient:
    given = {"WEFT_CACHE": str(paths.cache), **(variables or {})}
    if not environment:
        return launch.own_engine(paths, log_name, given)
    return launch.task_engine(environment, paths, log_name, given)
