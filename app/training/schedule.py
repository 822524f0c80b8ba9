"""The learning rate over a run, as pure functions of the step, so that a resumed run needs no state for it."""

from __future__ import annotations

import math

from app.training.run_config import TrainConfig


def warmup_steps(train: TrainConfig, total: int) -> int:
    """How many steps the learning rate rises: a share of the run below 1, else a number."""
    return min(total, math.ceil(train.warmup * total) if train.warmup < 1 else int(train.warmup))


def factor(train: TrainConfig, step: int, total: int) -> float:
    """What the learning rate is multiplied by in step `step` of `total` (from 0).

    The shapes are transformers' of the same names; warm-up begins above zero, so that no step is lost.
    """
    warm = warmup_steps(train, total)
    if step < warm:
        return (step + 1) / (warm + 1)
    done = (step - warm) / max(1, total - warm)  # 0 … <1
    low = train.min_learning_rate
    match train.scheduler:
        case "linear":
            return 1 - done
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        case "cosine_with_min_lr":
            return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done))
        case "polynomial":
            return low + (1 - low) * (1 - done) ** 2
        case "inverse_sqrt":
            scale = max(1, warm)
            return math.sqrt(scale / (scale + step - warm))
        case "warmup_stable_decay":
            return 1.0 if done < 0.8 else low + (1 - low) * (1 - done) / 0.2
        case _:
            return 1.0
