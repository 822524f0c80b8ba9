"""Constraint: an answer that must follow a GBNF grammar or a JSON schema, through llguidance."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch

from app.core.errors import ErrorKind, WeftError
from app.core.sampling import Sampling


class Constraint:
    """Masks the tokens that a grammar does not allow next.

    Args:
        tokenizer: llguidance's view of the tokenizer, from `make_tokenizer` (costly; kept with the model).

    Raises:
        WeftError: BAD_INPUT when the grammar or the schema is not one.
    """

    def __init__(self, tokenizer: Any, sampling: Sampling) -> None:
        from llguidance import LLMatcher

        self._ends = {int(tokenizer.eos_token), *tokenizer.eos_tokens}
        self._matcher = LLMatcher(tokenizer, _grammar(sampling), log_level=0)
        self._check()
        self._stopped = False
        if not self._takes_text():
            raise WeftError(
                ErrorKind.BAD_INPUT,
                "The grammar allows no text at all, so every answer would be empty.",
                'Give its root something to say, such as: root ::= "yes" | "no"',
            )

    def _takes_text(self) -> bool:
        """Whether any token but an end may come first."""
        if self._matcher.is_stopped():
            return False
        allowed = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        self._check()
        return bool(allowed.sum() > allowed[list(self._ends)].sum())

    @property
    def finished(self) -> bool:
        """Whether the grammar allows nothing more."""
        return self._stopped or self._matcher.is_stopped()

    def mask(self, scores: torch.Tensor) -> None:
        """Set what is not allowed to -inf, in place. `scores`: [vocabulary], float32, CPU."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        allowed = torch.from_numpy(np.unpackbits(bits, bitorder="little")[: scores.shape[-1]].astype(bool))
        scores[: len(allowed)].masked_fill_(~allowed, float("-inf"))
        scores[len(allowed) :] = float("-inf")  # padding of the embedding beyond the vocabulary

    def accept(self, token: int) -> None:
        """Tell what was chosen."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            text = self._matcher.get_error().strip()
            raise WeftError(
                ErrorKind.BAD_INPUT,
                f"The grammar or schema cannot be followed: {text[:500]}",
                "Correct it, or leave the field empty.",
            )


def make_tokenizer(tokenizer: Any, vocabulary: int, ends: list[int]) -> Any:
    """llguidance's view of a transformers tokenizer.

    Args:
        vocabulary: the width of the model's logits.
        ends: tokens that end an answer.

    Raises:
        WeftError: UNSUPPORTED when the tokenizer is not a fast one, which llguidance needs.
    """
    from llguidance.hf import from_tokenizer

    try:
        return from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=ends or None)
    except (ValueError, AttributeError) as error:
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            f"This model's tokenizer cannot be used with a grammar or a schema: {error}",
            "Leave the fields Grammar and JSON schema empty, or use the model as GGUF.",
        ) from error


def _grammar(sampling: Sampling) -> str:
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    if sampling.grammar.strip() and sampling.json_schema.strip():
        raise WeftError(
            ErrorKind.BAD_INPUT, "A grammar and a JSON schema are both given.", "Leave one of the two empty."
        )
    if sampling.json_schema.strip():
        try:
            schema = json.loads(sampling.json_schema)
            return LLMatcher.grammar_from_json_schema(schema)
        except (ValueError, RecursionError, TypeError) as error:
            raise WeftError(
                ErrorKind.BAD_INPUT,
                f"The JSON schema is not valid: {error}",
                'It must be a JSON object such as {"type": "object"}.',
            ) from error
    try:
        return LLMatcher.grammar_from_lark(any_to_lark(sampling.grammar))
    except Exception as error:  # its parser raises bare exceptions of its own
        raise WeftError(
            ErrorKind.BAD_INPUT,
            f"The grammar is not valid GBNF: {error}",
            'A grammar looks like: root ::= "yes" | "no"',
        ) from error
