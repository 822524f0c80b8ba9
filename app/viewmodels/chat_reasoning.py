"""Tell a model's thinking from its answer, in a whole text or one that is still streaming."""

from __future__ import annotations

import re

import msgspec

# How reasoning models mark their thinking: opening, closing.
MARKS: tuple[tuple[str, str], ...] = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
    ("<|channel>thought", "<channel|>"),
)
_OPENINGS = tuple(opening for opening, _ in MARKS)
# Some templates open the thinking in the prompt, so that the answer holds the closing mark alone.
_ORPHANS = ("</think>", "</thinking>", "[/THINK]", "</seed:think>", "◁/think▷")
_NOISE = re.compile(
    r"^\s*(?:<\|start\|>assistant)?(?:<\|begin_of_solution\|>|<\|START_RESPONSE\|>|<\|channel\|>final<\|message\|>)\s*"
)
_TRAILING_NOISE = re.compile(
    r"(?:<\|end\|>(?:<\|start\|>assistant)?|<\|return\|>|<\|end_of_solution\|>|<\|END_RESPONSE\|>)\s*$"
)


class Split(msgspec.Struct, frozen=True, kw_only=True):
    """Reasoning and answer. `thinking`: the reasoning is not closed yet."""

    reasoning: str = ""
    answer: str = ""
    thinking: bool = False


def split_reasoning(text: str, *, streaming: bool = False) -> Split:
    """Cut a message into what the model thought and what it says.

    Args:
        streaming: more text may come; an incomplete mark at the end is then held back.
    """
    reasoning: list[str] = []
    rest = text
    while True:
        body = rest.lstrip()
        mark = next((mark for mark in MARKS if body.startswith(mark[0])), None)
        if mark is None:
            break
        inner, found, after = body[len(mark[0]) :].partition(mark[1])
        reasoning.append(_TRAILING_NOISE.sub("", inner).strip("\n"))
        if not found:
            kept = _without_partial(reasoning[-1], (mark[1],)) if streaming else reasoning[-1]
            return Split(reasoning="\n\n".join([*reasoning[:-1], kept]), thinking=True)
        rest = after
    if not reasoning:
        if streaming and (body := rest.lstrip()) and len(body) < 40 and any(o.startswith(body) for o in _OPENINGS):
            return Split()
        orphan = _orphan(rest)
        if orphan is not None:
            reasoning.append(orphan[0].strip("\n"))
            rest = orphan[1]
    if reasoning:
        rest = rest.lstrip("\n ")
    rest = _TRAILING_NOISE.sub("", _NOISE.sub("", rest))
    return Split(reasoning="\n\n".join(part for part in reasoning if part.strip()), answer=rest)


def _orphan(text: str) -> tuple[str, str] | None:
    for closing in _ORPHANS:
        if (at := text.find(closing)) >= 0:
            before = text[:at]
            # A text that merely speaks of the mark has it in code.
            if before.count("```") % 2 == 0 and not before.endswith("`"):
                return before, text[at + len(closing) :]
    return None


def _without_partial(text: str, marks: tuple[str, ...]) -> str:
    """Without the beginning of a mark at the end."""
    for mark in marks:
        for length in range(min(len(mark) - 1, len(text)), 0, -1):
            if text.endswith(mark[:length]):
                return text[:-length]
    return text


def without_reasoning(text: str) -> str:
    """What an engine is told of an earlier answer: models are not shown their old thoughts."""
    return split_reasoning(text).answer
