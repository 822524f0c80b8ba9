"""`weft push DIR REPO`: a model or an adapter put onto the hub, private unless told otherwise."""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec

from app.cli_task import run_task
from app.core.paths import default_paths
from app.core.push_plan import PushPlan, PushResult
from app.hub.push import check_repo, files_of
from app.store.secrets import TokenStore
from app.store.settings import SettingsStore
from app.terminal import print_json, readable_bytes


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Put `push` among the commands."""
    command = commands.add_parser("push", help="put a model or an adapter onto the hub, private by default")
    command.set_defaults(run=_run)
    command.add_argument("path", type=Path, metavar="DIR", help="a folder, or one file")
    command.add_argument("repo", metavar="REPO", help="user/name, or a name of your own; made if it is not there")
    command.add_argument("--public", action="store_true", help="everybody may see it")
    command.add_argument("--update", action="store_true", help="put the files into a repository that has some already")
    command.add_argument("--message", default="", metavar="TEXT", help="of the commit")
    command.add_argument("--json", action="store_true", help="one JSON document on stdout")


def _run(parsed: argparse.Namespace) -> int:
    settings = SettingsStore(default_paths().settings).settings
    path = parsed.path.expanduser().absolute()
    files_of(path)  # before anybody is asked for a keyring's password
    plan = PushPlan(
        path=str(path),
        repo=check_repo(parsed.repo),
        private=not parsed.public,
        update=parsed.update,
        message=parsed.message,
        endpoint=settings.hub_endpoint,
        proxy=settings.proxy,
        token=TokenStore().get(settings.hub_endpoint)[0],
    )
    made = msgspec.convert(run_task("", "push_hub", plan), PushResult)
    if parsed.json:
        print_json(made)
        return 0
    known = f", {readable_bytes(made.known)} of it there already" if made.known else ""
    who = "private" if made.private else "public"
    count = f"{made.files} file{'s' if made.files > 1 else ''}"
    print(f"{made.url}: {count}, {readable_bytes(made.bytes)}{known}, {who}.")
    return 0
