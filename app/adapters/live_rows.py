"""Rows of a batch under stacks of their own: what cannot be a row of a live stack's scales, and weights as matrices.

Low-rank pairs, gains, whole matrices and trained tokens are scaled by row where they are computed (`live_site.py`). Biases are
added to what their module gives; other small parameters (norms, routers) are put into their module row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from app.adapters.base_torch import kind_of
from app.adapters.live_parameters import Written


class RowPatch:
    """A module that answers for rows with parameters of their own, around whatever `forward` it has now."""

    def __init__(self, module: Any, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        self._module = module
        self._own = "forward" in module.__dict__
        self._previous = module.forward
        module.forward = wrap(self._previous)

    def remove(self) -> None:
        if self._own:
            self._module.forward = self._previous
        else:
            del self._module.forward


def cannot(name: str, written: Written) -> str:
    """Why a parameter cannot differ from row to row, in a sentence; "" when it can."""
    if len(written.shape) > 2:
        return "Experts take one stack at a time, so the rows were answered one after the other."
    if written.name != "bias" and any(True for _ in written.module.children()):
        return f"{name} takes one stack at a time, so the rows were answered one after the other."
    return ""


def patches(
    written: Sequence[Written], rows: Sequence[Mapping[str, float]]
) -> list[tuple[Any, Callable[[Callable[..., Any]], Callable[..., Any]]]]:
    """What to put around the modules of parameters that differ from row to row: (module, wrapper).

    Parameters on which all rows agree are written, as for a single run.
    """
    found: list[tuple[Any, Callable[[Callable[..., Any]], Callable[..., Any]]]] = []
    swapped: dict[int, tuple[Any, dict[str, list[Tensor]]]] = {}
    for one in written:
        if agree(one, rows):
            one.write(rows[0])
            continue
        one.restore()
        if one.name == "bias" and kind_of(one.module) in ("linear", "conv1d"):
            found.append((one.module, _adding(torch.stack([one.difference(row) for row in rows]))))
        else:
            values = swapped.setdefault(id(one.module), (one.module, {}))[1]
            values[one.name] = [one.value(row) for row in rows]
    return found + [(module, _swapping(module, values, len(rows))) for module, values in swapped.values()]


def agree(written: Written, rows: Sequence[Mapping[str, float]]) -> bool:
    """Whether a parameter is the same for all rows."""
    first, *others = ({key: row.get(key) or 0.0 for key in written.changes} for row in rows)
    return all(other == first for other in others)


def by_rows(run: Callable[[Tensor], Tensor], batch: int) -> Callable[[Tensor], Tensor]:
    """Let a module that is given all tokens of all rows in one dimension see the rows."""

    def forward(x: Tensor) -> Tensor:
        if x.dim() > 2:
            return run(x)
        y = run(x.reshape(batch, -1, x.shape[-1]))
        return y.flatten(0, 1)

    return forward


def _adding(differences: Tensor) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add to a module's output. Differences (rows, out), float32."""
    batch = len(differences)

    def wrap(previous: Callable[..., Any]) -> Callable[..., Any]:
        def forward(x: Tensor) -> Tensor:
            y = previous(x)
            more = differences.to(y.device)
            if y.dim() > 2:
                return (y + more.view(batch, *[1] * (y.dim() - 2), -1)).to(y.dtype)
            return (y.reshape(batch, -1, y.shape[-1]) + more[:, None]).to(y.dtype).flatten(0, 1)

        return forward

    return wrap


def _swapping(
    module: Any, values: Mapping[str, list[Tensor]], batch: int
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Run a module once for each row, with that row's parameters."""

    def part(value: Any, row: int) -> Any:
        if not isinstance(value, Tensor) or not value.dim() or value.shape[0] % batch:
            return value
        return value.chunk(batch)[row]

    def wrap(previous: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*inputs: Any, **named: Any) -> Any:
            held = {name: module._parameters[name] for name in values}
            outputs: list[Any] = []
            try:
                for row in range(batch):
                    module._parameters.update({name: of_rows[row] for name, of_rows in values.items()})
                    ours = {name: part(value, row) for name, value in named.items()}
                    outputs.append(previous(*(part(value, row) for value in inputs), **ours))
            finally:
                module._parameters.update(held)
            return _joined(outputs)

        return forward

    return wrap


def _joined(outputs: list[Any]) -> Any:
    if isinstance(outputs[0], tuple):
        return tuple(_joined(list(parts)) for parts in zip(*outputs, strict=True))
    return torch.cat(outputs) if isinstance(outputs[0], Tensor) else outputs[0]
