"""A layer quantized by AWQ: by the inputs that its matrices get in the 16-bit model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from app.adapters import awq_folds_torch as folds
from app.adapters import packed_write
from app.adapters.awq_quantize import best_scales, clipped, round_to_grid
from app.adapters.layer_inputs_torch import Matrix, rows_of, stages
from app.adapters.layer_walk_torch import LayerPass
from app.adapters.quantized_layer import LayerResult, MatrixResult

ROWS = 512  # inputs of a matrix that scales and ranges are tried on
# What meets another matrix's outputs in a product: cutting its range shows only there (as in the authors' program).
_UNCUT = ("q_", "k_", "query", "key", "qkv", "c_attn")


class _Seen:
    """What has come to a matrix: a part of its inputs, in no order, and how large all of them are."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.parts: list[Tensor] = []
        self._chance = torch.Generator().manual_seed(width)
        self.sum = torch.zeros(width, device=device)
        self.count = 0

    def add(self, rows: Tensor, most: int) -> None:
        # From anywhere in the piece: a model's first tokens are unlike all others.
        some = torch.randperm(len(rows), generator=self._chance)[:most]
        self.parts.append(rows[some.to(rows.device)])
        self.sum += rows.abs().sum(0)
        self.count += len(rows)

    def rows(self) -> Tensor:
        if not self.parts:
            return self.sum.new_zeros(0, len(self.sum))
        rows = torch.cat(self.parts)
        return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(len(rows))).to(rows.device)]

    def size(self) -> Tensor:
        return self.sum / max(1, self.count)


def calibrate(
    layer: LayerPass,
    matrices: Sequence[Matrix],
    *,
    group: int,
    dtype: torch.dtype,
    check: Callable[[], None],
    done: Callable[[float], None],
) -> LayerResult:
    """Quantize a layer's matrices in 4 bits. The next layer's inputs are those of the 16-bit model.

    Args:
        matrices: of the layer. group: inputs that share a scale. dtype: in which the layer's other parameters are stored.
        check: called often; raises to stop. done: told how much of the layer is done, 0 to 1.
    """
    layer.use(torch.float32)  # a fold is known by its changing nothing
    places, heard = folds.find_folds(layer, matrices)
    order = stages(matrices, heard)
    leaders = {matrix.name: sharing.leader for stage in order for sharing in stage for matrix in sharing.members}
    del heard
    layer.use(layer.compute)
    done(0.1)
    norms = {fold.source: fold for fold in places if fold.rows is None}
    seen = _listen(layer, {leader.name: leader for leader in leaders.values()}, norms, check)
    done(0.4)
    layer.use(torch.float32)
    before = {matrix.name: matrix.weight.clone() for matrix in matrices}
    columns: dict[str, Tensor] = {}
    divided: dict[str, tuple[int, Tensor]] = {}
    for number, fold in enumerate(places):
        check()
        met = seen[fold.source if fold.rows is None else leaders[fold.targets[0].name].name]
        if met.count:
            # Columns are scaled once: rows that other folds divide do not change what is best for columns by much.
            weights = [target.weight for target in fold.targets]
            scale = best_scales(weights, met.rows(), met.size(), group, check)
            scale = folds.apply(fold, scale, dtype)
            columns |= {target.name: scale for target in fold.targets}
            if fold.rows is not None:
                divided[fold.source] = (len(scale), scale)
        done(0.4 + 0.3 * (number + 1) / len(places))
    found: dict[str, MatrixResult] = {}
    unseen, left = 0, list[str]()
    for number, matrix in enumerate(matrices):
        check()
        met = seen[leaders[matrix.name].name]
        if not met.count and not matrix.is_expert and matrix.name not in columns:
            left.append(matrix.name)
            continue
        unseen += not met.count
        weight = matrix.weight
        if met.count and not any(part in matrix.name.rpartition(".")[2].lower() for part in _UNCUT):
            rows = met.rows()
            weight = clipped(weight, rows / columns[matrix.name] if matrix.name in columns else rows, group, check)
        made = round_to_grid(weight, group)
        after = made.weight()
        if matrix.name in columns:
            after = after / columns[matrix.name]
        if matrix.name in divided:
            last, scale = divided[matrix.name]
            after[-last:] *= scale[:, None]
        was = before.pop(matrix.name)
        found[matrix.name] = MatrixResult(packed_write.awq(made), float((after - was).norm()), float(was.norm()))
        done(0.7 + 0.3 * (number + 1) / len(matrices))
    return LayerResult(found, _changed(places), unseen, tuple(left))


def _listen(
    layer: LayerPass, leaders: dict[str, Matrix], norms: dict[str, folds.Fold], check: Callable[[], None]
) -> dict[str, _Seen]:
    """Run the layer over the text, and hear what comes to its matrices and from its norms."""
    most = max(1, ROWS // len(layer.states))
    seen: dict[str, _Seen] = {}
    hooks: list[Any] = []

    def of_input(name: str) -> Callable[..., None]:
        def heard(_module: Any, args: tuple[Any, ...]) -> None:
            seen[name].add(rows_of(args[0]), most)

        return heard

    def of_output(name: str) -> Callable[..., None]:
        def heard(_module: Any, _args: tuple[Any, ...], made: Tensor) -> None:
            seen[name].add(rows_of(made), most)

        return heard

    for name, leader in leaders.items():
        seen[name] = _Seen(leader.weight.shape[1], layer.device)
        hooks.append(leader.module.register_forward_pre_hook(of_input(name)))
    for name, fold in norms.items():
        seen[name] = _Seen(fold.module.weight.shape[0], layer.device)
        hooks.append(fold.module.register_forward_hook(of_output(name)))
    try:
        layer.advance(check)
    finally:
        for each in hooks:
            each.remove()
    return seen


def _changed(places: Sequence[folds.Fold]) -> dict[str, Tensor]:
    """Parameters that are not quantized and took a scale up."""
    found: dict[str, Tensor] = {}
    for fold in places:
        if fold.rows is None:
            found[f"{fold.source}.weight"] = fold.module.weight.data
        if isinstance(getattr(fold.module, "bias", None), Tensor):
            found[f"{fold.source}.bias"] = fold.module.bias.data
        for name, module in fold.others:
            found[f"{name}.weight"] = module.weight.data
    return found
