"""From an adapter's tensors to what a live stack adds to each module of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from app.adapters.base_torch import dora_gain, is_quantized, kind_of, place_of_weight, present, sizes, weight_of
from app.adapters.live_names import Names, Target
from app.adapters.live_parameters import Product, Vector
from app.adapters.live_site import Part
from app.adapters.repeat_torch import repeated
from app.adapters.tensors_torch import OpenAdapter
from app.core.adapter_file import AdaptedModule, LoraTensors
from app.core.errors import ErrorKind, WeftError
from app.core.module_names import place_of, role_of

BaseOf = Callable[[str, str], Tensor | None]
_SAME = 1e-2  # of the largest weight: by so much may a copy of the base differ through rounding


class Parts(NamedTuple):
    """An adapter taken apart.

    Attributes:
        sites: module to (kind, (out, in), dtype, device, part).
        written: (module, parameter) to (its length where the module has none, changes).
        deep: it changes more than the output head and the last norm, so that a KV cache goes stale.
        notes: sentences about what has no place in the model.
    """

    sites: dict[str, tuple[str, tuple[int, int], torch.dtype, torch.device, Part]]
    written: dict[tuple[str, str], tuple[int, list[Vector | Product]]]
    deep: bool
    notes: list[str]


def read_parts(
    model: Any, names: Names, adapter: OpenAdapter, base: BaseOf, progress: Callable[[int, int], None] = lambda *_: None
) -> Parts:
    """Read an adapter's tensors and fit them to a model.

    Args:
        base: a parameter of a module as the base has it: the model's own may be rewritten by adapters that are on.

    Raises:
        WeftError: UNSUPPORTED when none of it fits or its kind cannot be stacked; CORRUPT for shapes that disagree.
    """
    file = adapter.file
    if file.config.layer_replication != repeated(model):
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            f"{file.path.name} is for a model whose layers are repeated in another way (layer replication).",
            "Switch off the adapters that repeat other layers.",
        )
    reader = _Reader(model, names, adapter, base)
    for done, module in enumerate(file.modules.values()):
        progress(done, len(file.modules))
        reader.take(module)
    if not reader.sites and not reader.written:
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            f"{file.path.name} does not fit this model: 0 of its {len(file.modules)} modules match ({reader.first_reason()}).",
            f"It records {file.config.base} as its base."
            if file.config.base
            else "Choose the model it was trained on.",
        )
    return Parts(reader.sites, reader.written, reader.deep, reader.notes())


class _Reader:
    def __init__(self, model: Any, names: Names, adapter: OpenAdapter, base: BaseOf) -> None:
        self.model, self.names, self.adapter, self._base_of = model, names, adapter, base
        self.sites: dict[str, tuple[str, tuple[int, int], torch.dtype, torch.device, Part]] = {}
        self.written: dict[tuple[str, str], tuple[int, list[Vector | Product]]] = {}
        self.deep = False
        self._missing: Counter[str] = Counter()
        self._matched = 0

    def first_reason(self) -> str:
        return next(iter(self._missing), "it holds nothing")

    def notes(self) -> list[str]:
        name, total = self.adapter.file.path.name, len(self.adapter.file.modules)
        told = []
        if self._missing:
            why = "; ".join(f"{reason} ({count})" for reason, count in self._missing.most_common(4))
            told.append(f"{name}: {self._matched} of {total} modules match this model. Left out: {why}.")
        if self.adapter.file.unknown:
            told.append(f"{name}: {len(self.adapter.file.unknown)} tensors of an unknown kind were left out.")
        return told

    def take(self, module: AdaptedModule) -> None:
        target = self.names.find(module)
        if not target.name:
            self._missing[f"no {place_of(module.name).tail}"] += 1
            return
        owner = self.names.modules[target.name]
        for lora in module.loras:
            if reason := self._lora(module, lora, target, owner):
                self._missing[reason] += 1
                return
        for name, info in module.saved.items():
            self._saved(module, target, owner, name, self.adapter.read(info))
        if module.base is not None:
            self._base_copy(module, target, owner)
        if module.tokens is not None:
            self._tokens(module, target, owner)
        self._matched += 1
        place = place_of(target.name)
        self.deep = (
            self.deep
            or place.layer >= 0
            or not (role_of(place) == "output" or place.tail in ("norm", "ln_f", "final_layernorm"))
        )

    # Low-rank pairs -----------------------------------------------------------------------------

    def _lora(self, module: AdaptedModule, lora: LoraTensors, target: Target, owner: Any) -> str:
        """Take a pair in. Returns why it has no place, "" when it has."""
        a, b, scale = self._pair(lora)
        kind, size = kind_of(owner), sizes(owner)
        if target.expert >= 0 or size is None or (not kind and not is_quantized(owner)):
            return self._parameter(module, lora, target, owner, a, b * scale)
        out, inputs = size
        if (
            a.shape[1] != inputs
            or target.first + b.shape[0] > out
            or (not target.first and self._too_short(module, b, out))
        ):
            tail = place_of(module.name).tail
            return f"{tail} is {b.shape[0]}×{a.shape[1]} there, {out}×{inputs} in the model"
        if b.shape[0] != out:
            b = torch.nn.functional.pad(b, (0, 0, target.first, out - target.first - b.shape[0]))
        gain: Tensor | None = None
        if lora.magnitude is not None:
            magnitude = self.adapter.read(lora.magnitude).reshape(-1)
            rows = slice(target.first, target.first + magnitude.shape[0])
            full, gains = torch.zeros(out), torch.ones(out)
            full[rows] = magnitude
            gains[rows] = dora_gain(owner, a, b, scale, full)[rows]
            gain = gains
        self._add_pair(target.name, owner, kind, size, a, b * scale, gain)
        if lora.bias is not None:
            bias = torch.zeros(out)
            bias[target.first : target.first + lora.outputs] = self.adapter.read(lora.bias).reshape(-1)
            self._write(target.name, "bias", Vector(bias * scale), out)
        if lora.embedding and self.adapter.file.config.tied:
            self._tie(target.name, a, b * scale)
        return ""

    def _too_short(self, module: AdaptedModule, b: Tensor, out: int) -> bool:
        fused = place_of(module.name).tail in ("self_attn.q_proj", "mlp.gate_proj")
        return b.shape[0] != out and not fused

    def _pair(self, lora: LoraTensors) -> tuple[Tensor, Tensor, float]:
        a, b = self.adapter.read(lora.a), self.adapter.read(lora.b)
        assert lora.scale is not None  # check_usable has seen to it
        return (a.T, b.T, lora.scale) if lora.transposed else (a, b, lora.scale)

    def _add_pair(
        self, name: str, owner: Any, kind: str, size: tuple[int, int], a: Tensor, b: Tensor, gain: Tensor | None
    ) -> None:
        # g·(W + D) − W = (g − 1)·W + g·D
        b = b if gain is None else b * gain[:, None]
        dtype, device = self._dtype(owner), place_of_weight(owner)
        part = self._part(name)
        a, b = a.to(device, dtype), b.to(device, dtype)
        if part.a is not None and part.b is not None:
            a, b = torch.cat([part.a, a]), torch.cat([part.b, b], dim=1)
        gain = part.gain if gain is None else gain - 1 if part.gain is None else part.gain + gain - 1
        self._put(name, owner, kind, size, part._replace(a=a, b=b, gain=gain))

    def _tie(self, name: str, a: Tensor, b: Tensor) -> None:
        """The output head that shares an adapted embedding's matrix takes the same difference, transposed."""
        head = self.model.get_output_embeddings()
        head_name = next((n for n, m in self.names.modules.items() if m is head), "")
        own = any(role_of(place_of(n)) == "output" for n in self.adapter.file.modules)
        if head_name and not own and self._is_tied(name):
            size = sizes(head)
            assert size is not None
            self._add_pair(head_name, head, kind_of(head), size, b.T.contiguous(), a.T.contiguous(), None)

    def _is_tied(self, name: str) -> bool:
        head = self.model.get_output_embeddings()
        weight = getattr(self.names.modules[name], "weight", None)
        return head is not None and getattr(head, "weight", None) is weight and head is not self.names.modules[name]

    # Experts and other parameters -----------------------------------------------------------------

    def _parameter(
        self, module: AdaptedModule, lora: LoraTensors, target: Target, owner: Any, a: Tensor, b: Tensor
    ) -> str:
        if lora.magnitude is not None:
            return "DoRA on experts is not known"
        if target.expert >= 0:
            self._write(target.name, target.parameter, Product(a, b, target.expert, target.first))
            return ""
        found = _parameters_of(owner, a, b)
        if len(found) > 1:
            wanted = [p.rpartition(".")[2] for p in self.adapter.file.config.target_parameters]
            found = [f for f in found if f[0] in wanted[lora.depth : lora.depth + 1]] or found[:1]
        if not found:
            return f"{place_of(module.name).tail} has no matrix of this shape"
        name, experts, transposed = found[0]
        if not experts:
            self._write(target.name, name, Product(a, b, transposed=transposed))
            return ""
        rank = a.shape[0] // experts
        pairs_b, pairs_a = b.reshape(b.shape[0], rank, experts), a.reshape(experts, rank, a.shape[1])
        for expert in range(experts):
            one = Product(pairs_a[expert], pairs_b[:, :, expert].contiguous(), expert, transposed=transposed)
            self._write(target.name, name, one)
        return ""

    def _write(self, name: str, parameter: str, change: Vector | Product, length: int = 0) -> None:
        if isinstance(change, Product) and repeated(self.model) and place_of(name).layer >= 0:
            raise WeftError(
                ErrorKind.UNSUPPORTED,
                f"{self.adapter.file.path.name} changes experts of repeated layers, which share their weights.",
                "Merge it into a copy of the model, and load that.",
            )
        self.written.setdefault((name, parameter), (length, []))[1].append(change)

    # Whole parameters ---------------------------------------------------------------------------

    def _saved(self, module: AdaptedModule, target: Target, owner: Any, name: str, value: Tensor) -> None:
        kind, size = kind_of(owner), sizes(owner)
        if name == "weight" and kind and size is not None:
            wanted = size[::-1] if kind in ("embedding", "conv1d") else size
            if tuple(value.shape) != wanted:
                raise _shape_error(self.adapter, module, name, value.shape, wanted)
            dtype, device = self._dtype(owner), place_of_weight(owner)
            self._put(target.name, owner, kind, size, self._part(target.name)._replace(whole=value.to(device, dtype)))
            return
        with present(owner):
            base: Any = self._base_of(target.name, name)
            if base is None and name == "bias" and size is not None:
                self._write(target.name, name, Vector(value), size[0])
                return
            if base is None or base.shape != value.shape:
                raise _shape_error(self.adapter, module, name, value.shape, getattr(base, "shape", ()))
            difference = value - base.detach().float().cpu()
        self._write(target.name, name, Vector(difference))

    def _base_copy(self, module: AdaptedModule, target: Target, owner: Any) -> None:
        """PEFT stores a copy of an adapted embedding. It means something only where it differs from the base."""
        assert module.base is not None
        value = self.adapter.read(module.base)
        with present(owner):
            base = weight_of(owner)
            base = base.T if kind_of(owner) == "embedding" else base
            if base.shape != value.shape:
                raise _shape_error(self.adapter, module, "weight", value.shape, tuple(base.shape))
            worst = max(
                (
                    float((base[i : i + 4096].float().cpu() - value[i : i + 4096]).abs().max())
                    for i in range(0, len(value), 4096)
                ),
                default=0.0,
            )
            same = worst <= _SAME * float(value.abs().max())
        if not same:
            self._saved(module, target, owner, "weight", value)

    def _tokens(self, module: AdaptedModule, target: Target, owner: Any) -> None:
        assert module.tokens is not None
        size = sizes(owner)
        value, indices = self.adapter.read(module.tokens), torch.tensor(module.indices)
        if kind_of(owner) != "embedding" or size is None or value.shape[1] != size[0] or int(indices.max()) >= size[1]:
            raise _shape_error(self.adapter, module, "trained tokens", value.shape, size or ())
        with present(owner):
            difference = value - weight_of(owner).T[indices].detach().float().cpu()
        rows = (indices, difference)
        self._put(target.name, owner, "embedding", size, self._part(target.name)._replace(rows=rows))
        if self._is_tied(target.name):
            head = self.model.get_output_embeddings()
            name = next(n for n, m in self.names.modules.items() if m is head)
            head_size = sizes(head)
            assert head_size is not None
            self._put(name, head, kind_of(head), head_size, self._part(name)._replace(rows=rows))

    # Bookkeeping --------------------------------------------------------------------------------

    def _part(self, name: str) -> Part:
        return self.sites[name][-1] if name in self.sites else Part()

    def _put(self, name: str, owner: Any, kind: str, size: tuple[int, int], part: Part) -> None:
        self.sites[name] = (kind, size, self._dtype(owner), place_of_weight(owner), part)

    def _dtype(self, owner: Any) -> torch.dtype:
        if hasattr(owner, "packed_weights"):
            return owner.dtype
        weight: Any = getattr(owner, "weight", None)
        if isinstance(weight, Tensor) and weight.dtype.is_floating_point:
            return weight.dtype
        return getattr(self.model, "dtype", torch.float32)


