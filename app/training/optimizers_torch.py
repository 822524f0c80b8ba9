"""The optimizers of a run, over the trained parameters. Imports torch; bitsandbytes and peft where asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from app.core.errors import ErrorKind, WeftError
from app.training.optimizer_state import SMALLEST
from app.training.paged_torch import paged_adamw, paged_adamw_8bit
from app.training.run_config import TrainConfig


def make_optimizer(
    train: TrainConfig, model: Any, places: Sequence[Path] = (), note: Callable[[str], None] = lambda text: None
) -> torch.optim.Optimizer:
    """The optimizer at full learning rate; `schedule.factor` scales each group's from there.

    Args:
        places: folders for a paged optimizer's state, where the model is on the processor. note: told where it lies.

    Raises:
        WeftError: ENVIRONMENT without bitsandbytes; DISK_FULL where a paged state finds no room.
    """
    name = train.optimizer
    common = {"lr": train.learning_rate, "weight_decay": train.weight_decay}
    betas = {"betas": (train.beta1, train.beta2), "eps": train.epsilon}
    if name == "lora_fa":
        return _lora_fa(train, model)
    if name == "lora_plus":
        return _lora_plus(train, model, torch.optim.AdamW, betas)
    if name == "lora_plus_8bit":
        return _lora_plus(train, model, _bitsandbytes("AdamW8bit"), {**betas, "min_8bit_size": SMALLEST})
    parameters = [p for p in model.parameters() if p.requires_grad]
    if name == "sgd":
        return torch.optim.SGD(parameters, momentum=0.9, **common)
    if name == "adamw":
        return torch.optim.AdamW(parameters, **common, **betas)
    eight = {"min_8bit_size": SMALLEST} if name.endswith("8bit") else {}
    if name.startswith("paged") and all(p.device.type == "cpu" for p in parameters):
        if eight:
            made, file = paged_adamw_8bit(_bitsandbytes("AdamW8bit"), parameters, places, **common, **betas, **eight)
        else:
            made, file = paged_adamw(parameters, places, **common, **betas)
        note(file.note())
        return made
    kind = _bitsandbytes(
        {"adamw_8bit": "AdamW8bit", "paged_adamw": "PagedAdamW32bit", "paged_adamw_8bit": "PagedAdamW8bit"}[name]
    )
    return kind(parameters, **common, **betas, **eight)


def _bitsandbytes(name: str) -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise WeftError(
            ErrorKind.ENVIRONMENT,
            "This optimizer needs bitsandbytes, which is not installed.",
            'Take optimizer = "adamw", or repair the environment.',
        ) from error
    return getattr(bitsandbytes.optim, name)


def _lora_plus(train: TrainConfig, model: Any, kind: Any, arguments: dict[str, Any]) -> torch.optim.Optimizer:
    from peft.optimizers import create_loraplus_optimizer

    made = create_loraplus_optimizer(
        model,
        kind,
        lr=train.learning_rate,
        loraplus_lr_ratio=train.lora_plus_ratio,
        loraplus_weight_decay=train.weight_decay,
        loraplus_lr_embedding=train.learning_rate,
        **arguments,
    )
    made.param_groups[:] = [group for group in made.param_groups if group["params"]]
    return made


def _lora_fa(train: TrainConfig, model: Any) -> torch.optim.Optimizer:
    from peft.optimizers import create_lorafa_optimizer
    from peft.optimizers.lorafa import LoraFAOptimizer

    settings = next(iter(model.peft_config.values()))
    whole = create_lorafa_optimizer(
        model, r=settings.r, lora_alpha=settings.lora_alpha, lr=train.learning_rate, weight_decay=train.weight_decay
    )
    # It is handed all of the model: only the pairs of A (frozen) and B and what else is trained are its business.
    (group,) = whole.param_groups
    kept = [
        (parameter, name, scale)
        for parameter, name, scale in zip(group["params"], group["names"], group["scaling_factors"], strict=True)
        if parameter.requires_grad or ".lora_A." in name
    ]
    ours = {
        **{
            key: value
            for key, value in group.items()
            if key not in ("params", "names", "scaling_factors", "scaling_factor")
        },
        "params": [parameter for parameter, _, _ in kept],
        "names": [name for _, name, _ in kept],
        "scaling_factors": [scale for _, _, scale in kept],
        "betas": (train.beta1, train.beta2),
        "eps": train.epsilon,
    }
    return LoraFAOptimizer([ours])


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Scale every group's own learning rate. Returns the first group's as it is now."""
    for group in optimizer.param_groups:
        group.setdefault("full_lr", group["lr"])
        group["lr"] = group["full_lr"] * factor
    return float(optimizer.param_groups[0]["lr"])
