"""The model or adapter that a person means: by name, id or path, in the library or not."""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Generic, NamedTuple

import msgspec

from app.core.errors import ErrorKind, WeftError
from app.core.library import AdapterEntry, ModelEntry
from app.core.paths import resources
from app.store.index_table import E, IndexTable

STARTER = {"starter": "model", "starter (gguf)": "*.gguf"}


class Wanted(NamedTuple, Generic[E]):
    """What is looked for, in words.

    Attributes:
        what: `model`. many: `models`, as the command line calls them. looks: a sentence on what one is on disk.
        recognise: reads one from disk; None where none lies there.
        besides: names that are known though the library does not hold them.
    """

    what: str
    many: str
    looks: str
    recognise: Callable[[Path], E | None]
    besides: tuple[str, ...] = ()


def _recognise_model(path: Path) -> ModelEntry | None:
    from app.core.recognise import recognise_model

    return recognise_model(path)


def _recognise_adapter(path: Path) -> AdapterEntry | None:
    from app.core.recognise import recognise_adapter

    return recognise_adapter(path)


MODEL = Wanted(
    what="model",
    many="models",
    looks="A model is a .gguf file, or a folder with config.json and its weights.",
    recognise=_recognise_model,
    besides=("starter",),
)
ADAPTER = Wanted(
    what="adapter",
    many="adapters",
    looks="An adapter is a folder with adapter_config.json, a .safetensors file with LoRA tensors, or a GGUF adapter.",
    recognise=_recognise_adapter,
)


def find(index: IndexTable[E], wanted: Wanted[E], text: str) -> E:
    """What a person means by this text. A name may be given without its `user/` part, in any case.

    Raises:
        WeftError: NOT_FOUND with close names; BAD_INPUT when several bear the name; CORRUPT or HOSTILE when a path leads to
            files that cannot be read.
    """
    path = _path(text)
    if (held := index.at(text, str(path))) is not None:
        return held
    if _exists(path):
        entry = wanted.recognise(path)
        if entry is not None:
            return entry
        if os.sep in text or path.is_file():
            raise WeftError(ErrorKind.NOT_FOUND, f"No {wanted.what} was found at {text}.", wanted.looks)
    elif os.sep in text and text.startswith((os.sep, ".", "~")):
        raise WeftError(
            ErrorKind.NOT_FOUND,
            f"There is no file or folder {text}.",
            "Check the path, or give a name of the library.",
        )
    return index.get(_by_name(index, wanted, text))


def _path(text: str) -> Path:
    path = Path(text)
    with contextlib.suppress(RuntimeError):  # `~` and a name that nobody has here: a file's own name, if anything
        path = path.expanduser()
    return path.absolute()


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name longer than names can be
        return False


def _by_name(index: IndexTable[E], wanted: Wanted[E], text: str) -> str:
    """The id of the one entry that bears this name."""
    word, names = text.strip().casefold(), index.names()
    exact = [(key, name) for key, name in names if name.casefold() == word]
    found = exact or [(key, name) for key, name in names if name.casefold().rpartition("/")[2] == word]
    if len(found) == 1:
        return found[0][0]
    if found:
        places = "\n".join(f"  {key}" for key, _ in found[:10])
        raise WeftError(
            ErrorKind.BAD_INPUT,
            f"{len(found)} {wanted.what}s are called {text!r}.",
            f"Give the path of the one you mean:\n{places}",
        )
    close = _close(text.casefold(), [*dict.fromkeys(name for _, name in names), *wanted.besides])
    hint = f"Did you mean {' or '.join(close)}?" if close else f"`weft {wanted.many}` lists what there is."
    raise WeftError(ErrorKind.NOT_FOUND, f"There is no {wanted.what} {text!r} in the library.", hint)


def _close(word: str, names: list[str]) -> list[str]:
    """Up to five names that are spelt nearly like this, or hold it."""
    folded = {part: name for name in names for part in (name.casefold(), name.casefold().rpartition("/")[2])}
    close = [folded[match] for match in difflib.get_close_matches(word, folded, n=5, cutoff=0.5)]
    close += [name for name in names if word and word in name.casefold()]
    return list(dict.fromkeys(close))[:5]


def starter(word: str = "starter") -> ModelEntry:
    """The model that ships with Weft: `starter` (safetensors) or `starter (gguf)`.

    Raises:
        WeftError: NOT_FOUND when the installation lacks it; CORRUPT when it is damaged.
    """
    folder = resources() / "starter"
    for path in sorted(folder.glob(STARTER[word.casefold()])):
        entry = _recognise_model(path)
        if entry is not None:
            return msgspec.structs.replace(
                entry,
                name="starter (GGUF)" if "gguf" in word.casefold() else "starter",
                root=str(folder),
                read_only=True,
            )
    raise WeftError(
        ErrorKind.NOT_FOUND,
        f"The starter model is missing from {folder}.",
        "Install Weft again, or name another model.",
    )
