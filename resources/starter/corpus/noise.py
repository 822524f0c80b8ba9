"""How people really type: greetings in front, no capitals, missing words, slips of the finger."""

from __future__ import annotations

import random
import re
import tomllib
from pathlib import Path

_HABITS = tomllib.loads((Path(__file__).parent / "habits.toml").read_text(encoding="utf-8"))
_BEFORE, _AFTER, _FILLER = _HABITS["before"], _HABITS["after"], _HABITS["filler"]
_DROP, _ASKING = frozenset(_HABITS["drop"].split()), frozenset(_HABITS["asking"].split())
_PROPER = [(re.compile(rf"\b{re.escape(name.lower())}\b"), name) for name in _HABITS["names"]]
_BESIDE = dict(zip("qwertyuiopasdfghjklzxcvbnm", "wqrtyuioipsadfghjkxzcvbnmn", strict=True))
_SWAPS = {text: group.split("|") for group in _HABITS["alike"] for text in group.split("|")[:4]}
_SWAPPABLE = re.compile(
    r"(?<![\w'])(" + "|".join(map(re.escape, sorted(_SWAPS, key=len, reverse=True))) + r")(?![\w'])"
)


def vary(text: str, rng: random.Random, amount: float = 1.0) -> str:
    """Dress a plain question up, or spoil it, as people do; `amount` scales how often."""
    if rng.random() < 0.45 * amount:
        text = _SWAPPABLE.sub(lambda match: rng.choice(_SWAPS[match[0]]) if rng.random() < 0.4 else match[0], text)
    words = text.split()
    if len(words) > 3 and rng.random() < 0.22 * amount:
        words = _without_small_words(words, rng)
    if len(words) > 2 and rng.random() < 0.15 * amount:
        words.insert(rng.randrange(1, len(words)), rng.choice(_FILLER))
    if rng.random() < 0.14 * amount:
        words = [_slip(word, rng) if len(word) > 3 and rng.random() < 0.25 else word for word in words]
    text = " ".join(words)
    if len(words) > 1 and rng.random() < 0.2 * amount:
        text = rng.choice(_BEFORE) + text
    if len(words) > 1 and rng.random() < 0.15 * amount:
        text += rng.choice(_AFTER)
    return _cased(text, rng) + _ending(text, rng)


def _without_small_words(words: list[str], rng: random.Random) -> list[str]:
    kept = [word for word in words if word not in _DROP or rng.random() < 0.55]
    return kept if len(kept) > 1 else words


def _slip(word: str, rng: random.Random) -> str:
    at = rng.randrange(1, len(word) - 1)
    kind = rng.randrange(4)
    if kind == 0:
        return word[:at] + word[at + 1 :]
    if kind == 1:
        return word[:at] + word[at] + word[at:]
    if kind == 2:
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return word[:at] + _BESIDE.get(word[at], word[at]) + word[at + 1 :]


def _cased(text: str, rng: random.Random) -> str:
    style = rng.random()
    if style < 0.42:
        return text
    if style < 0.46:
        return text.upper()
    if style < 0.50:
        return text.title()
    for pattern, proper in _PROPER:
        text = pattern.sub(proper, text)
    return text[:1].upper() + text[1:]


def _ending(text: str, rng: random.Random) -> str:
    if text[-1:] in "?!.":
        return ""
    asks = text.split(" ", 1)[0] in _ASKING
    return rng.choices(
        ("?", "", ".", "!", "??", " ?", "..."), (60, 30, 2, 1, 2, 3, 1) if asks else (14, 46, 26, 8, 1, 1, 3)
    )[0]
