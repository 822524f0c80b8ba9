"""Draw questions and conversations about Weft, and about everything else, from the files in this folder."""

from __future__ import annotations

import json
import random
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import grammar, noise

HERE = Path(__file__).parent
OTHER = "other"
_HABITS = tomllib.loads((HERE / "habits.toml").read_text(encoding="utf-8"))
_SMALL = frozenset(_HABITS["small"].split())
_SMALL_TALK = frozenset(("hello", "thanks", "goodbye"))


@dataclass(frozen=True)
class Topic:
    """One thing that the starter model can answer: its answers, how to recognise one, and how it is asked."""

    id: str
    answer: str
    voice: str
    keywords: tuple[tuple[str, ...], ...]
    templates: tuple[grammar.Node, ...]

    def is_answered_by(self, text: str) -> bool:
        """Say whether a text holds, of every group of keywords, at least one."""
        lowered = text.lower()
        return all(any(word.lower() in lowered for word in group) for group in self.keywords)


def normalised(question: str) -> str:
    """Reduce a question to its words, so that casing, spacing and punctuation do not count."""
    return " ".join(re.findall(r"[a-z0-9äöüß]+", question.lower().replace("'", "")))


def content(question: str) -> frozenset[str]:
    """Reduce a question to its set of telling words: two with the same set ask the same in the same words."""
    return frozenset(normalised(question).split()) - _SMALL


def read_questions(name: str) -> list[tuple[str, str]]:
    """Read (topic, question) pairs of one of the two sets that are kept out of training: `held_out` or `dev`."""
    lines = (HERE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [(row["topic"], row["question"]) for row in map(json.loads, lines)]


class Corpus:
    """Everything that the starter model is taught, drawn at random from templates."""

    def __init__(self) -> None:
        """Read the templates and word lists, and the questions that must never be drawn."""
        more = tomllib.loads((HERE / "phrases.toml").read_text(encoding="utf-8"))
        files = sorted((HERE / "topics").glob("*.toml"))
        self.topics = {topic.id: topic for file in files for topic in _topics(file, more)}
        other = tomllib.loads((HERE / "other.toml").read_text(encoding="utf-8"))
        self.topics[OTHER] = _topic(
            {"id": OTHER} | {key: other[key] for key in ("answer", "voice", "keywords", "questions")}
        )
        self._words = {name: text.split("|") for name, text in other["words"].items()}
        self._names: dict[str, Callable[[random.Random], str]] = {
            name: _one_of(words) for name, words in self._words.items()
        }
        self._names |= {"nouns": self._nouns, "num": _number, "gibberish": _gibberish}
        for name, template in tomllib.loads((HERE / "macros.toml").read_text(encoding="utf-8")).items():
            self._names[name] = _macro(grammar.parse(template), self._names)
        self.openers: list[str] = _HABITS["openers"]
        swap = other["weft_words"]
        self._replaceable = re.compile(rf"\b({swap['replace']})\b")
        self._strong = re.compile(rf"\b({swap['strong']})")
        self._about = [topic for topic in self.topics.values() if topic.id != OTHER]
        held_out = read_questions("held_out")
        self._kept_out = {content(text) for _, text in held_out}
        self._kept_out_text = {normalised(text) for _, text in held_out + read_questions("dev")}

    def question(self, rng: random.Random, other: float = 0.33, noisy: float = 1.0) -> tuple[Topic, str]:
        """Draw a question and its topic; `other` is the share of questions that are not about Weft."""
        while True:
            topic = self.topics[OTHER] if rng.random() < other else rng.choice(self._about)
            plain = self._disguised(rng) if topic.id == OTHER and rng.random() < 0.3 else self._plain(topic, rng)
            text = noise.vary(plain, rng, noisy)
            if topic.id not in _SMALL_TALK and rng.random() < 0.12 * noisy:
                text = self._with_another(topic, text, rng)
            if plain and not any(map(self._is_kept_out, (plain, text))):
                return topic, text

    def _is_kept_out(self, text: str) -> bool:
        return content(text) in self._kept_out or normalised(text) in self._kept_out_text

    def _with_another(self, topic: Topic, text: str, rng: random.Random) -> str:
        """Put a second sentence beside a question: on the same topic, or one that says nothing of Weft."""
        second = rng.choice(_HABITS["asides"]) if rng.random() < 0.5 else noise.vary(self._plain(topic, rng), rng)
        first, last = (text, second) if rng.random() < 0.3 else (second, text)
        return f"{first}{'' if first[-1:] in '?.!' else rng.choice(('.', ',', '.', ' -', '!'))} {last}"

    def conversation(
        self, rng: random.Random, turns: int, other: float = 0.33
    ) -> tuple[str | None, list[tuple[Topic, str]]]:
        """Draw a system prompt (or none) and that many questions."""
        system = rng.choice(_HABITS["system"]) if rng.random() < 0.25 else None
        return system, [self.question(rng, other) for _ in range(turns)]

    def _plain(self, topic: Topic, rng: random.Random) -> str:
        return grammar.expand(rng.choice(topic.templates), self._names, rng)

    def _disguised(self, rng: random.Random) -> str:
        """Draw a question of a topic with everything of Weft in it replaced: it reads alike, and is not about Weft."""
        while True:
            text, count = self._replaceable.subn(self._swap(rng), self._plain(rng.choice(self._about), rng))
            if count and not self._strong.search(text) and len(text.split()) > 3:
                return text

    def _swap(self, rng: random.Random) -> Callable[[re.Match[str]], str]:
        singular = _gibberish(rng) if rng.random() < 0.25 else rng.choice(self._words["noun"])
        return lambda match: _plural(singular) if match[0].endswith("s") else singular

    def _nouns(self, rng: random.Random) -> str:
        return _plural(rng.choice(self._words["noun"]))


def _topics(file: Path, more: dict[str, str]) -> list[Topic]:
    return [_topic(table, more[table["id"]]) for table in tomllib.loads(file.read_text(encoding="utf-8"))["topic"]]


def _topic(table: dict, more: str = "") -> Topic:
    lines = [line.strip() for line in (table["questions"] + more).splitlines() if line.strip()]
    keywords = tuple(tuple(group) for group in table["keywords"])
    return Topic(table["id"], table["answer"], table["voice"], keywords, tuple(grammar.parse(line) for line in lines))


def _macro(node: grammar.Node, names: dict[str, Callable[[random.Random], str]]) -> Callable[[random.Random], str]:
    return lambda rng: grammar.choose(node, names, rng)


def _one_of(words: list[str]) -> Callable[[random.Random], str]:
    return lambda rng: rng.choice(words)


def _plural(noun: str) -> str:
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + ("" if noun.endswith("s") else "es")
    return noun[:-1] + "ies" if noun.endswith("y") and noun[-2:-1] not in "aeou" else noun + "s"


def _number(rng: random.Random) -> str:
    return str(rng.randrange(rng.choice((10, 100, 1000, 100000))))


def _gibberish(rng: random.Random) -> str:
    if rng.random() < 0.2:
        return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randrange(3, 10)))
    syllables, onsets = rng.randrange(2, 4), _HABITS["onsets"].split()
    return "".join(
        rng.choice(onsets) + rng.choice("aeiou") + rng.choice(("", "", "n", "r", "l", "s", "x", "k", "t", "m"))
        for _ in range(syllables)
    )
