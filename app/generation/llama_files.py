"""Our own look at GGUF files before llama.cpp sees them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from app.core.errors import ErrorKind, WeftError
from app.core.formats import read_gguf_header


def check_files(parts: Sequence[Path]) -> None:
    """Read the header of every part, within bounds.

    Raises:
        WeftError: CORRUPT or HOSTILE.
    """
    for part in parts:
        header = read_gguf_header(part)
        if "tokenizer.ggml.tokens" in header.metadata:
            _check_vocabulary(part, header.strings("tokenizer.ggml.tokens"))


def _check_vocabulary(path: Path, tokens: list[str]) -> None:
    """llama.cpp aborts its process on a vocabulary that holds a token twice."""
    tokens = [token for token in tokens if "\ufffd" not in token]  # of raw bytes we cannot tell
    if len(set(tokens)) == len(tokens):
        return
    twice = next(token for token, count in Counter(tokens).items() if count > 1)
    raise WeftError(
        ErrorKind.CORRUPT,
        f"The vocabulary of {path.name} holds the token {twice[:40]!r} twice: the file is damaged, or was converted wrongly.",
        "Download it again, or take another conversion of the model.",
    )
