"""Fit a conversation into a context: the oldest turns go, the system prompt and the last question stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from app.core.conversation import Message
from app.core.errors import ErrorKind, WeftError


def fit_messages(
    messages: Sequence[Message], tokenize: Callable[[Sequence[Message]], list[int]], limit: int
) -> tuple[list[int], int]:
    """Tokens of the conversation, without as many of the oldest turns as must go.

    Whole turns go (a question with its answers), so that the roles still alternate. System messages never
    go, nor anything from the last user message on.

    Args:
        tokenize: renders and tokenizes a conversation. Called O(log n) times.
        limit: the most tokens that the prompt may have.

    Returns:
        The tokens, and how many messages were left out.

    Raises:
        WeftError: BAD_INPUT when the system prompt and the last user message alone are too long.
    """
    tokens = tokenize(messages)
    if len(tokens) <= limit:
        return tokens, 0
    cuts = _cuts(messages)
    best: tuple[list[int], int] | None = None
    shortest = len(tokens)
    low, high = 0, len(cuts) - 1
    while low <= high:
        middle = (low + high) // 2
        kept = [m for i, m in enumerate(messages) if m.role == "system" or i >= cuts[middle]]
        tokens = tokenize(kept)
        shortest = min(shortest, len(tokens))
        if len(tokens) <= limit:
            best = tokens, len(messages) - len(kept)
            high = middle - 1
        else:
            low = middle + 1
    if best is None:
        raise WeftError(
            ErrorKind.BAD_INPUT,
            f"The last message is too long: with the system prompt it takes {shortest} tokens, "
            f"and {max(limit, 0)} fit beside the answer.",
            "Shorten the message or the system prompt, or load the model with a larger context length.",
        )
    return best


def fit_text(tokens: list[int], limit: int) -> list[int]:
    """Check that a raw prompt fits.

    Raises:
        WeftError: BAD_INPUT when it does not; a raw text has no turns that could be left out.
    """
    if len(tokens) > limit:
        raise WeftError(
            ErrorKind.BAD_INPUT,
            f"The prompt is too long: it takes {len(tokens)} tokens, and {max(limit, 0)} fit beside the answer.",
            "Shorten the prompt, or load the model with a larger context length.",
        )
    return tokens


def _cuts(messages: Sequence[Message]) -> list[int]:
    """Where a shortened conversation may begin: at each user message after the first turn, the last one at most."""
    users = [i for i, message in enumerate(messages) if message.role == "user"]
    if not users:
        return []
    first = next(i for i, message in enumerate(messages) if message.role != "system")
    return [i for i in users if i > first]
