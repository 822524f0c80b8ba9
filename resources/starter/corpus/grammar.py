"""Question templates: `[a|b|]` stands for one of its alternatives, `<name>` for one of a word list.

Alternatives nest and may be empty. Spaces are tidied afterwards, so templates can be written loosely.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping

Node = str | list["Node"] | tuple["Node", ...]
_TOKENS = re.compile(r"\[|\]|\||<\w+>|[^\[\]|<]+|<")


def parse(template: str) -> Node:
    """Turn a template into a tree: a list is a sequence, a tuple a choice, a string a literal or `<name>`."""
    tokens = _TOKENS.findall(template)
    sequence, position = _sequence(tokens, 0)
    if position != len(tokens):
        raise ValueError(f"unbalanced brackets in template: {template!r}")
    return sequence


def _sequence(tokens: list[str], position: int) -> tuple[list[Node], int]:
    parts: list[Node] = []
    while position < len(tokens) and tokens[position] not in "]|":
        if tokens[position] == "[":
            choice, position = _choice(tokens, position + 1)
            parts.append(choice)
        else:
            parts.append(tokens[position])
            position += 1
    return parts, position


def _choice(tokens: list[str], position: int) -> tuple[tuple[Node, ...], int]:
    options: list[Node] = []
    while True:
        option, position = _sequence(tokens, position)
        options.append(option)
        if position >= len(tokens):
            raise ValueError("a bracket is never closed")
        position += 1
        if tokens[position - 1] == "]":
            return tuple(options), position


def expand(node: Node, names: Mapping[str, Callable[[random.Random], str]], rng: random.Random) -> str:
    """Choose one text that the parsed template stands for, with its spaces tidied."""
    return re.sub(r"\s+", " ", choose(node, names, rng)).strip()


def choose(node: Node, names: Mapping[str, Callable[[random.Random], str]], rng: random.Random) -> str:
    """Choose one text that the parsed template stands for, spaces as they come."""
    if isinstance(node, tuple):
        return choose(rng.choice(node), names, rng)
    if isinstance(node, list):
        return "".join(choose(part, names, rng) for part in node)
    if node.startswith("<") and node.endswith(">"):
        return names[node[1:-1]](rng)
    return node
