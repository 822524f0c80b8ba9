"""What quantizing a layer has made."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from app.adapters.gptq_quantize import Rounded


class MatrixResult(NamedTuple):
    """A quantized matrix. error: Frobenius norm of what rounding changed, size: of the matrix, both before any scales were put in."""

    made: Rounded
    error: float
    size: float


class LayerResult(NamedTuple):
    """A quantized layer.

    Attributes:
        matrices: by name inside the layer. changed: other parameters that took scales up, float32, likewise.
        unseen: matrices that no token of the text came to: they are rounded plainly.
    """

    matrices: dict[str, MatrixResult]
    changed: dict[str, Tensor]
    unseen: int
