"""Where two answers differ, word by word."""

from __future__ import annotations

import difflib
import re

LONGEST = 4_000  # words that are compared; the rest counts as the same
_WORDS = re.compile(r"\s+|\w+|[^\w\s]")


def differences(text: str, other: str) -> list[tuple[int, int]]:
    """Ranges (first, end) of `text`, in characters, that `other` has not, in order.

    Compares words and marks; blanks alone are no difference.
    """
    ours, theirs = _WORDS.findall(text)[:LONGEST], _WORDS.findall(other)[:LONGEST]
    places = [0]
    for word in ours:
        places.append(places[-1] + len(word))
    found: list[tuple[int, int]] = []
    matcher = difflib.SequenceMatcher(None, ours, theirs, autojunk=False)
    for kind, first, end, _, _ in matcher.get_opcodes():
        if kind in ("replace", "delete") and not "".join(ours[first:end]).isspace():
            found.append((places[first], places[end]))
    return found
