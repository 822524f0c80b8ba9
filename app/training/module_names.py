"""What `tasks/train_modules.py` is asked and answers: a model's trainable modules, and how fast this machine multiplies. No ML."""

from __future__ import annotations

import msgspec

from app.core.library import ModelEntry


class ModulesParameters(msgspec.Struct, frozen=True, kw_only=True):
    """model: of the library."""

    model: ModelEntry


class Modules(msgspec.Struct, frozen=True, kw_only=True):
    """What can be trained.

    Attributes:
        linear: last names of linear modules, and how many bear each. embeddings: names of embeddings and the output layer.
        experts: parameters that hold several experts, for target_parameters. layers: how many; pattern: what their list is called.
        flops: floating-point operations a second that training gets here in matrix products, 0 when not measured.
    """

    linear: dict[str, int]
    embeddings: tuple[str, ...]
    experts: tuple[str, ...]
    layers: int
    pattern: str
    flops: float = 0.0
