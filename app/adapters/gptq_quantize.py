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
_BLOCK = 128  # columns whose errors are handed on together
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


def quantize(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    group: int,
    *,
    by_importance: bool = False,
    check: Callable[[], None] = lambda: None,
) -> Rounded:
    """Round a matrix so that its product with the inputs that the Hessian stands for changes least.

    Args:
        weight: (out, in), any float dtype. hessian: float32 (in, in), Σ x xᵀ over those inputs; zeros where there were none.
        bits: 2 to 8. group: inputs that share a scale; it divides `in`.
        by_importance: take columns in the order of the Hessian's diagonal, in groups of that order (`desc_act`); else groups
            are of neighbours, and only the order in which they are rounded follows importance.
        check: called between blocks; raises to stop.
    """
    work = weight.float().clone()
    out, inputs = work.shape
    importance = hessian.diagonal().clone()
    order = importance.argsort(descending=True, stable=True) if by_importance else _group_aware(importance, group)
    work = work[:, order]
    importance = importance[order]
    factor = _inverse_factor(hessian[order][:, order])
    codes = torch.empty(out, inputs, dtype=torch.uint8, device=work.device)
    scales = torch.empty(out, inputs // group, dtype=torch.float16, device=work.device)
    middle, wide = float(1 << bits - 1), torch.ones(out, device=work.device)
    for start in range(0, inputs, _BLOCK):
        check()
        end = min(start + _BLOCK, inputs)
        block, inner = work[:, start:end], factor[start:end, start:end]
        errors = torch.empty_like(block)
        for i in range(end - start):
            at = start + i
            if at % group == 0:  # both are powers of two: a group lies in a block, or begins with one
                scale = _best_scale(work[:, at : at + group], importance[at : at + group], bits)
                scales[:, at // group] = scale
                wide = scale.float()
            column = block[:, i]
            code = (column / wide).round_().add_(middle).clamp_(0, 2 * middle - 1)
            error = (column - (code - middle) * wide) / inner[i, i]
            block[:, i + 1 :] -= torch.outer(error, inner[i, i + 1 :])
            errors[:, i] = error
            codes[:, at] = code.to(torch.uint8)
        work[:, end:] -= errors @ factor[start:end, end:]
    back = order.argsort()
    owner = torch.arange(inputs, device=work.device) // group
    zeros = torch.full_like(scales, middle).to(torch.uint8)
    if by_importance:
        return Rounded(codes[:, back], scales, zeros, owner[back].to(torch.int32))
    # Each run of `group` columns is one group of neighbours: put the groups back in their places.
    places = (order[::group] // group).argsort()
    return Rounded(codes[:, back], scales[:, places], zeros, owner.to(torch.int32))


def _group_aware(importance: Tensor, group: int) -> Tensor:
    """Columns so that the most important groups come first, and within each its most important columns."""
    rows = importance.reshape(-1, group)
    within = rows.argsort(dim=1, descending=True, stable=True)
    groups = rows.amax(1).argsort(descending=True, stable=True)
    return (within + torch.arange(len(rows), device=rows.device)[:, None] * group)[groups].reshape(-1)


def _inverse_factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse. Inputs that never came stand for themselves."""
    diagonal = hessian.diagonal().clone()
    diagonal[diagonal == 0] = 1
    mean = float(diagonal.mean())
    damped = hessian.clone()
    for damping in (DAMPING, 0.03, 0.1, 0.3, 1.0):
        damped.diagonal().copy_(diagonal + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if int(failed):
            continue
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not int(failed) and bool(upper.diagonal().isfinite().all()):
            return upper
    return torch.eye(len(hessian), device=hessian.device)  # nothing to go by: plain rounding


def _best_scale(part: Tensor, importance: Tensor, bits: int) -> Tensor:
    """For each row of `part` (out, group) the scale, float16 (out,), whose rounding errs least, weighed by importance."""
    middle = float(1 << bits - 1)
    most = part.abs().amax(1)
    weights = importance + (importance.mean() * 1e-3 + 1e-12)
    best = torch.full_like(most, torch.inf)
    chosen = torch.ones_like(most)
    for step in range(_SHRINKS + 1):
        shrink = 1 - (1 - _SMALLEST_SHRINK) * step / _SHRINKS
        # The grid reaches from −middle to middle − 1: both ends may be where the largest weight comes to lie.
        scale = (most * (shrink / (middle - 0.5))).to(torch.float16).float().clamp_(min=_TINY)
        code = (part / scale[:, None]).round_().clamp_(-middle, middle - 1)
        error = ((code * scale[:, None] - part).square_() * weights).sum(1)
        better = error < best
        best = torch.where(better, error, best)
        chosen = torch.where(better, scale, chosen)
    return chosen.to(torch.float16)
