"""Files of plain text that somebody names: read, or refused in words where they are something else."""

from __future__ import annotations

from pathlib import Path

from app.core.errors import ErrorKind, WeftError

_LOOK = 1024 * 1024  # bytes that are enough to tell text from something else
_FOREIGN = 0.25  # of the characters that may be no UTF-8: an old encoding's accents, not a program


def read_plain(path: Path, most: int = _LOOK) -> str:
    """The first `most` bytes of a text file; what is no UTF-8 in it is replaced.

    Raises:
        WeftError: NOT_FOUND; PERMISSION; BAD_INPUT for what is no text.
    """
    try:
        with path.open("rb") as file:
            data = file.read(most)
    except FileNotFoundError:
        raise WeftError(ErrorKind.NOT_FOUND, f"There is no text {path}.", "Check the path.") from None
    except OSError as error:
        raise WeftError(ErrorKind.PERMISSION, f"{path} cannot be read: {error.strerror}.", "Check the file.") from error
    text = data.decode("utf-8", "replace")
    if b"\0" in data or text.count("\ufffd") > max(1, _FOREIGN * len(text)):
        raise WeftError(
            ErrorKind.BAD_INPUT,
            f"{path} is no text in UTF-8.",
            "Name a plain text file; save one of another encoding as UTF-8 first.",
        )
    return text
