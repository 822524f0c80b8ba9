"""Which 16-bit model a quantized one was made from, as far as its files tell: adapters are merged into that."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from app.core.errors import WeftError
from app.core.formats import JsonObject, read_json
from app.core.unfinished import read_note

_MARK = re.compile(
    r"[-_.](unsloth-)?(bnb[-_]?[48]bit|[248]bits?|gptq|awq|exl[23]|hqq|int[48]|w[48]a16|fp8|eetq)([-_.].*)?$", re.IGNORECASE
)  # fmt: skip

_CARD = 64 * 1024  # bytes of a card that are read
# As adapters/merge_folder.py and tasks/quantize.py write it.
_BASE = re.compile(r"\A---\n.*?^base_model:\n- ([^\n]+)\n.*?^---\n", re.MULTILINE | re.DOTALL)
_OURS = re.compile(r" (by Weft with GPTQModel|merged into its weights by Weft)\b")
_MERGED = re.compile(r"^(.+) with (.+) merged into its weights by Weft\.$", re.MULTILINE)


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """What a model was made from.

    Attributes:
        base: name of the 16-bit model; "" where nothing tells. adapters: merged in before, with their weights; "" for none.
        ours: Weft made it, of a model that was on this computer: the name need not be one of the hub's.
    """

    base: str = ""
    adapters: str = ""
    ours: bool = False


def origin_of(folder: Path) -> Origin:
    """From the card that Weft has written into a folder, else `base_of` it."""
    try:
        with (folder / "README.md").open(encoding="utf-8", errors="replace") as file:
            card = file.read(_CARD)
    except OSError:
        card = ""
    base = _BASE.match(card)
    if base is None or not _OURS.search(card):
        return Origin(base=base_of(folder))
    merged = _MERGED.search(card)
    name = base[1].strip()
    if without_mark(name) != name:  # that one had lost something itself
        return Origin(ours=True)
    return Origin(base=name, adapters=merged[2] if merged is not None else "", ours=True)


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
