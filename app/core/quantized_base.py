"""Which 16-bit model a quantized one was made from, as far as its files tell: adapters are merged into that."""

from __future__ import annotations

import re
from pathlib import Path

from app.core.errors import WeftError
from app.core.formats import JsonObject, read_json
from app.core.unfinished import read_note

_MARK = re.compile(
    r"[-_.](unsloth-)?(bnb[-_]?[48]bit|[248]bits?|gptq|awq|exl[23]|hqq|int[48]|w[48]a16|fp8|eetq)([-_.].*)?$", re.IGNORECASE
)  # fmt: skip


def likely_base(folder: Path, config: JsonObject) -> str:
    """The hub's name of the 16-bit model, or its name alone; "" where nothing tells."""
    note = read_note(folder)
    for name in (config.get("_name_or_path"), note.repo if note is not None else "", folder.name):
        if isinstance(name, str) and (match := re.fullmatch(r"([\w.-]+/)?([\w.-]+)", name)):
            tail = _MARK.sub("", match[2])
            if tail != match[2] or (match[1] and name == config.get("_name_or_path")):
                return (match[1] or "") + tail
    return ""


def without_mark(name: str) -> str:
    """A quantized model's name without what says how it is quantized: `tiny-GPTQ-4bit` as `tiny`."""
    return _MARK.sub("", name) or name


def base_of(folder: Path) -> str:
    """`likely_base` of a folder; "" also when its configuration cannot be read."""
    try:
        return likely_base(folder, read_json(folder / "config.json"))
    except (WeftError, OSError):
        return ""
