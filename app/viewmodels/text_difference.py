"""Where two answers differ, word by word."""

from __future__ import annotations

import difflib
import re
from functools import lru_cache

LONGEST = 2_000  # words that are compared; the rest counts as the same
_CAREFUL = 600  # words; in longer texts the most frequent ones are no anchors, which would take seconds
_WORDS = re.compile(r"\w+|[^\w\s]")


@lru_cache(maxsize=16)
def differences(text: str, other: str) -> tuple[tuple[int, int], ...]:
    """Ranges (first, end) of `text`, in characters, that `other` has not, in order.

    Compares words and marks; blanks alone are no difference. Kept, since a page asks again whenever it is drawn anew.
    """
    ours, theirs = list(_WORDS.finditer(text))[:LONGEST], _WORDS.findall(other)[:LONGEST]
    words = [word.group() for word in ours]
    matcher = difflib.SequenceMatcher(None, words, theirs, autojunk=max(len(words), len(theirs)) > _CAREFUL)
    return tuple(
        (ours[first].start(), ours[end - 1].end())
        for kind, first, end, _, _ in matcher.get_opcodes()
        if kind in ("replace", "delete")
    )
