"""Where a layer lets a scale of its matrices' inputs be taken off again, found by trying: no table of architectures.

AWQ multiplies a matrix's columns by s and divides what comes to it by s. What comes to it must take that: the weight of a norm
before it, or the rows of a matrix before it. Whether a place does is asked of the layer itself: a random s of powers of two is put
in, and the layer's output must stay the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from app.adapters.layer_inputs_torch import Heard, Matrix, hear, parent_of, pattern_of, rows_of, same

_EQUAL = 1e-3  # of what the layer adds to its input: float32's roundings stay far below, a wrong place far above


class Fold(NamedTuple):
    """A scale's two ends.

    Attributes:
        source: the name of the norm, or of the matrix, that is divided. shifted: the norm multiplies by 1 + weight.
        rows: the matrix whose last rows are divided; None for a norm.
        targets: matrices whose columns are multiplied; all read the same input. others: modules beside them that stay as they are
            (a mixture's router), and must be multiplied too.
    """

    source: str
    module: Any
    shifted: bool
    rows: Matrix | None
    targets: list[Matrix]
    others: list[tuple[str, Any]]


def find_folds(layer: Any, matrices: Sequence[Matrix]) -> tuple[list[Fold], Heard]:
    """All of a layer's. layer: a LayerPass. Returns also what was heard of the layer as it is."""
    modules = {name: module for name, module in layer.module.named_modules() if _own_weight(module) is not None}
    heard = hear(layer, modules)
    norms = {name: m for name, m in modules.items() if m.weight.dim() == 1 and name in heard.outputs}
    found: list[Fold] = []
    fed: set[str] = set()
    for name, module in norms.items():
        fold = _norm_fold(layer, name, module, modules, matrices, heard)
        if fold is not None and not fed & {t.name for t in fold.targets}:
            found.append(fold)
            fed |= {t.name for t in fold.targets}
    kinds: dict[str, str | None] = {}  # pattern of a target: last part of its source's name
    order = {name: number for number, name in enumerate(heard.inputs)}
    for matrix in sorted(matrices, key=lambda m: order.get(m.name, len(order))):
        if matrix.name in fed:
            continue
        sharing = [m for m in matrices if m.name == matrix.name or _shares(m, matrix, heard)]
        if len(sharing) > 1:
            continue  # read by several, and no norm before them
        if matrix.pattern not in kinds and matrix.name in heard.inputs:
            kinds[matrix.pattern] = _row_source(layer, matrix, matrices, heard)
        source = kinds.get(matrix.pattern)
        beside = next((m for m in matrices if source and m.name == f"{parent_of(matrix.name)}.{source}"), None)
        if beside is not None:
            found.append(Fold(beside.name, beside.module, False, beside, [matrix], []))
    return found, heard


def _own_weight(module: Any) -> Tensor | None:
    found = module._parameters.get("weight") if hasattr(module, "_parameters") else None
    return found if isinstance(found, Tensor) else None


def _shares(a: Matrix, b: Matrix, heard: Heard) -> bool:
    return a.name in heard.inputs and b.name in heard.inputs and same(heard.inputs[a.name], heard.inputs[b.name])


def _norm_fold(
    layer: Any, name: str, module: Any, modules: dict[str, Any], matrices: Sequence[Matrix], heard: Heard
) -> Fold | None:
    made = heard.outputs[name]
    if made.shape[-1] != module.weight.shape[0]:
        return None
    rows = {bytes(row.numpy()) for row in rows_of(made).cpu()}
    norms = [n for n in heard.outputs if n in modules and modules[n].weight.dim() == 1]
    patterns: set[str] = set()
    for n, x in heard.inputs.items():
        whole = [norm for norm in norms if norm != n and same(x, heard.outputs[norm])]
        # Some rows of it: an expert's. Two norms may make the same numbers, but not in the same place.
        if name in whole or (not whole and n != name and _some_rows(x, rows)):
            patterns.add(pattern_of(n))
    targets = [m for m in matrices if m.pattern in patterns]
    names = {m.name for m in targets}
    others = [
        (n, m) for n, m in modules.items() if pattern_of(n) in patterns and n not in names and m.weight.dim() == 2
    ]
    if not targets or any(m.weight.shape[-1] != made.shape[-1] for _, m in others):
        return None
    for shifted in (False, True):
        fold = Fold(name, module, shifted, None, targets, others)
        if _holds(layer, fold, heard):
            return fold
    return None


def _some_rows(x: Tensor, rows: set[bytes]) -> bool:
    """Whether an input is made of an output's rows. rows: their bytes."""
    parts = rows_of(x).cpu()
    return len(parts) > 0 and all(bytes(part.numpy()) in rows for part in parts)


def _row_source(layer: Any, target: Matrix, matrices: Sequence[Matrix], heard: Heard) -> str | None:
    """The last part of the name of the matrix beside `target` whose rows can be divided; the nearest before it."""
    order = list(heard.inputs)
    before = order[: order.index(target.name)]
    for candidate in sorted(matrices, key=lambda m: before.index(m.name) if m.name in before else -1, reverse=True):
        if candidate.name not in before or parent_of(candidate.name) != parent_of(target.name):
            continue
        if candidate.weight.shape[0] < target.weight.shape[1]:
            continue
        fold = Fold(candidate.name, candidate.module, False, candidate, [target], [])
        if _holds(layer, fold, heard):
            return candidate.name.rpartition(".")[2]
    return None


def _holds(layer: Any, fold: Fold, heard: Heard) -> bool:
    """Whether the layer's output stays the same with a scale put in. The scale is taken out again."""
    width = fold.targets[0].weight.shape[1]
    generator = torch.Generator().manual_seed(width)
    scale = 2.0 ** torch.randint(-1, 2, (width,), generator=generator).float().to(layer.device)
    kept: Tensor | None = fold.module.weight.data.clone() if fold.rows is None else None
    effective = apply(fold, scale)
    try:
        tried = hear(layer, {t.name: t.module for t in fold.targets})
    finally:
        apply(fold, 1 / effective)  # exact for powers of two; a norm of 1 + weight leaves a last bit
        if kept is not None:
            fold.module.weight.data.copy_(kept)
    added = (heard.made - heard.taken).norm().clamp(min=1e-20)
    close = (tried.made - heard.made).norm() <= _EQUAL * added
    for target in fold.targets:
        if target.name in tried.outputs and target.name in heard.outputs:
            a, b = tried.outputs[target.name], heard.outputs[target.name]
            close = close and a.shape == b.shape and (a - b).norm() <= _EQUAL * b.norm().clamp(min=1e-20)
    return bool(close)


def apply(fold: Fold, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Put a scale in.

    Args:
        scale: float32 (in of the targets,). dtype: in which a norm's weight is stored: the scale is what rounding it leaves.

    Returns:
        The scale that was put in.
    """
    if fold.rows is None:
        weight = fold.module.weight.data
        shift = 1.0 if fold.shifted else 0.0
        new = ((weight + shift) / scale - shift).to(dtype).float()
        usable = (weight + shift != 0) & (new + shift != 0) & new.isfinite()
        scale = torch.where(usable, (weight + shift) / (new + shift), torch.ones_like(scale))
        weight.copy_(torch.where(usable, new, weight))
    else:
        fold.rows.weight[-len(scale) :] /= scale[:, None]
    bias: Any = getattr(fold.module, "bias", None)
    if isinstance(bias, Tensor):
        bias.data[-len(scale) :] /= scale
    for target in fold.targets:
        target.weight.mul_(scale)
    for _, module in fold.others:
        module.weight.data.mul_(scale)
    return scale
