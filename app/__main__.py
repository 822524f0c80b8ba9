"""`python -m app`: the window with no arguments (or with files to open), else the command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path


def wants_window(arguments: Sequence[str]) -> bool:
    """Whether these arguments are files and links to open, or none. A bare word is a command, whatever lies here."""
    return all(a.startswith("weft://") or (Path(a).exists() and Path(a).name != a) or _is_file(a) for a in arguments)


def _is_file(argument: str) -> bool:
    return Path(argument).suffix != "" and Path(argument).is_file()


def main() -> int:
    """Start the window, or run one command. Returns the exit status."""
    arguments = sys.argv[1:]
    try:
        if wants_window(arguments):
            from app import bootstrap

            return bootstrap.main(arguments)
        from app import cli

        return cli.main(arguments)
    except KeyboardInterrupt:  # while something was still being imported
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
