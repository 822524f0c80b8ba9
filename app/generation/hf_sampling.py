"""Choosing the next token from logits: transformers' own warpers where it has them, small ones of ours where it has none.

The order is llama.cpp's (penalties, DRY, top-k, typical, top-p, min-p, temperature last), so that one preset means
the same under every loader; transformers by itself would put the temperature first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch

from app.core.sampling import Sampling

if TYPE_CHECKING:
    from app.generation.hf_grammar import Constraint

DRY_BREAKERS = ("\n", ":", '"', "*")  # as llama.cpp: a repetition does not reach over these
LARGEST_PENALTY = 1e4  # logits; keeps base ** length finite


def dry_breaker_tokens(tokenizer: Any) -> frozenset[int]:
    """The tokens over which no repetition reaches. Encoded after a letter, as within a text."""
    found: set[int] = set()
    for text in DRY_BREAKERS:
        tokens = tokenizer.encode("a" + text, add_special_tokens=False)
        if tokens:
            found.add(tokens[-1])
    return frozenset(found)


class RepetitionLengths:
    """For every position of a growing sequence: how many tokens up to it equal the sequence's end.

    Updated in one vectorised step a token. `lengths[i]` is the length of the longest common suffix of
    `tokens[:i+1]` and all of `tokens`, broken off at breakers.
    """

    def __init__(self, breakers: Collection[int]) -> None:
        self._breakers = frozenset(breakers)
        self._tokens = torch.zeros(0, dtype=torch.long)
        self._lengths = torch.zeros(0, dtype=torch.int32)
        self.size = 0

    @property
    def tokens(self) -> torch.Tensor:
        return self._tokens[: self.size]

    @property
    def lengths(self) -> torch.Tensor:
        """int32, one for each position; the last one is the sequence with itself."""
        return self._lengths[: self.size]

    def append(self, token: int) -> None:
        if self.size == len(self._tokens):
            room = torch.zeros(max(256, self.size), dtype=torch.long)
            self._tokens = torch.cat((self._tokens, room))
            self._lengths = torch.cat((self._lengths, room.to(torch.int32)))
        self._tokens[self.size] = token
        self.size += 1
        if token in self._breakers:
            self.lengths.zero_()
            return
        before = torch.cat((torch.zeros(1, dtype=torch.int32), self.lengths[:-1]))
        self._lengths[: self.size] = torch.where(self.tokens == token, before + 1, torch.zeros_like(before))


def dry_penalties(history: RepetitionLengths, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """DRY (Don't Repeat Yourself, p-e-w 2024): tokens that would lengthen a repetition, and what to take off them.

    A token that would continue a repetition of n tokens loses multiplier * base ** (n - allowed_length), for the
    longest such n of at least allowed_length, among the last `dry_range` tokens.

    Returns:
        Token ids (int64, may repeat) and penalties (float32) of the same length; the largest of a token counts.
    """
    size = history.size
    start = 0 if sampling.dry_range < 0 else max(0, size - sampling.dry_range)
    if size - start < 2:
        return torch.zeros(0, dtype=torch.long), torch.zeros(0)
    # A repetition that would begin before the range is cut at its edge.
    edge = torch.arange(1, size - start, dtype=torch.int32)
    lengths = torch.minimum(history.lengths[start : size - 1], edge)
    found = torch.nonzero(lengths >= sampling.dry_allowed_length).flatten()
    excess = (lengths[found] - sampling.dry_allowed_length).to(torch.float32)
    # Clamped in the exponent: base ** length is not finite for long repetitions.
    top = (
        math.log(LARGEST_PENALTY / sampling.dry_multiplier) / math.log(sampling.dry_base)
        if sampling.dry_base > 1
        else 0.0
    )
    penalties = sampling.dry_multiplier * sampling.dry_base ** excess.clamp(max=max(0.0, top))
    return history.tokens[start + 1 :][found], penalties


class Sampler:
    """Chooses one token after another for one generation.

    Args:
        sampling: the parameters.
        seed: of the random generator; the same seed, model and prompt give the same tokens.
        prompt: tokens that penalties count as seen.
        breakers: see `dry_breaker_tokens`; called only when DRY is on.
        constraint: a grammar that the answer must follow.
    """

    def __init__(
        self,
        sampling: Sampling,
        seed: int,
        prompt: list[int],
        breakers: Callable[[], Collection[int]],
        constraint: Constraint | None = None,
    ) -> None:
        self._sampling = sampling
        self._generator = torch.Generator().manual_seed(seed)
        self._constraint = constraint
        self._penalised = sampling.penalty_range != 0 and (
            sampling.repetition_penalty != 1 or sampling.frequency_penalty != 0 or sampling.presence_penalty != 0
        )
        self._tokens = list(prompt)
        self._history: RepetitionLengths | None = None
        if sampling.dry_multiplier > 0 and sampling.dry_range != 0:
            self._history = RepetitionLengths(breakers())
            for token in prompt:
                self._history.append(token)

    def choose(self, logits: torch.Tensor) -> int:
        """The next token.

        Args:
            logits: [vocabulary], any float dtype, any device; not changed.
        """
        scores = logits.detach().to("cpu", torch.float32, copy=True)[None]
        if self._constraint is not None:
            self._constraint.mask(scores[0])
        if self._penalised:
            scores = self._penalise(scores)
        if self._history is not None:
            tokens, penalties = dry_penalties(self._history, self._sampling)
            taken = torch.zeros(scores.shape[-1]).scatter_reduce(0, tokens, penalties, "amax")
            scores = scores - taken
        if self._sampling.temperature == 0:
            return int(scores.argmax())
        return self._draw(scores)

    def accept(self, token: int) -> None:
        """Tell what was chosen, so that penalties and the grammar know."""
        self._tokens.append(token)
        if self._history is not None:
            self._history.append(token)
        if self._constraint is not None:
            self._constraint.accept(token)

    def _penalise(self, scores: torch.Tensor) -> torch.Tensor:
        from transformers import RepetitionPenaltyLogitsProcessor

        sampling = self._sampling
        seen = self._tokens if sampling.penalty_range < 0 else self._tokens[-sampling.penalty_range :]
        ids = torch.tensor(seen, dtype=torch.long)
        if sampling.repetition_penalty != 1 and len(seen):
            scores = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(ids[None], scores)
        if len(seen):
            unique, counts = ids.unique(return_counts=True)
            scores[0, unique] -= counts * sampling.frequency_penalty + sampling.presence_penalty
        return scores

    def _draw(self, scores: torch.Tensor) -> int:
        sampling = self._sampling
        indices: torch.Tensor | None = None
        if 0 < sampling.top_k < scores.shape[-1]:
            # What follows depends on the kept values only, so that it need not sort the whole vocabulary.
            scores, places = scores.topk(sampling.top_k, dim=-1)
            indices = places[0]
        for warper in self._warpers():
            scores = warper(None, scores)
        probabilities = torch.softmax(scores, dim=-1)
        choice = int(torch.multinomial(probabilities[0], 1, generator=self._generator))
        return choice if indices is None else int(indices[choice])

    def _warpers(self) -> list[Any]:
        from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopPLogitsWarper, TypicalLogitsWarper

        sampling = self._sampling
        warpers: list[Any] = []
        if 0 < sampling.typical_p < 1:
            warpers.append(TypicalLogitsWarper(sampling.typical_p))
        if sampling.top_p < 1:
            warpers.append(TopPLogitsWarper(max(sampling.top_p, 1e-6)))
        if sampling.min_p > 0:
            warpers.append(MinPLogitsWarper(sampling.min_p))
        if sampling.temperature != 1:
            warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
        return warpers
