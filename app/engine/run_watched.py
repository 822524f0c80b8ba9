"""`python -m app.engine.run_watched PROGRAM ARGUMENT…`: become PROGRAM, and end with all it started when our parent dies.

The parent holds the other end of stdin. Both outputs go to stderr, so that their order is kept.
"""

from __future__ import annotations

import os
import subprocess
import sys

from app.engine import watchdog


def main(command: list[str]) -> int:
    """Run the command in this process (on Windows, where that detaches it, as a child)."""
    # What starts us must not reach the Pythons that a build starts.
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    os.dup2(2, 1)
    if sys.platform == "win32":  # there the parent's job object ends us with it
        return subprocess.call(command, env=environment, stdin=subprocess.DEVNULL)
    pipe = os.dup(0)
    quiet = os.open(os.devnull, os.O_RDONLY)
    os.dup2(quiet, 0)
    watchdog.start(pipe)
    os.nice(10)  # the rest of the machine goes first: a compiler takes every core for ten minutes
    return os.execve(command[0], command, environment)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
