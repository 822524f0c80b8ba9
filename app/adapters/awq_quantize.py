"""AWQ: matrices in 4 bits with a zero point, their inputs scaled so that the columns which matter most are rounded least.

Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration": a scale an input channel, which what
comes before takes off again; searched on the layer's real inputs; then the range that errs least for each group.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from app.adapters.gptq_quantize import Rounded

BITS = 4
_MOST = (1 << BITS) - 1
_RATIOS = 20  # exponents tried between 0 and 1
_CLIPS, _SMALLEST_CLIP = 10, 0.5  # ranges tried for a group: 1 to 0.5 of the whole, in steps of 0.05
_CLIP_ROWS = 256  # inputs that ranges are tried on
_SLICE = 1 << 18  # weights that are worked on at a time: what a processor's cache holds


def best_scales(
    weights: list[Tensor], inputs: Tensor, size: Tensor, group: int, check: Callable[[], None] = lambda: None
) -> Tensor:
    """The scale of each input channel under which rounding changes what the matrices make of the inputs least.

    Args:
        weights: float32 (out_i, in) each; they read the same input. inputs: float32 (rows, in), a part of it.
        size: float32 (in,), the mean |x| over all of it. group: inputs that share a scale.
        check: called between trials; raises to stop.

    Returns:
        float32 (in,); ones where no scale is better than none.
    """
    best, chosen = torch.inf, torch.ones_like(size)
    for step in range(_RATIOS):
        scale = size.clamp(min=1e-4) ** (step / _RATIOS)
        scale = scale / (scale.max() * scale.min()).sqrt()
        loss = 0.0
        for weight in weights:
            check()
            loss += _loss(weight, inputs, scale, group)
        if loss < best:
            best, chosen = loss, scale
    return chosen


def _loss(weight: Tensor, inputs: Tensor, scale: Tensor, group: int) -> float:
    """The squared change of the products."""
    divided, total = inputs / scale, 0.0
    for part in weight.split(max(1, _SLICE // weight.shape[1])):
        scaled = part * scale
        total += float((divided @ (_nearest(scaled.reshape(-1, group)).reshape(part.shape) - scaled).T).square_().sum())
    return total


def clipped(weight: Tensor, inputs: Tensor, group: int, check: Callable[[], None] = lambda: None) -> Tensor:
    """The matrix with each group's largest weights cut to the range that errs least on the inputs.

    Args:
        weight: float32 (out, in). inputs: float32 (rows, in), as the matrix gets them, in no order: the first are taken.
        check: called between pieces of the matrix; raises to stop.
    """
    out, width = weight.shape
    x = inputs[:_CLIP_ROWS].reshape(-1, width // group, group)
    x = x.transpose(0, 1)  # (groups, rows, group)
    made = torch.empty_like(weight)
    size = max(1, _SLICE // width)
    for start in range(0, out, size):
        check()
        part = weight[start : start + size].reshape(-1, width // group, group)
        whole = part.abs().amax(2, keepdim=True)
        best, chosen = torch.full_like(whole, torch.inf), whole
        for step in range(_CLIPS):
            most = whole * (1 - (1 - _SMALLEST_CLIP) * step / _CLIPS)
            change = _nearest(part.clamp(-most, most).reshape(-1, group)).reshape(part.shape).sub_(part)
            error = torch.bmm(x, change.permute(1, 2, 0)).square_().mean(1).T[:, :, None]  # of (groups, rows, out)
            better = error < best
            best = torch.where(better, error, best)
            chosen = torch.where(better, most, chosen)
        made[start : start + size] = part.clamp(-chosen, chosen).reshape(-1, width)
    return made


def _grid(rows: Tensor) -> tuple[Tensor, Tensor]:
    """For each row the scale, float16, and the zero of a grid of 16 that spans it and 0."""
    high, low = rows.amax(-1).clamp(min=0), rows.amin(-1).clamp(max=0)
    scale = ((high - low) / _MOST).to(torch.float16).clamp(min=2.0**-24)
    return scale, (-low / scale.float()).round_().clamp_(0, _MOST)


def _nearest(rows: Tensor) -> Tensor:
    """Rows (n, group), each to the nearest of its grid."""
    scale, zero = _grid(rows)
    wide, zero = scale.float()[:, None], zero[:, None]
    return (rows / wide).round_().add_(zero).clamp_(0, _MOST).sub_(zero).mul_(wide)


def round_to_grid(weight: Tensor, group: int) -> Rounded:
    """A matrix (out, in) to the nearest of each group's grid of 16 with a zero point. Scales are float16 before codes are chosen."""
    out, width = weight.shape
    rows = weight.float().reshape(out, -1, group)
    scale, zero = _grid(rows)
    codes = (rows / scale.float()[:, :, None]).round_().add_(zero[:, :, None]).clamp_(0, _MOST)
    owner = torch.arange(width, device=weight.device, dtype=torch.int32) // group
    return Rounded(codes.to(torch.uint8).reshape(out, width), scale, zero.to(torch.uint8), owner)
