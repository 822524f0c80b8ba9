"""What quantizing a model has changed in its matrices, measured on the files that it made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.adapters.merge_files import TORCH_NAMES, BaseFiles
from app.adapters.merge_packed_torch import PackedFiles


def loss_note(
    made: list[Path],
    table: Mapping[str, Any],
    model_type: str,
    wanted: BaseFiles,
    base: BaseFiles | None,
    check: Callable[[], None],
) -> str:
    """A sentence on it.

    Args:
        made: weight files of the quantized model. table: its quantization_config.
        wanted: of the 16-bit model that went in. base: of the model before adapters were merged in; None where none were.
        check: called between matrices; raises to stop.

    Raises:
        WeftError: CORRUPT, UNSUPPORTED when the files cannot be read as Weft's loaders read them.
    """
    losses: list[float] = []
    shares: list[float] = []
    with PackedFiles(made, table, model_type, "float32") as packed:
        for name in [tensor.name for tensor in packed.tensors.values() if tensor.offset < 0]:
            check()
            if name not in wanted.tensors:
                continue  # stacked otherwise in the 16-bit files
            value = _float(wanted, name)
            error = float((_float(packed, name) - value).norm())
            losses.append(error / max(float(value.norm()), 1e-30))
            if base is not None and name in base.tensors:
                change = float((value - _float(base, name)).norm())
                shares += [error / change] if change > 1e-6 * float(value.norm()) else []
    if not losses:
        return ""
    worst, mean = max(losses), sum(losses) / len(losses)
    said = (
        f"The {len(losses)} matrices differ from 16 bits by {mean:.1%} of their size on average, {worst:.1%} at worst"
    )
    if not shares:
        return f"{said}. What that does to answers the certificate tells."
    ratio = sum(shares) / len(shares)
    much = f"{ratio:.1f} times" if ratio >= 1 else f"{ratio:.0%} of"
    return f"{said}: {much} what the adapters changed in them. What that does to answers the certificate tells."


def _float(files: BaseFiles, name: str) -> Tensor:
    """A tensor as float32."""
    stored = files.tensors[name]
    data = bytearray(stored.bytes)
    files.read(stored, 0, memoryview(data))
    return torch.frombuffer(data, dtype=getattr(torch, TORCH_NAMES[stored.dtype])).reshape(stored.shape).float()
