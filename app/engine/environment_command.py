"""`python -m app.engine.environment_command`: install, repair, remove and list engine environments without the window."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from app.core.errors import WeftError
from app.core.paths import default_paths
from app.engine.environments import Environments
from app.terminal import print_error, readable_bytes


def main(arguments: list[str]) -> int:
    """Run one command. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="environments", description="The Python environments that engines run in.")
    parser.add_argument("action", choices=("list", "install", "repair", "remove", "python"))
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--definitions", action="append", type=Path, default=[], metavar="DIR", help="more lists than Weft's own")
    parsed = parser.parse_args(arguments)
    if parsed.action != "list" and not parsed.names:
        parser.error(f"{parsed.action} which one? `list` names them")
    own = Environments(default_paths().environments)
    environments = Environments(own.root, (*own.definitions, *parsed.definitions))
    try:
        if parsed.action == "list":
            for name, spec in environments.specs().items():
                state = environments.state(name)
                print(f"{name:10} {state.value:11} {readable_bytes(environments.size(name)):>8}  {spec.title}")
        for name in parsed.names:
            match parsed.action:
                case "install":
                    environments.install_for_command_line(name)
                case "repair":
                    environments.install_for_command_line(name, repair=True)
                case "remove":
                    environments.remove(name)
                case _:
                    print(environments.python(name))
    except WeftError as error:
        print_error(error)
        return 1
    except KeyboardInterrupt:
        print("Stopped. What is complete is kept.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
