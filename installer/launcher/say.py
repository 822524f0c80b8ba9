"""What the launcher tells the person who started it, and how it stops."""

from __future__ import annotations

import sys


class Stop(Exception):
    """Nothing more can be done: the text says why and what to do next.

    Args:
        text: for the person.
        status: the exit status.
    """

    def __init__(self, text: str, status: int = 1) -> None:
        super().__init__(text)
        self.text = text
        self.status = status


def say(text: str) -> None:
    """Print a line about what is being done. On stderr: stdout belongs to results."""
    print(f"weft: {text}", file=sys.stderr, flush=True)


def say_briefly(text: str) -> None:
    """Tell what is going on right now: on a terminal in one line that the next takes the place of, "" clearing it."""
    if sys.stderr.isatty():
        print(f"\r\033[K{'weft:   ' if text else ''}{text[:70]}", end="", file=sys.stderr, flush=True)
    elif text and not text.startswith("looking for"):
        say(f"  {text}")
