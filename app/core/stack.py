"""AdapterStack: which adapters are on, each with its weight.

The one value that chat, compare, evaluate, merge and serve share. A stack means
W' = W + sum of weight_i * D_i, so order does not matter for the result and weight 0 is the base.
"""

from __future__ import annotations

import msgspec


class StackedAdapter(msgspec.Struct, frozen=True, kw_only=True):
    """One adapter of a stack.

    Attributes:
        path: the adapter's folder or file.
        weight: its factor; 0 switches it off, negative values subtract it.
        name: how a person knows it.
    """

    path: str
    weight: float = 1.0
    name: str = ""


class AdapterStack(msgspec.Struct, frozen=True, kw_only=True):
    """Adapters with their weights. The empty stack is the base model."""

    adapters: tuple[StackedAdapter, ...] = ()

    @property
    def title(self) -> str:
        """The stack in one line, such as `pirate 0.7 + formal 0.3`, or `base`."""
        return " + ".join(f"{a.name or a.path} {a.weight:g}" for a in self.adapters if a.weight) or "base"
