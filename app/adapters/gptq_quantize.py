"""GPTQ: a matrix rounded column by column, each column's error handed on to the columns that are still to come.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (Algorithm 1), with the
order of columns within and between groups of Gafni et al. 2025 (group-aware reordering). What is rounded is what is stored: scales
are float16 before a code is chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

DAMPING = 0.01  # of the Hessian's mean diagonal, as in the paper
_BLOCK = 32  # columns whose errors are handed on together
_SHRINKS = 20  # ranges tried for a group
_SMALLEST_SHRINK = 0.6
_TINY = 2.0**-24  # the smallest float16 above 0


class Rounded(NamedTuple):
    """A matrix on its grid: W[:, i] = (codes[:, i] − zeros[:, g]) · scales[:, g] with g = owner[i].

    Attributes:
        codes: uint8 (out, in). scales: float16 (out, groups). zeros: uint8 (out, groups). owner: int32 (in,).
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    owner: Tensor

    def weight(self) -> Tensor:
        """W, float32 (out, in)."""
        of = self.owner.long()
        return (self.codes.float() - self.zeros[:, of].float()).mul_(self.scales[:, of].float())


class Curvature(NamedTuple):
    """What a Hessian says of the matrices that read one input.

    Attributes:
        order: int64 (in,), the inputs as they are taken. importance: (in,), the Hessian's diagonal in that order.
        factor: float32 (in, in), the upper Cholesky factor of its inverse, likewise. group: inputs that share a scale.
        by_importance: groups are of inputs in that order, and not of neighbours.
    """

    order: Tensor
    importance: Tensor
    factor: Tensor
    group: int
    by_importance: bool


def curvature(
    hessian: Tensor, group: int, *, by_importance: bool = False, check: Callable[[], None] = lambda: None
) -> Curvature:
    """Prepare for `quantize`.

    Args:
        hessian: float32 (in, in), Σ x xᵀ over the inputs; zeros where there were none.
        group: inputs that share a scale; it divides `in`.
        by_importance: take columns in the order of the Hessian's diagonal, in groups of that order (`desc_act`); else groups
            are of neighbours, and only the order in which they are rounded follows importance.
        check: called between steps; raises to stop.
    """
    size = hessian.diagonal().clone()
    order = size.argsort(descending=True, stable=True) if by_importance else _group_aware(size, group)
    return Curvature(order, size[order], _inverse_factor(hessian[order][:, order], check), group, by_importance)


def quantize(weight: Tensor, given: Curvature, bits: int, check: Callable[[], None] = lambda: None) -> Rounded:
    """Round a matrix so that its product with its inputs changes least.

    Args:
        weight: (out, in), any float dtype. given: of the inputs that it reads. bits: 2 to 8.
        check: called between blocks; raises to stop.
    """
    out, inputs = weight.shape
    order, importance, factor, group, by_importance = given
    work = weight.float().T[order].contiguous()  # a column of the matrix is a row here: its numbers lie together
    codes = torch.empty(inputs, out, dtype=torch.uint8, device=work.device)
    scales = torch.empty(inputs // group, out, dtype=torch.float16, device=work.device)
    middle, wide = float(1 << bits - 1), torch.ones(out, device=work.device)
    for start in range(0, inputs, _BLOCK):
        check()
        end = min(start + _BLOCK, inputs)
        block, inner = work[start:end], factor[start:end, start:end]
        errors = torch.empty_like(block)
        for i in range(end - start):
            at = start + i
            if at % group == 0:  # both are powers of two: a group lies in a block, or begins with one
                scales[at // group] = _best_scale(work[at : at + group], importance[at : at + group], bits)
                wide = scales[at // group].float()
            column = block[i]
            code = (column / wide).round_().add_(middle).clamp_(0, 2 * middle - 1)
            error = torch.sub(column, (code - middle) * wide).div_(inner[i, i])
            block[i + 1 :].addr_(inner[i, i + 1 :], error, alpha=-1)
            errors[i] = error
            codes[at] = code.to(torch.uint8)
        work[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    codes = codes[order.argsort()].T
    scales = scales.T
    owner = torch.arange(inputs, device=work.device) // group
    if by_importance:
        owner = owner[order.argsort()]
    else:  # each run of `group` columns is one group of neighbours: put the groups back in their places
        scales = scales[:, (order[::group] // group).argsort()]
    zeros = torch.full(scales.shape, 1 << bits - 1, dtype=torch.uint8, device=work.device)
    return Rounded(codes, scales, zeros, owner.to(torch.int32))


def _group_aware(importance: Tensor, group: int) -> Tensor:
    """Columns so that the most important groups come first, and within each its most important columns."""
    rows = importance.reshape(-1, group)
    within = rows.argsort(dim=1, descending=True, stable=True)
    groups = rows.amax(1).argsort(descending=True, stable=True)
    return (within + torch.arange(len(rows), device=rows.device)[:, None] * group)[groups].reshape(-1)


def _inverse_factor(hessian: Tensor, check: Callable[[], None]) -> Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse. Inputs that never came stand for themselves."""
    diagonal = hessian.diagonal().clone()
    diagonal[diagonal == 0] = 1
    mean = float(diagonal.mean())
    damped = hessian.clone()
    for damping in (DAMPING, 0.03, 0.1, 0.3, 1.0):
        damped.diagonal().copy_(diagonal + damping * mean)
        check()
        lower, failed = torch.linalg.cholesky_ex(damped)
        if int(failed):
            continue
        check()
        inverse = torch.cholesky_inverse(lower)
        check()
        upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
        if not int(failed) and bool(upper.diagonal().isfinite().all()):
            return upper
    return torch.eye(len(hessian), device=hessian.device)  # nothing to go by: plain rounding


def _best_scale(part: Tensor, importance: Tensor, bits: int) -> Tensor:
    """For each column of `part` (group, out) the scale, float16 (out,), whose rounding errs least, weighed by importance (group,)."""
    middle = float(1 << bits - 1)
    most = part.abs().amax(0)
    weights = importance + (importance.mean() * 1e-3 + 1e-12)
    best = torch.full_like(most, torch.inf)
    chosen = torch.ones_like(most)
    for step in range(_SHRINKS + 1):
        shrink = 1 - (1 - _SMALLEST_SHRINK) * step / _SHRINKS
        # The grid reaches from −middle to middle − 1: both ends may be where the largest weight comes to lie.
        scale = (most * (shrink / (middle - 0.5))).to(torch.float16).float().clamp_(min=_TINY)
        code = (part / scale).round_().clamp_(-middle, middle - 1)
        error = weights @ code.mul_(scale).sub_(part).square_()
        better = error < best
        best = torch.where(better, error, best)
        chosen = torch.where(better, scale, chosen)
    return chosen.to(torch.float16)
