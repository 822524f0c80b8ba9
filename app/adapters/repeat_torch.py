"""Layers of a loaded model run several times over, as PEFT's layer replication has them, and put back exactly.

A repeated layer is a module of its own that shares the big matrices of the layer it repeats, so that adapters can change
each repetition alone. What adapters write in place (biases, norms: one dimension) is copied; it is small.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from app.core.errors import ErrorKind, WeftError

Ranges = tuple[tuple[int, int], ...]
_MARK = "_weft_repeated"
_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers")  # of a config: one item for each layer


def repeated(model: Any) -> Ranges:
    """The ranges of layers that a model is made of now; empty for a plain one."""
    return getattr(model, _MARK, ())


class RepeatedLayers:
    """The layers of one model."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._plain: tuple[Any, str, torch.nn.ModuleList, dict[str, Any]] | None = None

    @property
    def ranges(self) -> Ranges:
        return repeated(self._model)

    def set(self, ranges: Ranges) -> None:
        """Make the model of these ranges of its own layers; of none, as it was loaded.

        Raises:
            WeftError: UNSUPPORTED when it has no such layers, or they lie on several devices.
        """
        if ranges == self.ranges:
            return
        order = [layer for start, end in ranges for layer in range(start, end)]
        owner, name, layers, config = self._plain or self._find()
        if order and max(order) >= len(layers):
            raise WeftError(
                ErrorKind.UNSUPPORTED,
                f"The adapter repeats layer {max(order)}, and the model has only {len(layers)} layers.",
                "Choose the model that it was trained on.",
            )
        if order and any(hasattr(module, "_hf_hook") for module in layers.modules()):
            raise WeftError(
                ErrorKind.UNSUPPORTED,
                "An adapter that repeats layers needs the whole model on one device.",
                "Load the model on one device, or merge the adapter into a copy of the model.",
            )
        self._plain = (owner, name, layers, config)
        if not order:
            setattr(owner, name, layers)
            self._configure(config)
            self._plain = None
        else:
            setattr(owner, name, torch.nn.ModuleList([_copy(layers[n], at) for at, n in enumerate(order)]))
            lists = {key: [config[key][n] for n in order] for key in config if key != "num_hidden_layers"}
            self._configure({**lists, "num_hidden_layers": len(order)})
        setattr(self._model, _MARK, ranges)

    def _find(self) -> tuple[Any, str, torch.nn.ModuleList, dict[str, Any]]:
        config = self._text_config()
        count = config.num_hidden_layers
        lists: list[tuple[int, Any, str, torch.nn.ModuleList]] = []
        for owner in self._model.modules():
            for name, child in owner.named_children():
                if isinstance(child, torch.nn.ModuleList) and len(child) == count:
                    lists.append((sum(1 for _ in child.modules()), owner, name, child))
        if not lists:
            raise WeftError(
                ErrorKind.UNSUPPORTED,
                "The layers of this model are not found, so they cannot be repeated.",
                "Merge the adapter into a copy of the model, and load that.",
            )
        _, owner, name, layers = max(lists, key=lambda found: found[0])
        return owner, name, layers, {"num_hidden_layers": count, **layer_lists(config)}

    def _configure(self, values: dict[str, Any]) -> None:
        config = self._text_config()
        # The number of layers is checked against the lists: these go first when it grows, and are as long either way.
        for key, value in values.items():
            config.__dict__[config.attribute_map.get(key, key)] = value

    def _text_config(self) -> Any:
        return self._model.config.get_text_config(decoder=True)


def _copy(module: Any, index: int) -> Any:
    """A layer that shares the matrices of another. `index`: its place, which the KV cache goes by."""
    made = copy.copy(module)
    made._parameters = {name: _parameter(value) for name, value in module._parameters.items()}
    made._buffers = dict(module._buffers)
    made._modules = {name: None if child is None else _copy(child, index) for name, child in module._modules.items()}
    if "layer_idx" in made.__dict__:
        made.layer_idx = index
    return made


def _parameter(value: Any) -> Any:
    if isinstance(value, torch.nn.Parameter) and value.dim() < 2 and value.dtype.is_floating_point:
        return torch.nn.Parameter(value.detach().clone(), requires_grad=False)
    return value


def layer_lists(config: Any) -> dict[str, list[Any]]:
    """What a text model's config says of its layers one by one (their kind of attention), by name."""
    found = {key: getattr(config, key, None) for key in _LISTS}
    return {
        key: list(value)
        for key, value in found.items()
        if isinstance(value, (list, tuple)) and len(value) == config.num_hidden_layers
    }


def source_layers(ranges: Sequence[tuple[int, int]]) -> list[int]:
    """Which of the base's layers stands at each place."""
    return [layer for start, end in ranges for layer in range(start, end)]
