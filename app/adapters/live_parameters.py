"""Parameters that a live stack writes anew at each change: biases, norms, routers and experts.

They are small, or (experts) called in ways that leave no other place to add to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Vector(NamedTuple):
    """A whole difference D, of the parameter's shape."""

    value: Tensor

    def add_to(self, total: Tensor, weight: float) -> None:
        total.add_(self.value.to(total.device), alpha=weight)


class Product(NamedTuple):
    """D = B·A for one expert's matrix, or for some of its rows; s is in b. `expert` -1: the parameter is a plain matrix."""

    a: Tensor
    b: Tensor
    expert: int = -1
    first: int = 0
    transposed: bool = False

    def add_to(self, total: Tensor, weight: float) -> None:
        part = total if self.expert < 0 else total[self.expert]
        part = part.T if self.transposed else part
        a, b = self.a.to(total.device), self.b.to(total.device)
        part[self.first : self.first + b.shape[0]].addmm_(b, a, alpha=weight)


class Written:
    """One parameter of a module, with a copy of what the base has there."""

    def __init__(self, module: Any, name: str, length: int = 0) -> None:
        """`length`: of a bias that the module does not have; it gets one of zeros while the stack is on."""
        self.module, self.name = module, name
        parameter = getattr(module, name, None)
        self._absent = parameter is None
        if parameter is None:
            reference = next(module.parameters())
            dtype = reference.dtype if reference.dtype.is_floating_point else torch.get_default_dtype()
            self._base = torch.zeros(length, dtype=dtype, device=reference.device)
        else:
            self._base = parameter.detach().clone()
        self.changes: dict[str, list[Vector | Product]] = {}
        self._is_base = True

    @property
    def shape(self) -> torch.Size:
        return self._base.shape

    @property
    def base(self) -> Tensor:
        return self._base

    def write(self, weights: Mapping[str, float]) -> None:
        """W′ = W + Σ wᵢDᵢ, summed in float32 and rounded once; the base's own bits where nothing is on."""
        if any(weights.get(key) for key in self.changes):
            self._put(self._sum(weights, self._wide(self._base)))
        else:
            self.restore()

    def value(self, weights: Mapping[str, float]) -> Tensor:
        """W′, in the base's dtype; the base's own where nothing is on."""
        if not any(weights.get(key) for key in self.changes):
            return self._base
        return self._sum(weights, self._wide(self._base)).to(self._base.dtype)

    def difference(self, weights: Mapping[str, float]) -> Tensor:
        """Σ wᵢDᵢ in float32 or wider."""
        return self._sum(weights, torch.zeros_like(self._wide(self._base)))

    def _wide(self, value: Tensor) -> Tensor:
        return value.to(torch.promote_types(value.dtype, torch.float32), copy=True)

    def _sum(self, weights: Mapping[str, float], total: Tensor) -> Tensor:
        for key, changes in self.changes.items():
            if weight := weights.get(key):
                for change in changes:
                    change.add_to(total, weight)
        return total

    @torch.no_grad()
    def _put(self, total: Tensor) -> None:
        parameter = getattr(self.module, self.name)
        if parameter is None:
            setattr(self.module, self.name, torch.nn.Parameter(total.to(self._base.dtype), requires_grad=False))
        else:
            parameter.copy_(total)
        self._is_base = False

    @torch.no_grad()
    def restore(self) -> None:
        """Bring the base back."""
        if self._is_base:
            return
        if self._absent:
            setattr(self.module, self.name, None)
        else:
            getattr(self.module, self.name).copy_(self._base)
        self._is_base = True
