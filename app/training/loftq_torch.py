"""LoftQ: low-rank factors that take up what quantization loses (Li and others, 2023). On any device.

PEFT's own functions run on CUDA alone and ignore the adapter's scale; the arithmetic here is theirs (alternate quantization and
a truncated SVD), held to them by test where there is a card. All matrices are (out, in); the caller divides B by the scale.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from app.core.errors import ErrorKind, WeftError


def decompose(
    weight: torch.Tensor, bits: int, rank: int, iterations: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Q, A, B with weight ≈ Q + B·A, Q being a quantized matrix (4: nf4 in blocks of 64; 8: int8 by rows). All float32."""
    weight = weight.detach().float()
    quantized = _rounded(weight, bits)
    a, b = low_rank(weight - quantized, rank)
    for _ in range(iterations - 1):
        quantized = _rounded(weight - b @ a, bits)
        a, b = low_rank(weight - quantized, rank)
    return quantized, a, b


def replace(base: Any, original: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of one LoftQ step for a base that bitsandbytes holds in 4 bits, from its original weight."""
    import bitsandbytes.functional as functional

    held = functional.dequantize_4bit(base.weight.data, base.weight.quant_state).float()
    return low_rank(original.to(held) - held, rank)


def low_rank(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A (rank, in) and B (out, rank): the nearest product of that rank, its singular values shared evenly."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    roots = values[:rank].sqrt()
    a, b = roots[:, None] * right[:rank], left[:, :rank] * roots
    missing = rank - len(roots)
    if missing > 0:  # a matrix smaller than the rank: the rest stays without effect
        a = torch.cat([a, a.new_zeros(missing, a.shape[1])])
        b = torch.cat([b, b.new_zeros(b.shape[0], missing)], 1)
    return a, b


def _rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """What a quantization makes of the matrix, in float32."""
    if bits == 8:
        scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        return (weight / scale).round().clamp(-127, 127) * scale
    try:
        import bitsandbytes.functional as functional
    except ImportError as error:
        raise WeftError(
            ErrorKind.ENVIRONMENT,
            "LoftQ needs bitsandbytes, which is not installed.",
            "Repair the environment in the settings.",
        ) from error
    packed, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=64, compress_statistics=False, quant_type="nf4"
    )
    return functional.dequantize_4bit(packed, state).float()


def original_weight(files: list[Path], module: str) -> torch.Tensor:
    """A module's weight (out, in) from the base's safetensors files.

    Raises:
        WeftError: UNSUPPORTED when the base is no safetensors model, or names it otherwise.
    """
    from safetensors import safe_open

    tail = f"{module}.weight"
    for path in files:
        if path.suffix != ".safetensors":
            break
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                if key == tail or tail.endswith("." + key) or key.endswith("." + tail):
                    return file.get_tensor(key)
    raise WeftError(
        ErrorKind.UNSUPPORTED,
        f"loftq_replace does not find {tail} in the model's safetensors files.",
        'Use init = "eva" or "default", or a safetensors model.',
    )
