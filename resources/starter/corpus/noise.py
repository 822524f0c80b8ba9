"""How people really type: greetings in front, no capitals, missing words, slips of the finger."""

from __future__ import annotations

import random
import re

_BEFORE = (
    "please ", "hi, ", "hello, ", "hey, ", "hey weft, ", "weft, ", "excuse me, ", "quick question: ", "question: ", "ok, ",
    "ok so ", "and ", "so ", "sorry, but ", "one more thing: ", "now ", "well, ", "also, ", "alright, ", "another question: ",
    "hmm, ", "uh ", "i wonder: ", "just curious, ", "can you tell me ", "could you tell me ", "do you know ", "tell me, ",
    "i'd like to know ", "i was wondering, ", "please tell me ", "i'm new here, ", "newbie question: ", "but ", "then ",
    "hi there! ", "good morning, ", "dear weft, ", "one question, ", "maybe a stupid question, but ", "for my work: ",
)  # fmt: skip
_AFTER = (
    " please", " pls", " thanks", ", please", ", thanks", " now", " today", " again", " exactly", " here", " then", " quickly",
    " for me", ", any idea", ", do you know", " somehow", " right now", ", can you help", ", i wonder", " at all", " actually",
    " by the way", " if possible", ", i forgot", " for the first time", " as a beginner", ", thank you", ", tell me", " myself",
)  # fmt: skip
_FILLER = ("just", "actually", "really", "maybe", "simply", "quickly", "even", "also", "please", "exactly", "again", "ever", "somehow", "best", "properly", "first", "like", "own", "only")
_DROP = frozenset("a an the my do i to is are of in on it does can you me this that there for how what be one some please with where".split())
_NAMES = (("lora", "LoRA"), ("loras", "LoRAs"), ("gguf", "GGUF"), ("weft", "Weft"), ("gpu", "GPU"), ("csv", "CSV"), ("json", "JSON"), ("i", "I"), ("i'm", "I'm"), ("i'd", "I'd"), ("api", "API"), ("ram", "RAM"), ("llm", "LLM"), ("ai", "AI"), ("hugging face", "Hugging Face"), ("vram", "VRAM"), ("pc", "PC"))  # fmt: skip
_PROPER = tuple((re.compile(rf"\b{re.escape(plain)}\b"), proper) for plain, proper in _NAMES)
_KEYS = dict(zip("qwertyuiopasdfghjklzxcvbnm", "wqrtyuioipsadfghjkxzcvbnm".ljust(26, "n"), strict=True))


def vary(text: str, rng: random.Random, amount: float = 1.0) -> str:
    """Dress a plain question up, or spoil it, as people do; `amount` scales how often."""
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
    return word[:at] + _KEYS.get(word[at], word[at]) + word[at + 1 :]


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
    return rng.choices(("?", "", ".", "!", "??", " ?", "..."), (60, 30, 2, 1, 2, 3, 1) if asks else (14, 46, 26, 8, 1, 1, 3))[0]


_ASKING = frozenset("how what what's which where who why when can could is are do does will would may should did has".split())
