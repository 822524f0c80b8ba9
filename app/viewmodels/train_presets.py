"""Named settings of a training run, fitted to the size of the model."""

from __future__ import annotations

import math

from app.core.library import ModelEntry
from app.core.options import OptionValue

Values = dict[str, OptionValue]

PRESETS: dict[str, tuple[Values, Values]] = {
    # name: changed fields of [method] and [train]
    "Balanced": ({}, {}),
    "Quick try": ({"r": 8, "alpha": 16.0}, {"epochs": 1.0, "gradient_accumulation": 4}),
    "Voice or style": ({"r": 16, "alpha": 32.0}, {"epochs": 8.0, "gradient_accumulation": 4}),
    "Thorough": ({"r": 32, "alpha": 64.0, "dora": True}, {"epochs": 4.0, "learning_rate": 1e-4}),
    "Least memory": (
        {"r": 8, "alpha": 16.0},
        {"batch_size": 1, "gradient_accumulation": 16, "gradient_checkpointing": True, "optimizer": "adamw_8bit"},
    ),
}
_SMALL = 768  # hidden size below which the usual learning rate teaches next to nothing


def presets(model: ModelEntry | None) -> dict[str, tuple[Values, Values]]:
    """The presets for a model. Small ones learn faster: the rate follows 5e-4 · (2000 / width)^0.78.

    The rule is the one that Schulman and others fitted over Llama models of many sizes ("LoRA without regret", 2025).
    """
    width = model.shape.hidden if model is not None else 0
    if not 0 < width < _SMALL:
        return PRESETS
    rate = _one_digit(5e-4 * (2000 / width) ** 0.78)
    return {name: (method, {**train, "learning_rate": rate}) for name, (method, train) in PRESETS.items()}


def _one_digit(value: float) -> float:
    power = 10.0 ** math.floor(math.log10(value))
    return float(f"{round(value / power) * power:.0e}")
