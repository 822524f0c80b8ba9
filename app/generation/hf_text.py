"""TokenText: tokens become text one at a time, for any transformers tokenizer, at constant cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CONTEXT = 8  # tokens of the prompt that are decoded along with the first new one
LONGEST = 24  # tokens that may wait for the rest of a character before they are shown as they are
BROKEN = "\ufffd"


class TokenText:
    """Decodes a growing sequence of tokens without ever decoding all of it again.

    What a token shows as depends on its neighbours: byte tokens join into characters, SentencePiece drops the blank at
    the beginning of a text. So new tokens are decoded together with those shown last, and what those alone decode to is
    taken off. The cut always lies between whole characters: text that ends in U+FFFD waits for the rest.

    Args:
        tokenizer: a transformers tokenizer.
        prompt: the tokens before; their end is what the first new token joins on to.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = []
        self._new: list[int] = []
        self._shown = ""
        for size in range(min(CONTEXT, len(prompt)), 0, -1):
            before = list(prompt[-size:])
            shown = self._decode(before)
            if BROKEN not in shown:  # otherwise it begins or ends within a character
                self._before, self._shown = before, shown
                break

    def feed(self, token: int) -> str:
        """The text that this token makes certain; "" while a character is unfinished."""
        self._new.append(token)
        text = self._decode(self._before + self._new)
        if text.endswith(BROKEN) and len(self._new) < LONGEST:
            return ""
        return self._take(text)

    def flush(self) -> str:
        """What still waits, at the end."""
        return self._take(self._decode(self._before + self._new)) if self._new else ""

    def _take(self, text: str) -> str:
        alone = self._decode(self._new)
        # Bytes that are no character can spoil how their neighbours decode; then they are shown by themselves.
        new = text[len(self._shown) :] if text.startswith(self._shown) else alone
        self._before, self._new, self._shown = self._new, [], alone
        return new

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
