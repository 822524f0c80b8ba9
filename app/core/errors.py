"""WeftError: what went wrong, on what, and what to do next.

Every failure a person can meet is one of these. A `kind` lets code decide (retry, offer a smaller
setting, stop); `message` names the file or option and what is wrong with it; `hint` is the next step.
"""

from __future__ import annotations

from enum import StrEnum


class ErrorKind(StrEnum):
    """Why something failed, as far as code has to tell the cases apart."""

    BAD_INPUT = "bad_input"  # an option, argument or field has a wrong value
    NOT_FOUND = "not_found"  # a model, file, job or name does not exist
    CORRUPT = "corrupt"  # a file is truncated or damaged
    HOSTILE = "hostile"  # a file tries something it must not (pickle, path escape, bomb)
    UNSUPPORTED = "unsupported"  # well-formed, but nothing here can serve it
    ENVIRONMENT = "environment"  # an engine's Python environment is missing or broken
    OUT_OF_MEMORY = "out_of_memory"
    DISK_FULL = "disk_full"
    PERMISSION = "permission"  # the operating system said no, or the place is read-only
    BUSY = "busy"  # somebody else holds it (a second instance, a running job)
    CRASHED = "crashed"  # a child process died without saying why
    UNRESPONSIVE = "unresponsive"  # a child process stopped answering
    CANCELLED = "cancelled"
    NETWORK = "network"
    PROTOCOL = "protocol"  # the two sides of a pipe disagree
    INTERNAL = "internal"  # a defect of ours


class WeftError(Exception):
    """A failure in words a user can act on.

    Args:
        kind: what sort of failure.
        message: what failed, and on which file or option. One or two sentences.
        hint: the next step, as an instruction. May be empty only for CANCELLED.
    """

    def __init__(self, kind: ErrorKind, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()
