"""Which tokens a perplexity window scores, and with which context: the same for every loader."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec


class ScoreWindow(msgspec.Struct, frozen=True):
    """Feed tokens[start:end-1]; their last `end - first` predictions score tokens[first:end]."""

    start: int
    first: int
    end: int


def score_windows(count: int, window: int, stride: int = 0) -> Iterator[ScoreWindow]:
    """Windows that score each of tokens 1 to count-1 exactly once, with at most window-1 tokens before it.

    Args:
        count: tokens of the text, the beginning-of-sequence token included. Token 0 has nothing before it: it is not scored.
        window: tokens that one window spans, at least 2.
        stride: tokens that each window after the first scores. The fewer, the more context each has and the longer it
            takes. 0, or more than window-1, is window-1: the least work.
    """
    step = min(stride or window - 1, window - 1)
    first = 1
    end = min(window, count)
    while first < count:
        yield ScoreWindow(max(0, end - window), first, end)
        first, end = end, min(end + step, count)
