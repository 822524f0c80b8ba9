"""What a step minimises: SFT's token loss, DPO's and ORPO's preference losses. Sums, with their divisors apart.

Own code rather than TRL's trainers: one loop then serves all three with the same pausing, checkpoints, bit-equal resume and
memory fallback. The formulas are TRL's (sigmoid DPO with label smoothing; ORPO's odds ratio), and tests hold them to TRL.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

IGNORED = -100


def trained_count(labels: torch.Tensor) -> int:
    """How many tokens a loss is taken on."""
    return int((labels[:, 1:] != IGNORED).sum())


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each next token in float32, (rows, length - 1); 0 where nothing is trained.

    Args:
        logits: (rows, length, vocabulary). labels: (rows, length), unshifted, -100 for masked.
    """
    shifted = labels[:, 1:]
    flat = functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), shifted.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return flat.view_as(shifted)


def sft_loss(model: Any, tensors: dict[str, torch.Tensor], *, chunked: bool) -> torch.Tensor:
    """The sum of the token losses of a batch, float32."""
    labels = tensors["labels"]
    inputs = {name: value for name, value in tensors.items() if name != "labels"}
    if chunked:
        found = _chunked(model, inputs, labels)
        if found is not None:
            return found
    logits = model(**inputs, use_cache=False).logits
    return token_losses(logits, labels).sum()


def _chunked(model: Any, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor | None:
    """The loss without all logits at once; None where the model's parts cannot be told apart."""
    try:
        from app.training.loss_torch import sft_chunked
    except ImportError:
        return None
    return sft_chunked(model, inputs, labels)


def sequence_logps(model: Any, tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the trained tokens' log-probabilities of each row, and how many they are; (rows,) each."""
    labels = tensors["labels"]
    logits = model(**{name: value for name, value in tensors.items() if name != "labels"}, use_cache=False).logits
    return -token_losses(logits, labels).sum(1), (labels[:, 1:] != IGNORED).sum(1)


def dpo_losses(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    beta: float,
    smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sigmoid DPO (Rafailov and others, 2023) per pair, and its reward margin. All (pairs,), sums of log-probabilities."""
    margin = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    losses = -functional.logsigmoid(margin) * (1 - smoothing) - functional.logsigmoid(-margin) * smoothing
    return losses, margin


def orpo_losses(
    chosen: torch.Tensor, rejected: torch.Tensor, chosen_count: torch.Tensor, rejected_count: torch.Tensor, beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """ORPO (Hong and others, 2024) per pair: the chosen answer's mean loss plus beta times the odds ratio's; and log-odds."""
    good, bad = chosen / chosen_count.clamp_min(1), rejected / rejected_count.clamp_min(1)
    # log(1 - exp(x)) for x < 0, exact near both ends.
    odds = (good - bad) - (_log_not(good) - _log_not(bad))
    return -good - beta * functional.logsigmoid(odds), odds


def _log_not(logp: torch.Tensor) -> torch.Tensor:
    return torch.log1p(-torch.exp(logp.clamp_max(-1e-7)))
