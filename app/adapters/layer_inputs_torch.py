"""Which matrices of a layer read the same input, and in which order they are computed: seen by running it once. Needs torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from app.adapters.layer_walk_torch import LayerPass, first

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class Matrix(NamedTuple):
    """A matrix that is to be quantized, as (out, in).

    Attributes:
        name: of its module, inside the layer. module: a `torch.nn.Linear`, or GPT-2's Conv1D, which is `transposed`.
    """

    name: str
    module: Any
    transposed: bool

    @property
    def weight(self) -> Tensor:
        """(out, in), a view: what is written to it the module has."""
        return self.module.weight.data.T if self.transposed else self.module.weight.data

    @property
    def is_expert(self) -> bool:
        """Whether it is one of a mixture's experts."""
        return "#" in self.pattern

    @property
    def pattern(self) -> str:
        """Its name with `#` for the number of an expert: experts are treated alike."""
        return pattern_of(self.name)


def pattern_of(name: str) -> str:
    """A module's name inside a layer, with `#` for numbers."""
    return _NUMBER.sub("#", f".{name}.")[1:-1]


def parent_of(name: str) -> str:
    return name.rpartition(".")[0]


class Heard(NamedTuple):
    """What one run of a layer has shown. Tensors are held, so that no two share an address.

    Attributes:
        inputs: of each module that was run, by name, in the order of the runs. outputs: likewise.
        made: the layer's own output. taken: its input.
    """

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    made: Tensor
    taken: Tensor


def hear(layer: LayerPass, modules: Mapping[str, Any]) -> Heard:
    """Run a layer on its first piece and hear what comes to its modules, and from them."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def heard(_module: Any, args: tuple[Any, ...], made: Any) -> None:
            if args and isinstance(args[0], Tensor):
                inputs.setdefault(name, args[0])
            if isinstance(made, Tensor):
                outputs.setdefault(name, made)

        return heard

    hooks = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        made = first(layer.forward(layer.states[0]))
    finally:
        for each in hooks:
            each.remove()
    return Heard(inputs, outputs, made, layer.states[0].to(made))


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same numbers in the same place."""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape


class Sharing(NamedTuple):
    """Matrices that read the same input.

    Attributes:
        leader: the first of them: what is heard at it holds for all. members: all, the leader first.
    """

    leader: Matrix
    members: list[Matrix]


def stages(matrices: Iterable[Matrix], heard: Heard) -> list[list[Sharing]]:
    """The matrices in the order in which a layer comes to them; those of a stage do not depend on one another.

    A mixture's experts are of one stage, whichever of them the piece went to.
    """
    matrices = list(matrices)
    order = {name: number for number, name in enumerate(heard.inputs)}
    first_run: dict[str, int] = {}
    for matrix in matrices:
        at = order.get(matrix.name, len(order))
        first_run[matrix.pattern] = min(at, first_run.get(matrix.pattern, at))
    leaders = _leaders(matrices, heard, first_run)
    found: dict[str, dict[str, Sharing]] = {}
    for matrix in sorted(matrices, key=lambda m: first_run[m.pattern]):
        leader = leaders[matrix.pattern]
        name = matrix.name if leader == matrix.pattern else f"{parent_of(matrix.name)}.{leader.rpartition('.')[2]}"
        sharing = found.setdefault(leader, {})
        if name in sharing:
            sharing[name].members.append(matrix)
        else:
            sharing[name] = Sharing(matrix, [matrix])
    return [list(each.values()) for each in found.values()]


def _leaders(matrices: list[Matrix], heard: Heard, first_run: Mapping[str, int]) -> dict[str, str]:
    """For each pattern the pattern, beside it in the layer, that reads the same input first."""
    by_pattern: dict[str, Matrix] = {}
    for matrix in matrices:
        if matrix.name in heard.inputs:
            by_pattern.setdefault(matrix.pattern, matrix)
    leaders = {matrix.pattern: matrix.pattern for matrix in matrices}
    for pattern, matrix in sorted(by_pattern.items(), key=lambda item: first_run[item[0]]):
        for other in sorted(by_pattern, key=lambda name: first_run[name]):
            beside = f"{parent_of(matrix.name)}.{other.rpartition('.')[2]}"
            if parent_of(other) != parent_of(pattern) or beside not in heard.inputs or leaders[other] != other:
                continue
            if same(heard.inputs[beside], heard.inputs[matrix.name]):
                leaders[pattern] = other
                break
    return leaders


def rows_of(inputs: Tensor) -> Tensor:
    """An input as (tokens, in), float32."""
    return inputs.detach().reshape(-1, inputs.shape[-1]).float()
