"""Decoder: reads prompts and steps through answers, keeping the KV cache so that nothing is read twice."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from app.generation.prefix import common_prefix

FIRST_CHUNK = 128  # tokens of a prompt read in one pass, to begin with
SMALLEST_CHUNK = 16
LARGEST_CHUNK = 512
QUICK, SLOW = 0.04, 0.15  # seconds a pass should take: long enough to be efficient, short enough for Cancel


class Decoder:
    """One model's cache and forward passes.

    Args:
        model: a transformers causal language model.
        device: where input tokens go.
        slow_weights: weights are read from disk at each pass, so that few large passes are better.

    Attributes:
        forwarded: tokens sent through the model so far, over all generations.
        croppable: whether the cache can go back to an earlier token (recurrent states cannot).
    """

    def __init__(self, model: Any, device: torch.device, slow_weights: bool = False) -> None:
        self._model = model
        self._device = device
        self._chunk = LARGEST_CHUNK if slow_weights else FIRST_CHUNK
        self._adapt = not slow_weights
        self._cache: DynamicCache | None = None
        self._tokens: list[int] = []  # what the cache holds
        self._keep_last = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.forwarded = 0
        self.croppable = True

    @property
    def cached(self) -> list[int]:
        """The tokens that the cache holds."""
        return list(self._tokens)

    def reset(self) -> None:
        """Forget everything that was read (the model's weights changed, or a pass failed half-way)."""
        self._cache, self._tokens = None, []

    def begin(self, tokens: list[int]) -> int:
        """Prepare for a prompt: keep what the cache shares with it, drop the rest.

        Returns:
            How many of the tokens need not be read again. Always less than all: the last one's logits are wanted.
        """
        shared = min(common_prefix(self._tokens, tokens), len(tokens) - 1)
        surplus = len(self._tokens) - shared
        if surplus and self._cache is not None:
            if self._can_crop():
                self._cache.crop(-surplus)
                del self._tokens[shared:]
            else:
                self.reset()
        return len(self._tokens)

    def read(
        self, tokens: list[int], progress: Callable[[int, int], None], cancelled: Callable[[], bool]
    ) -> torch.Tensor | None:
        """Read the rest of a prompt after `begin`, in chunks.

        Args:
            progress: told how many of all tokens are read.

        Returns:
            Logits [vocabulary] after the last token; None when cancelled (what was read stays in the cache).
        """
        logits: torch.Tensor | None = None
        while len(self._tokens) < len(tokens):
            if cancelled():
                return None
            at = len(self._tokens)
            start = time.perf_counter()
            logits = self._forward(tokens[at : at + self._chunk])
            self._tune(time.perf_counter() - start, len(self._tokens) - at)
            progress(len(self._tokens), len(tokens))
        return logits

    def step(self, token: int) -> torch.Tensor:
        """Logits [vocabulary] after one more token."""
        return self._forward([token])

    def _forward(self, tokens: list[int]) -> torch.Tensor:
        if self._cache is None:
            self._cache = self._new_cache()
        arguments: dict[str, Any] = {"logits_to_keep": 1} if self._keep_last else {}
        try:
            with torch.inference_mode():
                output = self._model(
                    input_ids=torch.tensor([tokens], dtype=torch.long, device=self._device),
                    past_key_values=self._cache,
                    use_cache=True,
                    **arguments,
                )
        except BaseException:
            self.reset()  # some layers may have taken the tokens, others not
            raise
        self._tokens += tokens
        self.forwarded += len(tokens)
        return output.logits[0, -1]

    def _new_cache(self) -> DynamicCache:
        cache = DynamicCache(config=self._model.config)
        # A sliding layer forgets what falls out of its window and cannot go back. Kept whole, its mask still hides what
        # is outside the window: the answers are the same, and the next turn need not read the history again.
        cache.layers = [DynamicLayer() if type(layer) is DynamicSlidingWindowLayer else layer for layer in cache.layers]
        self.croppable = all(type(layer) is DynamicLayer or layer.is_croppable for layer in cache.layers)
        return cache

    def _can_crop(self) -> bool:
        assert self._cache is not None
        return all(type(layer) is not DynamicSlidingWindowLayer and layer.is_croppable for layer in self._cache.layers)

    def _tune(self, seconds: float, size: int) -> None:
        if not self._adapt or size < self._chunk:
            return
        if seconds > SLOW:
            self._chunk = max(SMALLEST_CHUNK, self._chunk // 2)
        elif seconds < QUICK:
            self._chunk = min(LARGEST_CHUNK, self._chunk * 2)
