"""How fast this machine multiplies matrices, for the estimate of a run's time. Imports torch."""

from __future__ import annotations

import time

import torch

_LEAST_SECONDS = 0.15


def products(rows: int = 512, width: int = 1024) -> float:
    """Floating-point operations a second, in the precision that `auto` trains in."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    dtype = torch.float32 if not cuda else torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if cuda:
        rows, width = 4096, 4096
    left = torch.randn(rows, width, device=device, dtype=dtype)
    right = torch.randn(width, width, device=device, dtype=dtype)
    torch.matmul(left, right)  # the first one makes room and wakes threads
    best, began = 0.0, time.perf_counter()
    while time.perf_counter() - began < _LEAST_SECONDS:
        start = time.perf_counter()
        torch.matmul(left, right)
        if cuda:
            torch.cuda.synchronize()
        best = max(best, 2.0 * rows * width * width / (time.perf_counter() - start))
    return best
