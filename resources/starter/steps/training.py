"""One training loop, for the base model and for the voice adapter."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.nn import functional

from .batches import IGNORED

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Run:
    """How long to train and from where: it ends after `steps` or `seconds`, whichever is first.

    `further`: go on with what is there, at a lower rate, instead of starting anew.
    """

    seed: int
    steps: int
    seconds: float
    report: Callable[[str], None]
    further: bool = False


def answer_loss(model: torch.nn.Module, batch: Batch, first: float = 1.0) -> torch.Tensor:
    """Mean cross-entropy of the trained tokens; the head runs on those positions only.

    `first` weighs the first tokens of each answer, where it is decided which answer it will be.
    """
    ids, labels = batch
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = core.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    wanted = labels[:, 1:]
    at = wanted != IGNORED
    losses = functional.cross_entropy(core.lm_head(hidden[at]).float(), wanted[at], reduction="none")
    begins = at & (labels[:, :-1] == IGNORED)
    early = begins.clone()
    for distance in range(1, 4):
        early[:, distance:] |= begins[:, :-distance]
    weights = torch.where(early[at], first, 1.0)
    return (losses * weights).sum() / weights.sum()


def train(
    model: torch.nn.Module,
    batches: Iterable[Batch],
    run: Run,
    rate: float,
    first: float = 1.0,
    decay: float = 0.05,
    check: Callable[[], str] | None = None,
) -> None:
    """Train as `run` says; the rate warms up, stays, then falls to zero."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=decay)
    begun, mean = time.monotonic(), math.nan
    model.train()
    for step, batch in enumerate(batches):
        done = max(step / run.steps, (time.monotonic() - begun) / run.seconds)
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 80) * min(1.0, 1.6 * (1 - done))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=HALF):
            loss = answer_loss(model, batch, first)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        mean = loss.item() if math.isnan(mean) else 0.98 * mean + 0.02 * loss.item()
        if step % 100 == 99:
            run.report(f"step {step + 1}: loss {mean:.4f}, {time.monotonic() - begun:.0f} s")
        if check is not None and step % 600 == 599:
            model.eval()
            run.report(check())
            model.train()
    model.eval()


HALF = True
