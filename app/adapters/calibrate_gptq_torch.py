"""A layer quantized by GPTQ: each matrix by the inputs that it gets when all before it in the layer are quantized already."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from app.adapters import packed_write
from app.adapters.gptq_quantize import Rounded, curvature, quantize
from app.adapters.layer_inputs_torch import Matrix, Sharing, hear, rows_of, stages
from app.adapters.layer_walk_torch import LayerPass, StopLayerError
from app.adapters.quantized_layer import LayerResult, MatrixResult

HESSIANS = 2 << 30  # bytes of them at a time, where one is not larger


def calibrate(
    layer: LayerPass,
    matrices: Sequence[Matrix],
    *,
    bits: int,
    group: int,
    by_importance: bool,
    check: Callable[[], None],
    done: Callable[[float], None],
) -> LayerResult:
    """Quantize a layer's matrices; the layer computes with what they have become, and its outputs are the next one's inputs.

    Args:
        matrices: of the layer. bits, group, by_importance: see `gptq_quantize`.
        check: called often; raises to stop. done: told how much of the layer is done, 0 to 1.
    """
    heard = hear(layer, {matrix.name: matrix.module for matrix in matrices})
    order = stages(matrices, heard)
    del heard
    found: dict[str, MatrixResult] = {}
    unseen, left = 0, list[str]()
    parts = [part for stage in order for part in _in_memory(stage)]
    for number, sharings in enumerate(parts):
        hessians = _hessians(layer, sharings, check)
        done((number + 0.5) / (len(parts) + 1))
        for sharing in sharings:
            hessian, count = hessians.pop(sharing.leader.name)
            if not count and not sharing.leader.is_expert:
                left += [matrix.name for matrix in sharing.members]
                continue
            unseen += 0 if count else len(sharing.members)
            given = curvature(hessian, group, by_importance=by_importance, check=check)
            for matrix in sharing.members:
                found[matrix.name] = put(matrix, quantize(matrix.weight, given, bits, check), bits)
        done((number + 1) / (len(parts) + 1))
    layer.advance(check)
    return LayerResult(found, {}, unseen, tuple(left))


def _in_memory(stage: Sequence[Sharing]) -> Iterator[list[Sharing]]:
    """A stage's matrices, a few at a time: a mixture has hundreds, and each has a Hessian."""
    part: list[Sharing] = []
    held = 0
    for sharing in stage:
        size = 4 * sharing.leader.weight.shape[1] ** 2
        if part and held + size > HESSIANS:
            yield part
            part, held = [], 0
        part.append(sharing)
        held += size
    yield part


def put(matrix: Matrix, made: Rounded, bits: int) -> MatrixResult:
    """Let a layer compute with a rounded matrix; says how far it is from what it was."""
    before, after = matrix.weight.float(), made.weight()
    result = MatrixResult(packed_write.gptq(made, bits), float((after - before).norm()), float(before.norm()))
    matrix.weight.copy_(after)
    return result


def _hessians(
    layer: LayerPass, sharings: Sequence[Sharing], check: Callable[[], None]
) -> dict[str, tuple[Tensor, int]]:
    """For each leader Σ x xᵀ over its inputs, float32 (in, in), and how many there were."""
    found: dict[str, tuple[Tensor, int]] = {}
    last = sharings[-1].leader.name if len(sharings) == 1 else ""

    def hook(name: str) -> Callable[..., None]:
        def heard(_module: Any, args: tuple[Any, ...]) -> None:
            rows = rows_of(args[0])
            total, count = found[name]
            found[name] = (total.addmm_(rows.T, rows), count + len(rows))
            if name == last:  # nothing further is asked of this piece
                raise StopLayerError

        return heard

    hooks: list[Any] = []
    for sharing in sharings:
        width = sharing.leader.weight.shape[1]
        found[sharing.leader.name] = (torch.zeros(width, width, device=layer.device), 0)
        hooks.append(sharing.leader.module.register_forward_pre_hook(hook(sharing.leader.name)))
    try:
        layer.hear(check)
    finally:
        for each in hooks:
            each.remove()
    return found


def resume(layer: LayerPass, matrices: Sequence[Matrix], made: Mapping[str, Tensor], check: Callable[[], None]) -> None:
    """Go through a layer that an earlier run has quantized. made: W, float32 (out, in), by the names of matrices that were."""
    for matrix in matrices:
        if matrix.name in made:
            matrix.weight.copy_(made[matrix.name])
    layer.advance(check)
