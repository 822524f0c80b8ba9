"""What quantizing a model has changed in its matrices, in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from app.adapters.merge_files import BaseFiles
from app.adapters.quantize_model_torch import read_tensor
from app.adapters.quantized_folder import MatrixLoss


def loss_note(
    losses: Sequence[MatrixLoss],
    wanted: BaseFiles,
    base: BaseFiles | None,
    check: Callable[[], None],
    of: str = "16 bits",
) -> str:
    """A sentence on it.

    Args:
        losses: of all matrices.
        wanted: the 16-bit model that was quantized. base: the model before adapters were merged in; None where none were.
        check: called between matrices; raises to stop. of: what the matrices were, in words.
    """
    shares: list[float] = []
    for name, error, size in losses:
        check()
        name = f"{name}.weight"
        if base is None or name not in base.tensors or name not in wanted.tensors:
            continue  # stacked otherwise in the base's files
        change = float((read_tensor(wanted, name).float() - read_tensor(base, name).float()).norm())
        shares += [error / change] if change > 1e-6 * size else []
    parts = [error / max(size, 1e-30) for _, error, size in losses]
    mean, worst = sum(parts) / len(parts), max(parts)
    said = f"The {len(parts)} matrices differ from {of} by {mean:.1%} of their size on average, {worst:.1%} at worst"
    if not shares:
        return f"{said}. What that does to answers the certificate tells."
    ratio = sum(shares) / len(shares)
    much = f"{ratio:.1f} times" if ratio >= 1 else f"{ratio:.0%} of"
    return f"{said}: {much} what the adapters changed in them. What that does to answers the certificate tells."
