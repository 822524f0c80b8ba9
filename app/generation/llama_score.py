"""Perplexity in llama.cpp: batches of our own with few rows of logits, never `logits_all`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from app.core.errors import ErrorKind, WeftError
from app.engine.protocol import Score, Scored
from app.generation.llama_context import LlamaContext
from app.generation.llama_model import LlamaModel
from app.generation.score_windows import ScoreWindow, score_windows

_CHUNK = 32  # rows whose softmax is taken at a time, so that a large vocabulary does not take hundreds of MB


def score(model: LlamaModel, context: LlamaContext, request: Score, progress: Callable[..., None]) -> Scored:
    """Mean negative log-likelihood of a text, each token scored once (see score_windows).

    Raises:
        WeftError: BAD_INPUT for a text of less than two tokens or a window that does not fit, CANCELLED.
    """
    tokens = model.with_bos(model.tokenize(request.text, special=False))
    window = request.window or min(context.size, len(tokens))
    if window > context.size:
        raise WeftError(
            ErrorKind.BAD_INPUT,
            f"A window of {window} tokens does not fit the context of {context.size}.",
            "Choose a smaller window, or load the model with a larger context length.",
        )
    if window < 2 or len(tokens) < 2:
        raise WeftError(ErrorKind.BAD_INPUT, "Perplexity needs two tokens at least.", "Give a longer text or window.")
    total, scored = 0.0, 0
    for part in score_windows(len(tokens), window, request.stride):
        progress("Scoring the text", part.first, len(tokens), "tokens")
        total += _score_window(context, tokens, part)
        scored += part.end - part.first
    mean = total / scored
    return Scored(nll=mean, perplexity=math.exp(min(mean, 700.0)), tokens=scored)


def _score_window(context: LlamaContext, tokens: list[int], part: ScoreWindow) -> float:
    """Sum of the negative log-likelihoods of tokens[first:end], in nats."""
    context.clear()
    # The prediction of token i stands at token i-1: what lies before first-1 needs no logits.
    if not context.read(tokens[part.start : part.first - 1]):
        raise WeftError(ErrorKind.CANCELLED, "Scoring was stopped.")
    total = 0.0
    at = part.first - 1
    while at < part.end - 1:
        end = min(at + context.rows, part.end - 1)
        logits = context.logits(tokens[at:end], 0)
        if logits is None:
            raise WeftError(ErrorKind.CANCELLED, "Scoring was stopped.")
        total += negative_log_likelihood(logits, tokens[at + 1 : end + 1])
        at = end
    return total


def negative_log_likelihood(logits: Any, targets: list[int]) -> float:
    """Sum over rows of -log softmax(logits)[target], in nats.

    Args:
        logits: float32 array of shape [rows, vocabulary]. targets: one token a row.
    """
    import numpy

    total = 0.0
    for start in range(0, len(targets), _CHUNK):
        rows = logits[start : start + _CHUNK]
        wanted = numpy.asarray(targets[start : start + _CHUNK])
        top = rows.max(axis=1, keepdims=True)
        sums = numpy.exp(rows - top).sum(axis=1, dtype=numpy.float64)
        chosen = rows[numpy.arange(len(wanted)), wanted].astype(numpy.float64)
        total += float((numpy.log(sums) + top[:, 0] - chosen).sum())
    return total
