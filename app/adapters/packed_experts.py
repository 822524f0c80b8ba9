"""A mixture's experts as packed matrices of their own: transformers keeps them in one tensor, which holds no packed weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

PARTS = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}


class PackedExperts(torch.nn.Module):
    """Stands for a module of gated experts; its children are named by number, theirs as the files name them.

    Args:
        experts: transformers' own module. parts: the names of gate, up and down in the files.
    """

    def __init__(self, experts: Any, parts: Iterable[str]) -> None:
        super().__init__()
        self.num_experts: int = experts.num_experts
        self.act_fn = experts.act_fn
        self._names = {PARTS[name]: name for name in parts}
        for number in range(self.num_experts):
            self.add_module(str(number), torch.nn.Module())

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (tokens, hidden); top_k_index, top_k_weights (tokens, k). An expert runs once, over its own tokens."""
        total = torch.zeros_like(hidden_states)
        for number in top_k_index.unique().tolist():
            if not 0 <= number < self.num_experts:
                continue  # transformers marks so what another process computes
            expert = self.get_submodule(str(number))
            gate, up, down = (expert.get_submodule(self._names[role]) for role in ("gate", "up", "down"))
            tokens, place = torch.where(top_k_index == number)
            taken = hidden_states[tokens]
            made = down(self.act_fn(gate(taken)) * up(taken)) * top_k_weights[tokens, place, None]
            total.index_add_(0, tokens, made.to(total.dtype))
        return total


def standable(experts: Any) -> bool:
    """Whether a module is of those that `PackedExperts` computes like: gated, without biases, (out, in)."""
    gate: Any = getattr(experts, "gate_up_proj", None)
    down: Any = getattr(experts, "down_proj", None)
    apply_gate: Any = getattr(type(experts), "_apply_gate", None)
    return (
        isinstance(gate, torch.Tensor)
        and isinstance(down, torch.Tensor)
        and gate.dim() == down.dim() == 3
        and gate.shape[1] == 2 * down.shape[2]
        and gate.shape[2] == down.shape[1]
        and hasattr(experts, "act_fn")
        and getattr(experts, "num_experts", 0) == gate.shape[0]
        and (apply_gate is None or apply_gate.__name__ == "_default_apply_gate")
        and not getattr(experts, "is_transposed", False)
        and len(list(experts.parameters())) == 2
    )
