"""One answer while it is being written: what came, what is saved, how long things took."""

from __future__ import annotations

import time

from app.core.conversation import AnswerStatistics
from app.engine.protocol import Generated
from app.viewmodels.chat_reasoning import split_reasoning


class Generation:
    """An answer on its way into a message.

    Attributes:
        id: of the Generate command. conversation, message: where the text goes.
        cancelled: the user asked to stop it.
    """

    def __init__(
        self,
        *,
        conversation: int,
        message: int,
        before: str,
        statistics: AnswerStatistics | None,
        base: AnswerStatistics,
    ) -> None:
        self.id = 0
        self.conversation = conversation
        self.message = message
        self.cancelled = False
        self._pieces = [before] if before else []
        self._unsaved: list[str] = []
        self._earlier = statistics  # of the part that is being continued
        self._base = base
        self._started = time.perf_counter()
        self._first = self._last = 0.0
        self._tokens = 0
        self._thinking_since = 0.0
        self.reasoning_seconds = statistics.reasoning_seconds if statistics else 0.0

    def begun(self) -> None:
        """The engine has it: loading the model, or waiting for it, is not part of the answer's time."""
        if not self._first:
            self._started = time.perf_counter()

    def take(self, text: str, count: int) -> None:
        """The next batch has come."""
        now = time.perf_counter()
        self._first = self._first or now
        self._last = now
        self._tokens += count
        self._pieces.append(text)
        self._unsaved.append(text)
        self._watch_reasoning(now)

    def _watch_reasoning(self, now: float) -> None:
        if self.reasoning_seconds and not self._thinking_since:
            return
        split = split_reasoning(self.text, streaming=True)
        if split.thinking:
            self._thinking_since = self._thinking_since or now
        elif self._thinking_since or (split.reasoning and not self.reasoning_seconds):
            self.reasoning_seconds += max(0.1, now - (self._thinking_since or self._started))
            self._thinking_since = 0.0

    @property
    def text(self) -> str:
        """All of the message so far."""
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    def take_unsaved(self) -> str:
        """What the store does not have yet; it is taken to have it from now on."""
        unsaved = "".join(self._unsaved)
        self._unsaved = []
        return unsaved

    def give_back(self, unsaved: str) -> None:
        """Saving failed: it is unsaved again."""
        self._unsaved.insert(0, unsaved)

    @property
    def unsaved(self) -> bool:
        return bool(self._unsaved)

    @property
    def received(self) -> bool:
        return bool(self._first)

    def statistics(self, result: Generated | None, finish_reason: str) -> AnswerStatistics:
        """What stands under the answer, from the engine's own count where there is one."""
        tokens = result.tokens if result else self._tokens
        seconds = result.seconds if result and result.seconds > 0 else self._last - self._first
        rate = (tokens - 1) / seconds if seconds > 0 and tokens > 1 else 0.0
        first = self._first - self._started if self._first else 0.0
        if self._thinking_since and self._last:
            self.reasoning_seconds += self._last - self._thinking_since
            self._thinking_since = 0.0
        earlier = self._earlier
        return AnswerStatistics(
            model=self._base.model,
            loader=self._base.loader,
            stack=self._base.stack,
            tokens=tokens + (earlier.tokens if earlier else 0),
            prompt_tokens=result.prompt_tokens if result else 0,
            reused_tokens=result.reused_tokens if result else 0,
            tokens_per_second=rate,
            seconds_to_first_token=earlier.seconds_to_first_token
            if earlier and earlier.seconds_to_first_token
            else first,
            finish_reason=finish_reason,
            dropped_messages=result.dropped_messages if result else 0,
            seed=result.seed if result else 0,
            reasoning_seconds=self.reasoning_seconds,
        )
