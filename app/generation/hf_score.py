"""Perplexity under transformers: windows read through the cache, softmax over a few rows of logits at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from app.core.errors import ErrorKind, WeftError
from app.engine.protocol import Score, Scored
from app.generation.hf_decode import Decoder
from app.generation.score_windows import ScoreWindow, score_windows

ROWS = 128  # predictions computed at a time: 128 rows of a 152,000-token vocabulary are 78 MB as float32


def score(
    decoder: Decoder,
    tokens: list[int],
    request: Score,
    context: int,
    progress: Callable[[int, int], None],
    cancelled: Callable[[], bool],
) -> Scored:
    """Mean negative log-likelihood of a text, each token scored once (see score_windows).

    Raises:
        WeftError: BAD_INPUT for a text of less than two tokens or a window that does not fit; CANCELLED.
    """
    window = request.window or min(context, len(tokens))
    if window > context:
        raise WeftError(
            ErrorKind.BAD_INPUT,
            f"A window of {window} tokens does not fit the context of {context}.",
            "Choose a smaller window, or load the model with a larger context length.",
        )
    if window < 2 or len(tokens) < 2:
        raise WeftError(ErrorKind.BAD_INPUT, "Perplexity needs two tokens at least.", "Give a longer text or window.")
    total, scored = 0.0, 0
    try:
        for part in score_windows(len(tokens), window, request.stride):
            progress(part.first, len(tokens))
            total += _window(decoder, tokens, part, cancelled)
            scored += part.end - part.first
    finally:
        decoder.reset()
    mean = total / scored
    return Scored(nll=mean, perplexity=math.exp(min(mean, 700.0)), tokens=scored)


def _window(decoder: Decoder, tokens: list[int], part: ScoreWindow, cancelled: Callable[[], bool]) -> float:
    """Sum of the negative log-likelihoods of tokens[first:end], in nats."""
    decoder.reset()
    fed = tokens[part.start : part.end - 1]
    if not decoder.croppable:  # recurrent: see Decoder
        rows = decoder.rows(fed)[part.first - 1 - part.start :]
        return negative_log_likelihood(rows, tokens[part.first : part.end])
    before = part.first - 1 - part.start  # tokens whose predictions nobody wants
    if before and decoder.read(fed[:before], lambda *_: None, cancelled) is None:
        raise WeftError(ErrorKind.CANCELLED, "Scoring was stopped.")
    total = 0.0
    for at in range(before, len(fed), ROWS):
        if cancelled():
            raise WeftError(ErrorKind.CANCELLED, "Scoring was stopped.")
        rows = decoder.rows(fed[at : at + ROWS])
        first = part.start + at + 1
        total += negative_log_likelihood(rows, tokens[first : first + len(rows)])
    return total


def negative_log_likelihood(logits: torch.Tensor, targets: list[int]) -> float:
    """Sum over rows of -log softmax(logits)[target], in nats.

    Args:
        logits: [rows, vocabulary], any float dtype. targets: one token a row.
    """
    wanted = torch.tensor(targets, device=logits.device)
    return float(torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="none").double().sum())
