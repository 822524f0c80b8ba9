"""Combining low-rank pairs of one module: the arithmetic of PEFT's `add_weighted_adapter`, in float32.

Sources: TIES (Yadav et al., 2023, arXiv 2306.01708), DARE (Yu et al., 2023, arXiv 2311.03099). `cat` and `svd` are right
where PEFT's are not (rsLoRA first, live scales counted twice).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from app.core.combine_plan import CombinePlan, uses_sign
from app.core.errors import ErrorKind, WeftError

_EXACT = 1024  # rows or columns up to which a matrix is taken apart whole
_SPARE, _ROUNDS = 32, 6  # of random projections: directions beyond the wanted ones, and rounds of refinement


class Pair(NamedTuple):
    """One adapter's part of a module: weight·scale·B·A, with A (rank, in) and B (out, rank) in float32."""

    a: Tensor
    b: Tensor
    scale: float
    weight: float

    @property
    def factor(self) -> float:
        return self.scale * self.weight

    def difference(self) -> Tensor:
        """s·B·A."""
        return self.b @ self.a * self.scale


class Whole(NamedTuple):
    """One adapter's part of a module that is no low-rank pair (DoRA): its difference (out, in) in float32."""

    value: Tensor
    weight: float

    def difference(self) -> Tensor:
        return self.value


class Result(NamedTuple):
    """A of (rank, in) and B of (out, rank), whose scale is 1; squared norms of the whole difference and of what was cut."""

    a: Tensor
    b: Tensor
    whole: float = 0.0
    lost: float = 0.0


def combine(
    parts: Sequence[Pair | Whole], plan: CombinePlan, rank: int, generator: torch.Generator | None = None
) -> Result:
    """Make one pair of several of the same module.

    Args:
        rank: that svd methods cut to. generator: of what DARE drops; None takes torch's own.

    Raises:
        WeftError: BAD_INPUT when a method needs equal ranks and they differ; UNSUPPORTED for whole differences where the
            method cuts to no rank.
    """
    method = plan.method
    pairs = [part for part in parts if isinstance(part, Pair)]
    if len(pairs) < len(parts):
        return _of_whole(parts, plan, rank, generator)
    if method == "cat":
        return concatenate(pairs)
    if method == "svd":
        a, b, *_ = concatenate(pairs)
        return _cut(_factors(a, b), rank, plan.clamp)
    if method.endswith("_svd"):
        difference = mix([pair.difference() for pair in pairs], [pair.weight for pair in pairs], plan, generator)
        u, s, v = torch.linalg.svd(difference, full_matrices=False)
        return _cut((u, s, v), rank, plan.clamp)
    if len({pair.a.shape[0] for pair in pairs}) > 1:
        ranks = ", ".join(str(pair.a.shape[0]) for pair in pairs)
        raise WeftError(
            ErrorKind.BAD_INPUT,
            f"The method {method} needs adapters of the same rank; these have {ranks}.",
            f"Use cat (exact), svd, or {method}_svd." if method != "linear" else "Use cat (exact) or svd.",
        )
    # The weight goes into both sides as its square root, its sign into A alone.
    roots = [math.sqrt(abs(pair.factor)) for pair in pairs]
    signed = [math.copysign(root, pair.factor) for root, pair in zip(roots, pairs, strict=True)]
    a = mix([pair.a for pair in pairs], signed, plan, generator)
    b = mix([pair.b for pair in pairs], roots, plan, generator)
    return Result(a, b)


def dora_difference(base: Tensor, pair: Pair, magnitude: Tensor) -> Tensor:
    """g·(W + s·B·A) − W with g = m/‖W + s·B·A‖, row by row, in float32. base: W as (out, in). magnitude: m, `out` numbers."""
    after = base + pair.difference()
    norm = after.double().norm(dim=1)
    gain = torch.where(norm > 0, magnitude.reshape(-1).double() / norm, 1.0)  # a row of zeros has no direction
    return after * gain.float()[:, None] - base


def _of_whole(parts: Sequence[Pair | Whole], plan: CombinePlan, rank: int, generator: torch.Generator | None) -> Result:
    if plan.method != "svd" and not plan.method.endswith("_svd"):
        raise WeftError(ErrorKind.UNSUPPORTED, "A DoRA is no low-rank pair.", "Choose svd, or one of the svd forms.")
    differences = [part.difference() for part in parts]
    weights = [part.weight for part in parts]
    if plan.method == "svd":
        total = differences[0] * weights[0]
        for value, weight in zip(differences[1:], weights[1:], strict=True):
            total = total + value * weight
    else:
        total = mix(differences, weights, plan, generator)
    return _cut(_largest_values(total, rank, plan.seed), rank, plan.clamp, float((total.double() ** 2).sum()))


