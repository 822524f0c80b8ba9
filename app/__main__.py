"""`python -m app`: the window with no arguments (or with files to open), else the command line."""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> int:
    """Start the window, or run one command. Returns the exit status."""
    arguments = sys.argv[1:]
    if all(argument.startswith("weft://") or Path(argument).exists() for argument in arguments):
        from app import bootstrap

        return bootstrap.main(arguments)
    from app import cli

    return cli.main(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
