"""From a stack's adapters to what each does to each parameter of a model: nothing of the tensors' data is read yet."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from app.adapters.base_torch import kind_of, sizes
from app.adapters.live_names import Names, Target
from app.adapters.merge_names_torch import Layout
from app.adapters.tensors_torch import OpenAdapter
from app.core.adapter_config import pattern_key
from app.core.adapter_file import AdaptedModule, LoraTensors
from app.core.errors import ErrorKind, WeftError
from app.core.module_names import place_of, role_of
from app.core.tensor_info import TensorInfo


class Edit(NamedTuple):
    """What one adapter does to one parameter.

    Attributes:
        adapter: its place in the stack. weight: its factor there.
        kind: `pair` (LoRA), `dora`, `whole` (another matrix in its place), `rows` (of trained tokens), `bias` (lora_bias).
        scale: s of D = s·B·A. exact: weight·s as PEFT multiplies it.
        a, b, magnitude: of a pair. value: of the other kinds.
        swapped: a and b are stored transposed (MLX).
        transposed: the parameter holds W transposed (Conv1D, embeddings), so D is.
        cast: D is rounded to the parameter's dtype before it is added, as PEFT does for embeddings and experts.
        first: the first of the parameter's outputs that it changes.
        experts: of so many experts the pair is made; 0 for one matrix. expert: the one whose it is; -1 for all.
        indices: rows of `rows`.
    """

    adapter: int
    weight: float
    kind: str
    scale: float = 1.0
    exact: float = 1.0
    a: TensorInfo | None = None
    b: TensorInfo | None = None
    magnitude: TensorInfo | None = None
    value: TensorInfo | None = None
    swapped: bool = False
    transposed: bool = False
    cast: bool = False
    first: int = 0
    experts: int = 0
    expert: int = -1
    indices: tuple[int, ...] = ()


class Edits(NamedTuple):
    """All changes of a stack.

    Attributes:
        by_parameter: in the order of the stack.
        grown: matrices with more rows than the base's, which take its place: parameter to (adapter, tensor).
        copies: an adapter's own copy of the base's embedding: parameter to edits; one counts where it differs.
        notes: sentences about what has no place in the model.
        left_out: how many modules those are.
        unmatched: modules that no name led to.
    """

    by_parameter: dict[str, list[Edit]]
    grown: dict[str, tuple[int, TensorInfo]]
    copies: dict[str, list[Edit]]
    notes: list[str]
    left_out: int
    unmatched: list[str]


def exact_scale(adapter: OpenAdapter, module: str, lora: LoraTensors, weight: float) -> float:
    """weight·alpha/rank, in the order in which PEFT computes it."""
    config = adapter.file.config
    assert lora.scale is not None  # check_usable has seen to it
    if config.factor is not None:
        return weight * config.factor
    key = pattern_key(config.alpha_pattern, module)
    alpha = config.alpha if key is None else config.alpha_pattern[key]
    rank = next((r for r in (lora.rank, config.rank) if r and config.scale(module, r) == lora.scale), 0)
    if alpha is None or not rank:
        return weight * lora.scale
    return weight * alpha / math.sqrt(rank) if config.rslora else weight * alpha / rank


def collect(layout: Layout, adapters: Sequence[tuple[OpenAdapter, float]], tied: bool) -> Edits:
    """Fit adapters to a model.

    Args:
        adapters: with their weights, in the order of the stack; none of weight 0.
        tied: the model's head and embedding are one matrix.

    Raises:
        WeftError: UNSUPPORTED when an adapter does not fit at all, or brings what the architecture has no place for.
    """
    names = Names(layout.model)
    found = Edits({}, {}, {}, [], 0, [])
    left_out = 0
    for number, (adapter, weight) in enumerate(adapters):
        one = _Collector(layout, names, adapter, number, weight, tied, found)
        for module in adapter.file.modules.values():
            one.take(module)
        one.check()
        left_out += one.left_out
    return found._replace(left_out=left_out)


class _Collector:
    def __init__(
        self, layout: Layout, names: Names, adapter: OpenAdapter, number: int, weight: float, tied: bool, found: Edits
    ) -> None:
        self.layout, self.names, self.adapter, self.tied, self.found = layout, names, adapter, tied, found
        self.number, self.weight = number, weight
        self._missing: Counter[str] = Counter()
        self.matched = 0

    @property
    def left_out(self) -> int:
        return self._missing.total()

    def check(self) -> None:
        file = self.adapter.file
        if not self.matched:
            reason = next(iter(self._missing), "it holds nothing")
            base = file.config.base
            raise WeftError(
                ErrorKind.UNSUPPORTED,
                f"{file.path.name} does not fit this model: 0 of its {len(file.modules)} modules match ({reason}).",
                f"It records {base} as its base." if base else "Choose the model it was trained on.",
            )
        if self._missing:
            why = "; ".join(f"{reason} ({count})" for reason, count in self._missing.most_common(4))
            self.found.notes.append(
                f"{file.path.name}: {self.matched} of {len(file.modules)} modules match this model. Left out: {why}."
            )
        if file.unknown:
            self.found.notes.append(f"{file.path.name}: {len(file.unknown)} tensors of an unknown kind were left out.")

    def take(self, module: AdaptedModule) -> None:
        target = self.names.find(module)
        if not target.name:
            self._missing[f"no {place_of(module.name).tail}"] += 1
            self.found.unmatched.append(module.name)
            return
        owner = self.names.modules[target.name]
        if module.base is not None:
            self._copy(module, target, owner, module.base)
        for lora in module.loras:
            if reason := self._lora(module, lora, target, owner):
                self._missing[reason] += 1
                return
        for name, info in module.saved.items():
            self._saved(module, target, owner, name, info)
        if module.tokens is not None:
            self._tokens(module, target, owner, module.tokens)
        self.matched += 1

    def _add(self, parameter: str, edit: Edit) -> None:
        self.found.by_parameter.setdefault(parameter, []).append(edit)

    def _edit(self, kind: str, **more: Any) -> Edit:
        return Edit(self.number, self.weight, kind, **more)

    def _lora(self, module: AdaptedModule, lora: LoraTensors, target: Target, owner: Any) -> str:
        """Take a pair in. Returns why it has no place, "" when it has."""
        kind, size = kind_of(owner), sizes(owner)
        assert lora.scale is not None
        pair = self._edit(
            "pair" if lora.magnitude is None else "dora",
            scale=lora.scale, exact=exact_scale(self.adapter, module.name, lora, self.weight),
            a=lora.a, b=lora.b, magnitude=lora.magnitude, swapped=lora.transposed, first=target.first,
        )  # fmt: skip
        if target.expert >= 0 or size is None or not kind:
            return self._parameter(module, lora, target, owner, pair)
        out, inputs = self._size(target.name, kind, size)
        fused = place_of(module.name).tail in ("self_attn.q_proj", "mlp.gate_proj")
        short = lora.outputs != out and not fused and not target.first
        if lora.inputs != inputs or target.first + lora.outputs > out or short:
            tail = place_of(module.name).tail
            return f"{tail} is {lora.outputs}×{lora.inputs} there, {out}×{inputs} in the model"
        parameter = f"{target.name}.weight"
        edit = pair._replace(transposed=kind in ("conv1d", "embedding"), cast=kind == "embedding")
        self._add(parameter, edit)
        if lora.bias is not None:
            self._needs_bias(target.name, owner)
            bias = self._edit("bias", scale=lora.scale, exact=pair.exact, value=lora.bias, first=target.first)
            self._add(f"{target.name}.bias", bias)
        own_head = any(role_of(place_of(n)) == "output" for n in self.adapter.file.modules)
        if lora.embedding and self.adapter.file.config.tied and not own_head:
            self._to_head(parameter, edit)
        return ""

    def _to_head(self, parameter: str, edit: Edit) -> None:
        """A head that shares an adapted embedding's matrix takes the same difference."""
        if self.tied and parameter == self.layout.embedding:
            self._add(self.layout.head, edit)

    def _needs_bias(self, name: str, owner: Any) -> None:
        if getattr(owner, "bias", None) is None:
            raise WeftError(
                ErrorKind.UNSUPPORTED,
                f"{self.adapter.file.path.name} trained a bias for {name}, which this model's architecture has none for: "
                "a merged model could not hold it.",
                "Use it as an adapter, or train it again without lora_bias.",
            )

    def _parameter(self, module: AdaptedModule, lora: LoraTensors, target: Target, owner: Any, pair: Edit) -> str:
        if lora.magnitude is not None:
            return "DoRA on experts is not known"
        if target.expert >= 0:
            parameter = f"{target.name}.{target.parameter}"
            wanted = tuple(getattr(owner, target.parameter).shape[1:])
            if lora.inputs != wanted[1] or target.first + lora.outputs > wanted[0]:
                tail = place_of(module.name).tail
                return f"{tail} is {lora.outputs}×{lora.inputs} there, {wanted[0]}×{wanted[1]} in the model"
            self._add(parameter, pair._replace(expert=target.expert, cast=True))
            return ""
        found = _parameters_of(owner, lora)
        if len(found) > 1:
            wanted_names = [p.rpartition(".")[2] for p in self.adapter.file.config.target_parameters]
            found = [f for f in found if f[0] in wanted_names[lora.depth : lora.depth + 1]] or found[:1]
        if not found:
            return f"{place_of(module.name).tail} has no matrix of this shape"
        name, experts, transposed = found[0]
        edit = pair._replace(experts=experts, transposed=transposed, cast=True)
        self._add(f"{target.name}.{name}", edit)
        return ""

    def _saved(self, module: AdaptedModule, target: Target, owner: Any, name: str, info: TensorInfo) -> None:
        parameter = f"{target.name}.{name}"
        if name == "bias" and getattr(owner, name, None) is None:
            self._needs_bias(target.name, owner)
        value: Any = getattr(owner, name, None)
        if not isinstance(value, torch.Tensor) or target.first:
            raise self._shape_error(module, name, info.shape, ())
        if tuple(value.shape) != info.shape:
            self._grow(module, parameter, name, info, tuple(value.shape))
        else:
            self._add(parameter, self._edit("whole", value=info))

    def _size(self, name: str, kind: str, size: tuple[int, int]) -> tuple[int, int]:
        """(out, in) of a module, with the tokens that adapters have brought."""
        grown = self.found.grown.get(f"{name}.weight")
        if grown is None:
            return size
        rows = grown[1].shape[0]
        return (size[0], rows) if kind == "embedding" else (rows, size[1])

    def _grow(self, module: AdaptedModule, parameter: str, name: str, info: TensorInfo, shape: tuple[int, ...]) -> None:
        """More rows than the base has: an adapter that came with new tokens. Its matrix takes the base's place."""
        vocabulary = parameter in (self.layout.embedding, self.layout.head)
        more = len(info.shape) == 2 and len(shape) == 2 and info.shape[1] == shape[1] and info.shape[0] > shape[0]
        if not vocabulary or not more:
            raise self._shape_error(module, name, info.shape, shape)
        if self.weight != 1 or parameter in self.found.grown or self.found.by_parameter.get(parameter):
            raise WeftError(
                ErrorKind.UNSUPPORTED,
                f"{self.adapter.file.path.name} brings {info.shape[0] - shape[0]} new tokens. That works at weight 1, "
                "and for the first adapter of a stack alone.",
                "Set its weight to 1 and put it first, or merge it alone before the others.",
            )
        self.found.grown[parameter] = (self.number, info)

    def _copy(self, module: AdaptedModule, target: Target, owner: Any, info: TensorInfo) -> None:
        """PEFT stores a copy of an adapted embedding. It means something only where it differs from the base."""
        parameter, shape = f"{target.name}.weight", tuple(owner.weight.shape)
        if info.shape != shape:
            self._grow(module, parameter, "weight", info, shape)
        else:
            self.found.copies.setdefault(parameter, []).append(self._edit("whole", value=info))

    def _tokens(self, module: AdaptedModule, target: Target, owner: Any, info: TensorInfo) -> None:
        size = sizes(owner)
        if (
            kind_of(owner) != "embedding"
            or size is None
            or info.shape[1] != size[0]
            or not module.indices
            or not 0 <= min(module.indices) <= max(module.indices) < self._size(target.name, "embedding", size)[1]
        ):
            raise self._shape_error(module, "trained tokens", info.shape, size or ())
        parameter = f"{target.name}.weight"
        edit = self._edit("rows", value=info, indices=module.indices)
        self._add(parameter, edit)
        self._to_head(parameter, edit)

    def _shape_error(self, module: AdaptedModule, what: str, there: Any, here: Any) -> WeftError:
        return WeftError(
            ErrorKind.UNSUPPORTED,
            f"{self.adapter.file.path.name} does not fit: {module.name[-80:]} has a {what} of {tuple(there)} there, "
            f"{tuple(here)} in this model.",
            "Choose the model that it was trained on.",
        )


def _parameters_of(owner: Any, lora: LoraTensors) -> list[tuple[str, int, bool]]:
    """Parameters that B·A can belong to: name, how many experts (0: a matrix), and whether it lies transposed."""
    found: list[tuple[str, int, bool]] = []
    out, inputs = lora.outputs, lora.inputs
    for name, parameter in owner.named_parameters(recurse=False):
        if parameter.dim() == 2 and tuple(parameter.shape) == (out, inputs):
            found.append((name, 0, False))
        elif parameter.dim() == 3 and lora.rank % parameter.shape[0] == 0:
            if tuple(parameter.shape[1:]) == (out, inputs):
                found.append((name, parameter.shape[0], False))
            elif tuple(parameter.shape[1:]) == (inputs, out):
                found.append((name, parameter.shape[0], True))
    return found
