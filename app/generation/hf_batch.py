"""Rows of a batch read and answered together: left padding, positions of their own, rows that leave when they end."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from app.core.library import ModelShape
from app.core.memory import kv_cache_bytes
from app.engine.protocol import Generated
from app.engine.reporting import Report
from app.generation.hf_answer import Answer
from app.generation.hf_decode import Decoder

LONG_ANSWER = 2048  # tokens
SHARE = 0.8  # of free memory
SMALLEST_CHUNK = 16  # positions of a prompt that are read in one pass


class Rows:
    """The KV cache of several prompts at once. Positions before a shorter prompt are hidden from all that follows.

    Args:
        decoder: its model and way of passing through it; its own cache is not touched.
        prompts: tokens of each row, none empty.
    """

    def __init__(self, decoder: Decoder, prompts: Sequence[Sequence[int]]) -> None:
        self._decoder = decoder
        self._length = max(len(prompt) for prompt in prompts)
        pads = [self._length - len(prompt) for prompt in prompts]
        self._pads = torch.tensor(pads, device=decoder.device)
        self._padded = any(pads)
        self._ids = torch.tensor(
            [[prompt[0]] * pad + list(prompt) for prompt, pad in zip(prompts, pads, strict=True)], device=decoder.device
        )
        self._cache = decoder.new_cache()
        self._held = 0

    def read(self, progress: Callable[[int, int], None], cancelled: Callable[[], bool]) -> torch.Tensor | None:
        """Logits [rows, vocabulary] after the prompts; None when cancelled."""
        chunk = max(SMALLEST_CHUNK, self._decoder.chunk // len(self._ids))
        logits: torch.Tensor | None = None
        while self._held < self._length:
            if cancelled():
                return None
            logits = self._pass(self._ids[:, self._held : self._held + chunk], cancelled)
            if logits is None:
                return None
            progress(self._held, self._length)
        return logits

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Logits [rows, vocabulary] after one more token for each row."""
        logits = self._pass(torch.tensor(tokens, device=self._decoder.device)[:, None], lambda: False)
        assert logits is not None
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        index = torch.tensor(rows, device=self._decoder.device)
        self._cache.batch_select_indices(index)
        self._pads = self._pads[index]

    def _pass(self, ids: torch.Tensor, cancelled: Callable[[], bool]) -> torch.Tensor | None:
        more: dict[str, torch.Tensor] = {}
        end = self._held + ids.shape[1]
        if self._padded:
            places = torch.arange(end, device=ids.device)[None]
            more["attention_mask"] = (places >= self._pads[:, None]).long()
            if self._decoder.takes_positions:
                more["position_ids"] = (places[:, self._held :] - self._pads[:, None]).clamp(min=0)
        logits = self._decoder.watched_pass(ids, self._cache, cancelled, **more)
        self._held = end
        return logits


def too_large(shape: ModelShape, answers: Sequence[Answer], element: int, free: int) -> str:
    """Why the rows' KV caches do not fit into memory together, in a sentence; "" when they do, or it is not known.

    Args:
        element: bytes of one number in the cache. free: bytes; 0 when unknown.
    """
    # An answer without a limit seldom fills the context: room is asked for a long one.
    longest = max(min(answer.longest, len(answer.asked.tokens) + LONG_ANSWER) for answer in answers)
    wanted = len(answers) * kv_cache_bytes(shape, longest, key_bytes=element, value_bytes=element)
    if not free or wanted <= free * SHARE:
        return ""
    return (
        f"Together the rows need {wanted / 1e9:.1f} GB for what they read, and {free / 1e9:.1f} GB are free: "
        "they were answered one after the other."
    )


def answer_together(
    decoder: Decoder, answers: Sequence[Answer], report: Report, select: Callable[[list[int]], None]
) -> list[Generated]:
    """Answer all rows, each until its own end.

    Args:
        answers: one a row, with its number in `row`.
        select: told the rows that go on, as numbers of the rows that went on before, when some have ended.

    Returns:
        A result for each, in their order.
    """
    started = time.perf_counter()
    rows = Rows(decoder, [answer.asked.tokens for answer in answers])
    logits = rows.read(
        lambda done, total: report.progress("Reading the prompts", done, total, "tokens"), lambda: report.cancelled
    )
    read = time.perf_counter() - started
    going = list(answers)
    while True:
        cancelled = report.cancelled or logits is None
        if cancelled:
            for answer in going:
                answer.end("cancelled")
            break
        assert logits is not None
        tokens = [answer.choose(row) if answer.open else -1 for answer, row in zip(going, logits, strict=True)]
        left = [number for number, token in enumerate(tokens) if token >= 0]
        if not left:
            break
        if len(left) < len(going):
            going = [going[number] for number in left]
            rows.keep(left)
            select(left)
        logits = rows.step([tokens[number] for number in left])
    return [answer.result(0, read) for answer in answers]
