"""A layer packed by HQQ: by what its weights say, without a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from app.adapters import hqq_quantize, packed_write
from app.adapters.layer_inputs_torch import Matrix
from app.adapters.quantized_layer import LayerResult, MatrixResult


@torch.no_grad()
def pack(
    matrices: Sequence[Matrix], *, bits: int, group: int, check: Callable[[], None], done: Callable[[float], None]
) -> LayerResult:
    """Pack a layer's matrices.

    Args:
        matrices: of the layer. bits, group: see `hqq_quantize.quantize`.
        check: called between matrices; raises to stop. done: told how much of the layer is done, 0 to 1.

    Raises:
        WeftError: BAD_INPUT for numbers that 16-bit scales cannot hold.
    """
    found: dict[str, MatrixResult] = {}
    for number, matrix in enumerate(matrices):
        check()
        weight = matrix.weight.float()
        made = hqq_quantize.quantize(weight, bits, group)
        error = float((made.weight() - weight).norm())
        found[matrix.name] = MatrixResult(packed_write.hqq(made), error, float(weight.norm()))
        done((number + 1) / len(matrices))
    return LayerResult(found)