def _parameters_of(owner: Any, a: Tensor, b: Tensor) -> list[tuple[str, int, bool]]:
    """Parameters that B·A can belong to: name, how many experts (0: a matrix), and whether it lies transposed."""
    found: list[tuple[str, int, bool]] = []
    out, inputs = b.shape[0], a.shape[1]
    for name, parameter in owner.named_parameters(recurse=False):
        if parameter.dim() == 2 and tuple(parameter.shape) == (out, inputs):
            found.append((name, 0, False))
        elif parameter.dim() == 3 and a.shape[0] % parameter.shape[0] == 0:
            if tuple(parameter.shape[1:]) == (out, inputs):
                found.append((name, parameter.shape[0], False))
            elif tuple(parameter.shape[1:]) == (inputs, out):
                found.append((name, parameter.shape[0], True))
    return found


def _shape_error(adapter: OpenAdapter, module: AdaptedModule, what: str, there: Any, here: Any) -> WeftError:
    return WeftError(
        ErrorKind.UNSUPPORTED,
        f"{adapter.file.path.name} does not fit: {module.name[-80:]} has a {what} of {tuple(there)} there, {tuple(here)} in this model."
        " (Adapters that add tokens need a base with as many.)",
        "Choose the model that it was trained on. Or merge it into its base (Merge and export; `weft merge`): that takes new tokens in.",
    )
