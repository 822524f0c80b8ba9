"""A live stack written into the weights for speed, and the base brought back to the bit.

Each adapted module gets a parameter of its own with W′ = W + Σ wᵢDᵢ; the base's parameter is set aside untouched, so that what was
tied to it stays the base's, and taking the baked one off again restores every bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from app.adapters.base_torch import is_quantized
from app.adapters.live_site import Part, Site

_ROWS = 256  # of a weight that are summed in float32 at a time


def can_bake(site: Site) -> bool:
    """Whether a module's weight is a plain matrix in memory that may be exchanged."""
    if is_quantized(site.module):
        return False
    weight: Any = getattr(site.module, "weight", None)
    return (
        isinstance(weight, torch.nn.Parameter)
        and not weight.is_meta
        and not hasattr(site.module, "_hf_hook")  # accelerate may move the weight away after each pass
    )


def bytes_of(site: Site) -> int:
    """What baking a module takes beside the base's weight."""
    return site.module.weight.numel() * site.module.weight.element_size()


class Baked:
    """One module with a stack in its weight, until `restore`."""

    @torch.no_grad()
    def __init__(self, site: Site, weights: Mapping[str, float]) -> None:
        self._module = site.module
        self._base: torch.nn.Parameter = site.module.weight
        parts = [(weight, part) for key, part in sorted(site.parts.items()) if (weight := weights.get(key))]
        merged = torch.empty_like(self._base)
        across = site.kind in ("conv1d", "embedding")  # (in, out): then outputs are columns
        for start in range(0, len(merged), _ROWS):
            rows = slice(start, start + _ROWS)
            merged[rows] = _sum(self._base[rows], parts, rows, across)
        self._module.weight = torch.nn.Parameter(merged, requires_grad=False)

    def restore(self) -> None:
        """Put the base's own parameter back."""
        self._module.weight = self._base


def _sum(base: Tensor, parts: list[tuple[float, Part]], rows: slice, across: bool) -> Tensor:
    """Rows of W′ in float32. `across`: of a matrix that lies (in, out)."""
    wide = base.to(torch.promote_types(base.dtype, torch.float32))
    total = wide.clone()
    for weight, part in parts:
        if part.gain is not None:
            gain = part.gain.to(wide)
            total += weight * wide * (gain if across else gain[rows, None])
        if part.whole is not None:
            total += weight * (part.whole[rows].to(wide) - wide)
        if part.a is not None and part.b is not None:
            a, b = part.a.to(wide), part.b.to(wide)
            total += weight * (a[:, rows].T @ b.T if across else b[rows] @ a)
        if part.rows is not None:
            indices, differences = part.rows
            inside = (indices >= rows.start) & (indices < rows.start + len(base))
            places = (indices[inside] - rows.start).to(base.device)
            total.index_add_(0, places, differences[inside].to(total), alpha=weight)
    return total
