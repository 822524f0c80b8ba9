"""What quantizing a layer has made."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class MatrixResult(NamedTuple):
    """A quantized matrix.

    Attributes:
        parts: its tensors as the files have them, by the last part of their names.
        error: Frobenius norm of what rounding changed, size: of the matrix, both as before any scales were put in.
    """

    parts: dict[str, Tensor]
    error: float
    size: float


class LayerResult(NamedTuple):
    """A quantized layer.

    Attributes:
        matrices: by name inside the layer. changed: other parameters that took scales up, float32, likewise.
        unseen: experts' matrices that no token of the text came to: they are rounded plainly.
        left: names of matrices whose layer does not call them as modules: what they read is not known, and they stay as they are.
    """

    matrices: dict[str, MatrixResult]
    changed: dict[str, Tensor] = {}  # never written to
    unseen: int = 0
    left: tuple[str, ...] = ()