def _largest_values(matrix: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, Vᵀ of a matrix; of a large one only the largest values, by random projections (Halko et al., arXiv 0909.4061)."""
    wanted = rank + _SPARE
    if min(matrix.shape) <= max(_EXACT, 2 * wanted):
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        return u, s, v
    generator = torch.Generator().manual_seed(seed)
    span = torch.linalg.qr(matrix @ torch.randn(matrix.shape[1], wanted, generator=generator)).Q
    for _ in range(_ROUNDS):
        span = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ span).Q).Q
    u, s, v = torch.linalg.svd(span.T @ matrix, full_matrices=False)
    return span @ u, s, v


def concatenate(pairs: Sequence[Pair]) -> Result:
    """The exact sum: all ranks side by side, the weights folded into both sides by their square roots."""
    a = torch.cat([pair.a * math.copysign(math.sqrt(abs(pair.factor)), pair.factor) for pair in pairs])
    b = torch.cat([pair.b * math.sqrt(abs(pair.factor)) for pair in pairs], dim=1)
    return Result(a, b)


def mix(
    tensors: Sequence[Tensor], weights: Sequence[float], plan: CombinePlan, generator: torch.Generator | None
) -> Tensor:
    """One tensor of several of the same shape, by the method's name without `_svd`."""
    method = plan.method.removesuffix("_svd")
    if method.startswith("dare"):
        kept = [_drop(tensor, plan.density, generator) for tensor in tensors]
    elif method in ("ties", "magnitude_prune"):
        kept = [_largest(tensor, plan.density) for tensor in tensors]
    else:
        kept = list(tensors)
    stacked = torch.stack(kept)
    weighted = stacked * torch.tensor(weights, dtype=stacked.dtype).view(-1, *[1] * (stacked.dim() - 1))
    if not uses_sign(method):
        return weighted.sum(dim=0)
    votes = stacked.sum(dim=0) if plan.sign == "total" else stacked.sign().sum(dim=0)
    elected = torch.where(votes >= 0, 1, -1)
    agrees = stacked.sign() == elected
    return (weighted * agrees).sum(dim=0) / agrees.sum(dim=0).clamp(min=1.0)


def _largest(tensor: Tensor, density: float) -> Tensor:
    if density >= 1:
        return tensor
    flat = tensor.reshape(-1)
    kept = torch.zeros_like(flat)
    top = torch.topk(flat.abs(), k=int(density * flat.numel())).indices
    kept[top] = flat[top]
    return kept.reshape(tensor.shape)


def _drop(tensor: Tensor, density: float, generator: torch.Generator | None) -> Tensor:
    if density >= 1:
        return tensor
    return tensor * torch.bernoulli(torch.full_like(tensor, density), generator=generator) / density


def _factors(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, Vᵀ of B·A without ever making it: of matrices as small as the ranks are (in float64: they are small)."""
    left, left_r = torch.linalg.qr(b.double())
    right, right_r = torch.linalg.qr(a.double().T)
    u, s, v = torch.linalg.svd(left_r @ right_r.T, full_matrices=False)
    return left @ u, s, v @ right.T


def _cut(factors: tuple[Tensor, Tensor, Tensor], rank: int, clamp: float, squares: float | None = None) -> Result:
    """The largest values of a matrix as a pair. squares: sum of all its values' squares, where `factors` lack the smallest."""
    u, s, v = factors
    whole = float((s.double() ** 2).sum()) if squares is None else squares
    rank = min(rank, s.shape[0])
    lost = max(0.0, whole - float((s[:rank].double() ** 2).sum()))
    b, a = u[:, :rank] * s[:rank], v[:rank]
    if clamp < 1:
        limit = float(_quantile(torch.cat([b.flatten(), a.flatten()]), clamp))
        clamped_b, clamped_a = b.clamp(-limit, limit), a.clamp(-limit, limit)
        # What clamping costs: ‖BA − B'A'‖², from matrices as small as the ranks.
        both = concatenate([Pair(a, b, 1.0, 1.0), Pair(clamped_a, clamped_b, 1.0, -1.0)])
        lost += float((_factors(both.a, both.b)[1] ** 2).sum())
        b, a = clamped_b, clamped_a
    return Result(a.float().contiguous(), b.float().contiguous(), whole, min(lost, whole))


def _quantile(values: Tensor, share: float) -> Tensor:
    """torch.quantile with linear interpolation, which refuses more than 16 million values."""
    ordered = values.sort().values
    place = share * (ordered.numel() - 1)
    low = math.floor(place)
    high = min(low + 1, ordered.numel() - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
