"""Half-quadratic quantization (HQQ): a matrix onto a grid without any text, by what its own weights say.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023): scales span each group's smallest and largest weight;
zeros are then moved so that the sum of |W − Wᵣ|ᵖ, p < 1, becomes small, which lets outliers be. Half-quadratic splitting makes that two steps
in turns: a shrinkage of the error, and a mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from app.adapters.packed_grid import Grid
from app.core.errors import ErrorKind, WeftError

BITS = (8, 4, 3, 2, 1)
GROUP = 64
_POWER, _BETA, _GROWTH, _TURNS = 0.7, 10.0, 1.01, 20  # as the paper has them
_PIECE = 1 << 17  # weights that are worked on at a time: what a processor's cache holds
_LARGEST_STEP = 2e4  # of 1 / scale, so that 16-bit floats hold it
_LARGEST_ZERO = 6e4  # before it is moved by some codes: 16-bit floats end at 65504


@torch.no_grad()
def quantize(weight: Tensor, bits: int, group: int = GROUP) -> Grid:
    """Put a matrix onto a grid of 2**bits levels.

    Args:
        weight: (out, in), any float. group: weights along the inputs that share a scale; has to divide their number.

    Returns:
        A grid whose scales and zeros are float16.

    Raises:
        WeftError: BAD_INPUT when 16-bit floats cannot hold them.
    """
    values = weight.reshape(-1, group)
    codes = torch.empty(values.shape, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(len(values), 1, dtype=torch.float16, device=weight.device)
    zero = torch.empty_like(scale)
    rows = max(1, (_PIECE if weight.device.type == "cpu" else weight.numel()) // group)
    for start in range(0, len(values), rows):
        part = slice(start, start + rows)
        codes[part], scale[part], zero[part] = _some(values[part].float(), (1 << bits) - 1)
    if not bool(scale.isfinite().all() and zero.isfinite().all()):
        raise WeftError(
            ErrorKind.BAD_INPUT,
            "HQQ cannot pack this model: a matrix of it holds numbers that are not finite, or too large for 16-bit scales.",
            "Load it without load_in_hqq. If its answers are no text then either, download it again.",
        )
    return Grid(codes, scale, zero, (weight.shape[0], weight.shape[1]), bits)


def _some(values: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (groups, group), scales and zeros (groups, 1) of some groups."""
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    span = high - low
    step = torch.where(span > 1e-4, most / span.clamp_min(1e-12), 1.0).clamp_max(_LARGEST_STEP)  # 1 / scale
    step = torch.minimum(step, _LARGEST_ZERO / low.abs().clamp_min(1.0))  # a group far from 0 that hardly varies
    scale = (1 / step).half()
    zero = _moved(values, 1 / scale.float(), -low * step, most).half()
    codes = torch.addcmul(zero.float(), values, 1 / scale.float()).round_().clamp_(0, most)
    return codes.to(torch.uint8), scale, zero


def _moved(values: Tensor, step: Tensor, zero: Tensor, most: int) -> Tensor:
    """Zeros of the smallest error that was met."""
    best, found, beta = torch.inf, zero, _BETA
    scaled, scale = values * step, 1 / step
    for _ in range(_TURNS):
        codes = (scaled + zero).round_().clamp_(0, most)
        error = torch.addcmul(values, codes - zero, scale, value=-1)
        magnitude = error.abs()
        size = float(magnitude.mean())
        if size >= best:
            break
        best, found = size, zero
        shrunk = (
            magnitude.sub_(magnitude.clamp_min(1e-12).pow_(_POWER - 1), alpha=1 / beta).clamp_min_(0).copysign_(error)
        )
        zero = (codes - torch.addcmul(scaled, shrunk, step, value=-1)).mean(1, keepdim=True)
        beta *= _GROWTH
    return found
