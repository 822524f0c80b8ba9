"""From the names in an adapter to the modules of a loaded transformers model."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch

from app.adapters.base_torch import sizes
from app.core.adapter_file import AdaptedModule
from app.core.module_names import Place, place_of, role_of

_EXPERT = re.compile(r"(?:mlp|block_sparse_moe|ffn)\.experts\.(?P<expert>\d+)\.(?P<part>\w+)")
_PARTS = {  # of an expert's matrices that lie in one parameter of all experts: (parameter, which half)
    "w1": ("gate_up_proj", 0),
    "w3": ("gate_up_proj", 1),
    "w2": ("down_proj", -1),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "down_proj": ("down_proj", -1),
}
_FUSED = {  # a module that an adapter may know apart: what it lies in, and what lies before it
    "self_attn.q_proj": ("self_attn.qkv_proj", ()),
    "self_attn.k_proj": ("self_attn.qkv_proj", ("self_attn.q_proj",)),
    "self_attn.v_proj": ("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj")),
    "mlp.gate_proj": ("mlp.gate_up_proj", ()),
    "mlp.up_proj": ("mlp.gate_up_proj", ("mlp.gate_proj",)),
}


class Target(NamedTuple):
    """Where a part of an adapter belongs.

    Attributes:
        name: of the module in the model, or "" when there is none.
        first: the first of the module's outputs that it adapts, where the module is fused from several.
        expert: which expert; -1 for none. parameter: of an expert's module.
    """

    name: str
    first: int = 0
    expert: int = -1
    parameter: str = ""
    half: int = -1


def _holds(module: torch.nn.Module) -> bool:
    """Whether a module has weights of its own, packed or not."""
    return hasattr(module, "packed_weights") or any(True for _ in module.parameters(recurse=False))


class Names:
    """The modules of a model by their places."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self._exact = set(self.modules)
        self._places: dict[Place, str] = {}
        self._roles: dict[tuple[int, str], str] = {}
        for name, module in self.modules.items():
            if not name or not _holds(module):
                continue
            place = place_of(name)
            self._places.setdefault(place, name)
            if place.layer < 0 and (role := role_of(place)):
                self._roles.setdefault((place.layer, role), name)
        self.layers = 1 + max((place.layer for place in self._places if not place.tower), default=-1)

    def find(self, adapted: AdaptedModule) -> Target:
        """The module that an adapter's module names."""
        name = adapted.name
        if name in self._exact and _holds(self.modules[name]):
            return Target(name)
        place = place_of(name)
        found = self._places.get(place)
        if found is None and place.layer < 0 and not place.tower:
            found = self._roles.get((place.layer, role_of(place)))
        if found is not None:
            return Target(found)
        if match := _EXPERT.fullmatch(place.tail):
            return self._expert(place, int(match["expert"]), match["part"])
        return self._fused(place, adapted)

    def _expert(self, place: Place, expert: int, part: str) -> Target:
        owner = next(
            (n for t in ("mlp.experts", "block_sparse_moe.experts") if (n := self._places.get(Place(place.layer, t)))),
            None,
        )
        if owner is None or part not in _PARTS:
            return Target("")
        parameter, half = _PARTS[part]
        tensor: Any = getattr(self.modules[owner], parameter, None)
        if not isinstance(tensor, torch.Tensor) or tensor.dim() != 3 or expert >= tensor.shape[0]:
            return Target("")
        return Target(owner, tensor.shape[1] // 2 if half == 1 else 0, expert, parameter, half)

    def _fused(self, place: Place, adapted: AdaptedModule) -> Target:
        whole = _FUSED.get(place.tail)
        owner = self._places.get(Place(place.layer, whole[0], place.tower)) if whole else None
        if whole is None or owner is None or not adapted.loras:
            return Target("")
        size = sizes(self.modules[owner])
        if size is None:
            return Target("")
        if whole[0].endswith("gate_up_proj"):
            return Target(owner, size[0] // 2 if whole[1] else 0)
        # Query comes first; key and value share the rest alike.
        own = adapted.loras[0].outputs
        first = {"self_attn.q_proj": 0, "self_attn.k_proj": size[0] - 2 * own, "self_attn.v_proj": size[0] - own}
        return Target(owner, first[place.tail])
