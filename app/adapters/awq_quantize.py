"""AWQ: matrices in 4 bits with a zero point, their inputs scaled so that the columns which matter most are rounded least.

Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration": a scale an input channel, which what
comes before takes off again; searched on the layer's real inputs; then the range that errs least for each group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from app.adapters.gptq_quantize import Rounded

BITS = 4
_MOST = (1 << BITS) - 1
_RATIOS = 20  # exponents tried between 0 and 1
_CLIPS, _SMALLEST_CLIP = 10, 0.5  # ranges tried for a group: 1 to 0.5 of the whole, in steps of 0.05
_CLIP_ROWS = 256  # inputs that ranges are tried on
_SLICE = 64 * 1024 * 1024  # numbers of an intermediate result


def best_scales(weights: list[Tensor], inputs: Tensor, size: Tensor, group: int) -> Tensor:
    """The scale of each input channel under which rounding changes what the matrices make of the inputs least.

    Args:
        weights: float32 (out_i, in) each; they read the same input. inputs: float32 (rows, in), a part of it.
        size: float32 (in,), the mean |x| over all of it. group: inputs that share a scale.

    Returns:
        float32 (in,); ones where no scale is better than none.
    """
    wanted = [inputs @ weight.T for weight in weights]
    best, chosen = torch.inf, torch.ones_like(size)
    for step in range(_RATIOS):
        scale = size.clamp(min=1e-4) ** (step / _RATIOS)
        scale = scale / (scale.max() * scale.min()).sqrt()
        loss = 0.0
        for weight, made in zip(weights, wanted, strict=True):
            rounded = round_to_grid(weight * scale, group).weight() / scale
            loss += float((inputs @ rounded.T - made).square_().sum())
        if loss < best:
            best, chosen = loss, scale
    return chosen


def clipped(weight: Tensor, inputs: Tensor, group: int) -> Tensor:
    """The matrix with each group's largest weights cut to the range that errs least on the inputs.

    Args:
        weight: float32 (out, in). inputs: float32 (rows, in), as the matrix gets them.
    """
    out, width = weight.shape
    x = inputs[:: max(1, len(inputs) // _CLIP_ROWS)][:_CLIP_ROWS].reshape(-1, width // group, group)
    made = torch.empty_like(weight)
    rows = max(1, _SLICE // (x.shape[0] * x.shape[1]))
    for start in range(0, out, rows):
        part = weight[start : start + rows].reshape(-1, width // group, group)
        wanted = torch.einsum("tgi,ogi->otg", x, part)
        whole = part.abs().amax(2, keepdim=True)
        best, chosen = torch.full_like(whole, torch.inf), whole
        for step in range(_CLIPS):
            most = whole * (1 - (1 - _SMALLEST_CLIP) * step / _CLIPS)
            cut = part.clamp(-most, most)
            rounded = round_to_grid(cut.reshape(-1, width), group).weight().reshape(part.shape)
            error = (torch.einsum("tgi,ogi->otg", x, rounded) - wanted).square_().mean(1)[:, :, None]
            better = error < best
            best = torch.where(better, error, best)
            chosen = torch.where(better, most, chosen)
        made[start : start + rows] = part.clamp(-chosen, chosen).reshape(-1, width)
    return made


def round_to_grid(weight: Tensor, group: int) -> Rounded:
    """A matrix (out, in) to the nearest of each group's grid of 16 with a zero point. Scales are float16 before codes are chosen."""
    out, width = weight.shape
    rows = weight.float().reshape(out, -1, group)
    high, low = rows.amax(2).clamp(min=0), rows.amin(2).clamp(max=0)
    scale = ((high - low) / _MOST).to(torch.float16).clamp(min=2.0**-24)
    wide = scale.float()
    zero = (-low / wide).round().clamp(0, _MOST)
    codes = (rows / wide[:, :, None]).round_().add_(zero[:, :, None]).clamp_(0, _MOST)
    owner = torch.arange(width, device=weight.device, dtype=torch.int32) // group
    return Rounded(codes.to(torch.uint8).reshape(out, width), scale, zero.to(torch.uint8), owner)
