"""Decoder: reads prompts and steps through answers, keeping the KV cache so that nothing is read twice."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from app.core.memory import prompt_chunk
from app.generation.prefix import common_prefix

LARGEST_CHUNK = 512  # tokens of a prompt read in one pass
SINGLE_PASS_COST = 8  # a pass over one token costs about as much as this many tokens of a long pass


class _CancelledError(Exception):
    """Cancel came in the middle of a pass."""


class Decoder:
    """One model's cache and forward passes.

    Args:
        model: a transformers causal language model.
        device: where input tokens go.
        slow_weights: weights are read from disk at each pass, so that few large passes are better.

    Attributes:
        forwarded: tokens sent through the model so far, over all generations.
        device: where input tokens go. chunk: tokens of a prompt that are read in one pass.
        takes_positions: the model can be told the positions of its input.
        croppable: whether the cache can go back to an earlier token. Recurrent states cannot; then a prompt is read
            again unless the old one is its beginning.
    """

    def __init__(self, model: Any, device: torch.device, slow_weights: bool = False) -> None:
        self._model: Any = model
        self.device = device
        whole = slow_weights or device.type != "cpu"
        packed = 0 if whole else sum(getattr(module, "packed_weights", 0) for module in model.modules())
        parameters = 0 if whole else packed + sum(p.numel() for p in model.parameters())
        self.chunk = LARGEST_CHUNK if whole else prompt_chunk(parameters, LARGEST_CHUNK)
        self._cache: DynamicCache | None = None
        self._tokens: list[int] = []  # what the cache holds
        names = inspect.signature(model.forward).parameters
        self._cache_name = "cache_params" if "cache_params" in names else "past_key_values"
        self._keep_last = "logits_to_keep" in names
        self.takes_positions = "position_ids" in names
        self._cancelled: Callable[[], bool] = lambda: False
        self._hooks = [layer.register_forward_pre_hook(self._look) for layer in _layers(model)]
        self.forwarded = 0
        self.croppable = True
        self.new_cache()  # tells whether it is

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
        if self.croppable:
            self._crop(shared)
        elif shared < len(self._tokens) or (len(tokens) - shared) * SINGLE_PASS_COST > len(tokens):
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
        self._cancelled = cancelled
        try:
            while len(self._tokens) < len(tokens):
                if cancelled():
                    return None
                at = len(self._tokens)
                size = self._chunk_at(at, len(tokens))
                logits = self._forward(tokens[at : at + size])[-1]
                progress(len(self._tokens), len(tokens))
        except _CancelledError:
            return None
        finally:
            self._cancelled = lambda: False
        return logits

    def step(self, token: int) -> torch.Tensor:
        """Logits [vocabulary] after one more token."""
        return self._forward([token])[-1]

    def rows(self, tokens: list[int]) -> torch.Tensor:
        """Logits [len(tokens), vocabulary] after each of some more tokens."""
        return self._forward(tokens, len(tokens))

    def close(self) -> None:
        """Let go of the model."""
        for hook in self._hooks:
            hook.remove()
        self.reset()
        self._model = None

    def _look(self, _module: Any, _inputs: Any) -> None:
        if self._cancelled():
            raise _CancelledError

    def _forward(self, tokens: list[int], rows: int = 1) -> torch.Tensor:
        if self._cache is None:
            self._cache = self.new_cache()
        held = len(self._tokens)
        try:
            logits = self._pass(torch.tensor([tokens], dtype=torch.long, device=self.device), self._cache, rows)
        except BaseException:
            self._undo(held)
            raise
        self._tokens += tokens
        self.forwarded += len(tokens)
        return logits[0]

    def _pass(self, ids: torch.Tensor, cache: DynamicCache, last: int, **more: torch.Tensor) -> torch.Tensor:
        """Logits [rows, last, vocabulary] of the last tokens; the cache takes them all in."""
        arguments: dict[str, Any] = {"logits_to_keep": last} if self._keep_last else {}
        arguments[self._cache_name] = cache
        with torch.inference_mode():
            output = self._model(input_ids=ids, use_cache=True, **arguments, **more)
        return output.logits[:, -last:]

    def watched_pass(
        self, ids: torch.Tensor, cache: DynamicCache, cancelled: Callable[[], bool], **more: torch.Tensor
    ) -> torch.Tensor | None:
        """A pass over several rows with a cache of their own, beside the one that is kept here.

        Args:
            ids: [rows, tokens]. cancelled: asked in each layer. more: attention mask, positions.

        Returns:
            Logits [rows, vocabulary] after the last tokens; None when cancelled: then the cache is good for nothing.
        """
        self._cancelled = cancelled
        try:
            return self._pass(ids, cache, 1, **more)[:, -1]
        except _CancelledError:
            return None
        finally:
            self._cancelled = lambda: False

    def _undo(self, held: int) -> None:
        """After a pass that broke off: some layers took its tokens, others did not."""
        if not self.croppable or self._cache is None:
            self.reset()
            return
        try:
            for layer in self._cache.layers:
                surplus = layer.get_seq_length() - held if isinstance(layer, DynamicLayer) else 0
                if surplus > 0:
                    layer.crop(-surplus)
        except (RuntimeError, AttributeError):
            self.reset()

    def _crop(self, size: int) -> None:
        surplus = len(self._tokens) - size
        if surplus > 0 and self._cache is not None:
            self._cache.crop(-surplus)
            del self._tokens[size:]

    def new_cache(self) -> DynamicCache:
        """An empty cache that fits the model."""
        cache = DynamicCache(config=self._model.config)
        # A sliding layer forgets what falls out of its window and cannot go back. Kept whole, its mask still hides what
        # is outside the window: the answers are the same, and the next turn need not read the history again.
        cache.layers = [DynamicLayer() if type(layer) is DynamicSlidingWindowLayer else layer for layer in cache.layers]
        self.croppable = all(layer.is_croppable for layer in cache.layers)
        return cache

    def _chunk_at(self, at: int, total: int) -> int:
        """How many tokens to read in the next pass."""
        if self._cache is None:
            self._cache = self.new_cache()
        if self.croppable:
            return self.chunk
        # Recurrent layers are sure to take a whole text at once, or one token more, but not several more.
        return total if at == 0 else 1


def _layers(model: Any) -> list[Any]:
    """The blocks of a model, which a pass goes through one after another."""
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    return list(max(lists, key=lambda found: sum(1 for _ in found.modules()), default=[]))
