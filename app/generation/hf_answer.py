"""One answer as it grows: from logits to tokens to text, until something ends it. Single answers and rows of a batch alike."""

from __future__ import annotations

import time
from typing import Any, NamedTuple, Protocol

import torch

from app.engine.protocol import FinishReason, Generate, Generated
from app.generation.hf_prompt import Prompts
from app.generation.hf_sampling import Sampler
from app.generation.hf_text import TokenText
from app.generation.stop import StopScanner


class Say(Protocol):
    """Where text goes: a report's `tokens`."""

    def __call__(self, text: str, count: int, row: int = 0) -> None: ...


class Asked(NamedTuple):
    """A request made ready: its prompt as text and tokens, what was left out of it, and the seed to draw with."""

    request: Generate
    prompt: str
    tokens: list[int]
    dropped: int
    seed: int


class Answer:
    """One answer.

    Args:
        context: tokens that prompt and answer share.
        constraint: a grammar that it must follow, or None.
        say: where its text goes, with `row`.

    Attributes:
        open: it goes on; `choose` may be called.
        reason: why it ended. count: its tokens.
    """

    def __init__(self, asked: Asked, prompts: Prompts, context: int, constraint: Any, say: Say, row: int = 0) -> None:
        sampling = asked.request.sampling
        self.asked, self.row = asked, row
        self._prompts, self._constraint, self._say = prompts, constraint, say
        self._sampler = Sampler(sampling, asked.seed, asked.tokens, prompts.dry_breakers, constraint)
        self._text = TokenText(prompts.tokenizer, asked.tokens)
        self._scanner = StopScanner((*sampling.stop_strings(), *prompts.plain_ends(asked.request)))
        room = context - len(asked.tokens)
        self._budget = room if sampling.max_tokens is None else min(room, sampling.max_tokens)
        self._unsaid = 0
        self._tokens: list[int] = []
        self._said: list[str] = []
        self._first = self._last = 0.0
        self.open = self._budget > 0
        self.reason: FinishReason = "length"

    @property
    def count(self) -> int:
        return len(self._tokens)

    @property
    def longest(self) -> int:
        """Tokens of prompt and answer when nothing ends it early."""
        return len(self.asked.tokens) + max(0, self._budget)

    def choose(self, logits: torch.Tensor) -> int:
        """The next token, or -1 when the answer ends here. Logits [vocabulary] are not changed."""
        token = self._sampler.choose(logits)
        self._first = self._first or time.perf_counter()
        if token in self._prompts.ends:
            return self.end("stop")
        self._sampler.accept(token)
        self._tokens.append(token)
        self._unsaid += 1
        shown, stopped = self._scanner.feed(self._text.feed(token))
        if shown:
            self._tell(shown)
        if stopped or (self._constraint is not None and self._constraint.finished):
            return self.end("stop")
        return token if self.count < self._budget else self.end("length")

    def end(self, reason: FinishReason) -> int:
        """Say what was held back, and be over. Returns -1."""
        self.open, self.reason = False, reason
        self._last = time.perf_counter()
        rest = ""
        if not self._scanner.matched:
            rest, _ = self._scanner.feed(self._text.flush())
            rest += self._scanner.flush()
        if rest or self._unsaid:
            self._tell(rest)
        return -1

    def said(self) -> tuple[str, list[int]]:
        """Prompt and answer as text and tokens, where the text is all that the tokens are; else nothing.

        Only then can what was said be found again in the next prompt.
        """
        if self._scanner.matched or not set(self._tokens).isdisjoint(self._prompts.tokenizer.all_special_ids):
            return "", []
        return self.asked.prompt + "".join(self._said), self.asked.tokens + self._tokens

    def result(self, reused: int, prompt_seconds: float) -> Generated:
        return Generated(
            finish_reason=self.reason,
            tokens=self.count,
            prompt_tokens=len(self.asked.tokens),
            reused_tokens=reused,
            prompt_seconds=prompt_seconds,
            seconds=max(0.0, self._last - self._first) if self._first else 0.0,
            dropped_messages=self.asked.dropped,
            seed=self.asked.seed,
        )

    def _tell(self, text: str) -> None:
        self._said.append(text)
        self._say(text, self._unsaid, self.row)
        self._unsaid = 0
