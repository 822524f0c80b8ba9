"""TokenText: tokens become text one at a time, for any transformers tokenizer, at constant cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CONTEXT = 8  # tokens before the new ones that are decoded along with them
LONGEST = 24  # tokens that may wait for the rest of a character before they are shown as they are


class TokenText:
    """Decodes a growing sequence of tokens without ever decoding all of it again.

    What a token shows as depends on its neighbours: byte tokens join into characters, SentencePiece drops the blank at
    the beginning of a text. So the new tokens are decoded together with a few before them, and what those few alone
    decode to is taken off. Text that ends in U+FFFD waits for the rest of the character.

    Args:
        tokenizer: a transformers tokenizer.
        prompt: the tokens before; their end is what the first new token joins on to.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(prompt[-CONTEXT:])
        self._read = len(self._tokens)  # tokens whose text is out
        self._shown = self._decode(self._tokens)

    def feed(self, token: int) -> str:
        """The text that this token makes certain; "" while a character is unfinished."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        waiting = len(self._tokens) - self._read
        if text.endswith("\ufffd") and waiting < LONGEST:
            return ""
        return self._take(text)

    def flush(self) -> str:
        """What still waits, at the end."""
        return self._take(self._decode(self._tokens)) if len(self._tokens) > self._read else ""

    def _take(self, text: str) -> str:
        new = text[len(self._shown) :]
        self._tokens = self._tokens[-CONTEXT:]
        self._read = len(self._tokens)
        self._shown = self._decode(self._tokens)
        return new

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
