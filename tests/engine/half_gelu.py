"""GELU as ggml computes it on a processor: looked up in a table, by an argument of half precision, with values of half precision.

With it llama.cpp is held to a float64 reference for GPT-2, Bloom, Phi-2 and Gemma too. Without, the table alone is worth 1e-3 to
5e-3 of a logit; with it 1e-6 to 2e-4 is left, and up to 7e-4 where an argument is rounded to the other side.
"""

from __future__ import annotations

from typing import Any

import torch

GELU = ("gpt2", "bloom", "phi", "gemma")  # families that compute it
_NAMES = ("act", "act_fn", "activation_fn", "gelu_impl")


class TableGelu(torch.nn.Module):
    """0 from -10 down, x from 10 up, between them the table: tanh's GELU of the rounded x, rounded."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        looked_up = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().to(x.dtype)
        return torch.where(x <= -10, torch.zeros_like(x), torch.where(x >= 10, x, looked_up))


def as_in_ggml(model: Any, family: str) -> Any:
    """The model itself as llama.cpp computes its family."""
    return with_table(model) if family in GELU else model


def with_table(model: Any) -> Any:
    """The model itself, its GELUs those of ggml."""
    found = 0
    for module in model.modules():
        for name in _NAMES:
            if isinstance(getattr(module, name, None), torch.nn.Module):
                setattr(module, name, TableGelu())
                found += 1
    assert found, "no activation was found"
    return model
