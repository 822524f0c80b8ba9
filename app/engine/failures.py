"""What an exception in a child means to a person: from exception to Failed, with the next step."""

from __future__ import annotations

import errno
import re
import traceback

from app.core.errors import ErrorKind, WeftError
from app.engine.protocol import Command, Failed, Generate, GenerateBatch, Load, RunTask, Unload

_OUT_OF_MEMORY = re.compile(
    r"out of memory|outofmemory|bad_alloc|can(?:no|')t allocate|cannot allocate|failed to allocate|unable to allocate"
    r"|not enough memory|insufficient memory|cudaMalloc failed|CUDA_ERROR_OUT_OF_MEMORY|MemoryError",
    re.IGNORECASE,
)
SMALLER_LOAD = (
    "Choose a shorter context length, a smaller model or a smaller quantization, or put fewer layers on the graphics card, "
    "and close other programs that use much memory."
)
_SMALLER_RUN = "Load the model with a shorter context length, or ask with a shorter text."
_SMALLER_TASK = "Choose a smaller batch size or a shorter length, and close other programs that use much memory."
_REPORT = "Try again. If it happens again, report it with the engine's log."


def mentions_out_of_memory(text: str) -> bool:
    """Whether a library's message or log says that memory ran out."""
    return _OUT_OF_MEMORY.search(text) is not None


def failed(command: Command, error: BaseException, *, cancelled: bool) -> Failed:
    """The Failed event for an exception that ended a command (an Unload without an id: the engine's start).

    Args:
        cancelled: Cancel had come; whatever a library then raises is the cancellation.
    """
    known = error if isinstance(error, WeftError) else _known(command, error)
    if cancelled and (known is None or known.kind is ErrorKind.INTERNAL):
        known = WeftError(ErrorKind.CANCELLED, "Cancelled.")
    if known is not None:
        detail = "" if isinstance(error, WeftError) and error.kind is not ErrorKind.INTERNAL else describe(error)
        return Failed(id=command.id, kind=known.kind.value, message=known.message, hint=known.hint, detail=detail)
    return Failed(
        id=command.id,
        kind=ErrorKind.INTERNAL.value,
        message=f"{_verb(command)} failed unexpectedly: {one_line(error)}",
        hint=_REPORT,
        detail=describe(error),
    )


def one_line(error: BaseException) -> str:
    """Type and message, short enough for a dialog."""
    text = " ".join(str(error).split())
    name = type(error).__name__
    return f"{name}: {text[:300]}" if text else name


def describe(error: BaseException) -> str:
    """The traceback, for the log; bounded."""
    try:
        return "".join(traceback.format_exception(error))[-64 * 1024 :]
    except (MemoryError, RecursionError):
        return type(error).__name__


def _verb(command: Command) -> str:
    if isinstance(command, RunTask):
        return f"The task {command.task}"
    if isinstance(command, Load):
        return f"Loading {command.model.name}"
    if isinstance(command, Unload) and not command.id:
        return "Starting the engine"
    return "Generating" if isinstance(command, Generate | GenerateBatch) else "The command"


def _known(command: Command, error: BaseException) -> WeftError | None:
    if _is_out_of_memory(error):
        return _out_of_memory(command, error)
    if isinstance(error, ImportError):
        return WeftError(
            ErrorKind.ENVIRONMENT,
            f"A library that this loader needs cannot be imported: {one_line(error)}",
            "Repair the loader's environment in the settings, then try again.",
        )
    if isinstance(error, OSError) and error.errno is not None:
        return _operating_system(error)
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # torch's CPU allocator and most C++ libraries raise a plain RuntimeError with words in it.
    return isinstance(error, RuntimeError | ValueError) and mentions_out_of_memory(str(error))


def _out_of_memory(command: Command, error: BaseException) -> WeftError:
    if isinstance(command, Load):
        message, hint = f"There is not enough memory to load {command.model.name}.", SMALLER_LOAD
    elif isinstance(command, RunTask):
        message, hint = f"The task {command.task} ran out of memory.", _SMALLER_TASK
    else:
        message, hint = "There is not enough memory to go on.", _SMALLER_RUN
    words = " ".join(str(error).split())
    return WeftError(ErrorKind.OUT_OF_MEMORY, f"{message} ({words[:200]})" if words else message, hint)


def _operating_system(error: OSError) -> WeftError | None:
    where = str(error.filename) if error.filename is not None else "A file"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return WeftError(ErrorKind.DISK_FULL, f"The disk is full: {where}.", "Free some space, then try again.")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return WeftError(
            ErrorKind.PERMISSION,
            f"{where} may not be opened: {error.strerror}.",
            "Change its permissions, or choose another place.",
        )
    if error.errno == errno.ENOENT and error.filename is not None:
        return WeftError(
            ErrorKind.NOT_FOUND, f"{where} does not exist.", "Refresh the library, or choose another file."
        )
    if error.errno == errno.EIO:
        return WeftError(
            ErrorKind.CORRUPT, f"{where} cannot be read: {error.strerror}.", "Check the disk, or fetch the file again."
        )
    return None
