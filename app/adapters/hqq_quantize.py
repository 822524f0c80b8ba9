"""Half-quadratic quantization (HQQ): a matrix onto a grid without any text, by what its own weights say.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023): scales span each group's smallest and largest weight;
zeros are then moved so that the sum of |W − Wᵣ|ᵖ, p < 1, becomes small, which lets outliers be. Half-quadratic splitting makes that two steps
in turns: a shrinkage of the error, and a mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from app.adapters.packed_grid import Grid

BITS = (8, 4, 3, 2, 1)
GROUP = 64
_POWER, _BETA, _GROWTH, _TURNS = 0.7, 10.0, 1.01, 20  # as the paper has them
_LARGEST_STEP = 2e4  # of 1 / scale, so that 16-bit floats hold it


@torch.no_grad()
def quantize(weight: Tensor, bits: int, group: int = GROUP) -> Grid:
    """Put a matrix onto a grid of 2**bits levels.

    Args:
        weight: (out, in), any float. group: weights along the inputs that share a scale; has to divide their number.

    Returns:
        A grid whose scales and zeros are float16.
    """
    out, inputs = weight.shape
    values = weight.reshape(-1, group).float()
    most = (1 << bits) - 1
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    span = high - low
    step = torch.where(span > 1e-4, most / span.clamp_min(1e-12), 1.0).clamp_max(_LARGEST_STEP)  # 1 / scale
    zero = -low * step
    zero = _moved(values, step, zero, most)
    scale, zero = (1 / step).half(), zero.half()
    codes = (values / scale.float() + zero.float()).round_().clamp_(0, most).to(torch.uint8)
    return Grid(codes, scale, zero, (out, inputs), bits)


def _moved(values: Tensor, step: Tensor, zero: Tensor, most: int) -> Tensor:
    """Zeros of the smallest error that was met."""
    best, found, beta = torch.inf, zero, _BETA
    for _ in range(_TURNS):
        codes = (values * step + zero).round_().clamp_(0, most)
        error = values - (codes - zero) / step
        size = float(error.abs().mean())
        if size >= best:
            break
        best, found = size, zero
        magnitude = error.abs()
        shrunk = error.sign() * (magnitude - magnitude.clamp_min(1e-12).pow(_POWER - 1) / beta).clamp_min_(0)
        zero = (codes - (values - shrunk) * step).mean(1, keepdim=True)
        beta *= _GROWTH
    return found
