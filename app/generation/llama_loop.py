"""The decode loop of llama.cpp: sample, hand the text on, decode; as lean as Python allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from app.engine.protocol import FinishReason
from app.generation.llama_context import LlamaContext
from app.generation.llama_model import LlamaModel
from app.generation.llama_sampler import Sampler
from app.generation.stop import StopScanner
from app.generation.utf8 import Utf8Stream


class Loop:
    """One answer.

    Args:
        most: tokens to generate at most, at least 1.
        strip: drop the space that SentencePiece puts before the first word.

    Attributes:
        tokens: those generated, the last of which may not have been decoded. count: how many.
        text: what they spell, the stop string included. stripped: the space that was dropped before it, or "".
    """

    def __init__(
        self,
        model: LlamaModel,
        context: LlamaContext,
        sampler: Sampler,
        *,
        stop: tuple[str, ...],
        most: int,
        strip: bool,
    ) -> None:
        self._model, self._context, self._sampler = model, context, sampler
        self._scanner = StopScanner(stop) if stop else None
        self._most = most
        self._strip = strip
        self._parts: list[str] = []
        self.stripped = ""
        self.tokens: list[int] = []

    @property
    def count(self) -> int:
        return len(self.tokens)

    @property
    def text(self) -> str:
        return "".join(self._parts)

    def run(self, hand_on: Callable[[str, int], Any]) -> FinishReason:
        """Generate until something ends it. The logits of the prompt's last token must be there.

        Args:
            hand_on: takes text and the number of tokens that it came from, for every token.
        """
        stream = Utf8Stream()
        reason = self._run(stream, hand_on)
        rest = stream.flush()
        self._parts.append(rest)
        if self._scanner is not None and reason != "stop_string":
            fed, _ = self._scanner.feed(rest)
            rest = fed + self._scanner.flush()
        if rest and reason != "stop_string":
            hand_on(rest, 0)
        return "stop" if reason == "stop_string" else reason

    def _run(self, stream: Utf8Stream, hand_on: Callable[[str, int], Any]) -> Any:
        context, sampler, scanner = self._context, self._sampler, self._scanner
        pointer, piece_of, is_end = context.pointer, self._model.piece, self._model.eog
        sample, step, feed, keep = sampler.sample, context.step, stream.feed, self._parts.append
        aborted, most, tokens = context.abort, self._most, self.tokens
        while True:
            token = sample(pointer)
            if token < 0 or is_end(token):
                return "stop"
            if self._strip:
                self._strip = False
                piece, whole = piece_of(token, 1), piece_of(token)
                self.stripped = " " if len(whole) > len(piece) else ""
            else:
                piece = piece_of(token)
            text = feed(piece)
            keep(text)
            tokens.append(token)
            if scanner is not None:
                text, stopped = scanner.feed(text)
                if stopped:
                    hand_on(text, 1)
                    return "stop_string"
            hand_on(text, 1)
            if len(tokens) >= most:
                return "length"
            if aborted.is_set or not step(token):
                return "cancelled"
