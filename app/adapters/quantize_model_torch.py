"""A 16-bit model opened to be quantized: its layers, the matrices in them, and what each is called in the weight files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.adapters.layer_inputs_torch import Matrix
from app.adapters.layer_walk_torch import layers_of
from app.adapters.merge_files import BaseFiles
from app.adapters.packed_experts import PARTS, PackedExperts, standable
from app.adapters.packed_places import Places
from app.core.errors import ErrorKind, WeftError

ROUTERS = ("gate", "router", "shared_expert_gate")  # small, and what they decide is not to be rounded


class QuantizableModel:
    """A model, and where its matrices lie in the files.

    Args:
        folder: as transformers may see it (see `Stage`). files: its weights. dtype: of the model.

    Attributes:
        model: in main memory, its experts one by one. layers: (name, module), first to last.
        stems: the name of each matrix in the files, without `.weight`, by its module's name.

    Raises:
        WeftError: UNSUPPORTED, CORRUPT.
    """

    def __init__(self, folder: Path, files: BaseFiles, dtype: torch.dtype) -> None:
        import transformers

        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=dtype, local_files_only=True, trust_remote_code=False
        )
        model.eval()
        self.model: Any = model
        names = [name for name, tensor in files.tensors.items() if tensor.dtype in ("F16", "BF16", "F32", "F64")]
        places = Places(model, [name.removesuffix(".weight") for name in names if name.endswith(".weight")], "weight")
        self.stems: dict[str, str] = dict(places.modules)
        for owner, found in places.experts.items():
            self._split_experts(owner, found)
        self.layers = layers_of(model)
        self._parameters = Places(model, names, "").modules
        self._matrices: list[list[Matrix]] = []
        self._prefixes: list[str] = []
        for number, (name, layer) in enumerate(self.layers):
            self._matrices.append(self._matrices_of(name, layer))
            self._prefixes.append(self._prefix(number, name))

    def _split_experts(self, owner: str, found: Mapping[str, str]) -> None:
        """Experts one by one, in the place of those that transformers keeps together; the numbers stay where they are."""
        old = self.model.get_submodule(owner)
        parts = {name.rpartition(".")[2] for name in found}
        wanted = {f"{owner}.{number}.{part}" for number in range(getattr(old, "num_experts", 0)) for part in parts}
        if not standable(old) or len(parts) != 3 or not parts <= PARTS.keys() or wanted - set(found):
            return  # they stay as they are
        both, down, middle = old.gate_up_proj.data, old.down_proj.data, old.gate_up_proj.shape[1] // 2
        self.model.set_submodule(owner, PackedExperts(old, parts))
        for name, stem in found.items():
            number, role = int(name.split(".")[-2]), PARTS[name.rpartition(".")[2]]
            weight = {"gate": both[number, :middle], "up": both[number, middle:], "down": down[number]}[role]
            with torch.device("meta"):
                linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight = torch.nn.Parameter(weight, requires_grad=False)
            self.model.set_submodule(name, linear)
            self.stems[name] = stem

    def _matrices_of(self, name: str, layer: Any) -> list[Matrix]:
        found: list[Matrix] = []
        for part, module in layer.named_modules():
            transposed = type(module).__name__ == "Conv1D"
            if not transposed and not isinstance(module, torch.nn.Linear):
                continue
            if not is_router(part) and f"{name}.{part}" in self.stems:
                found.append(Matrix(part, module, transposed))
        return found

    def _prefix(self, number: int, name: str) -> str:
        """How the names of a layer's tensors begin in the files."""
        mark = f".{number}."
        for matrix in self._matrices[number]:
            stem = self.stems[f"{name}.{matrix.name}"]
            if mark in f".{stem}":
                return stem[: f".{stem}".index(mark) + len(mark) - 1]
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            f"Layer {number} of this model has no matrices that could be quantized under names of their own.",
            "Merge into safetensors, or export a GGUF with `weft export`.",
        )

    def matrices(self, layer: int) -> list[Matrix]:
        """What is quantized of a layer."""
        return self._matrices[layer]

    def kept(self) -> list[str]:
        """Names in the files, without `.weight`, of what lies in layers, multiplies, and is not quantized: routers."""
        found: list[str] = []
        for number, (name, layer) in enumerate(self.layers):
            made = {matrix.name for matrix in self._matrices[number]}
            for part, module in layer.named_modules():
                weight = module._parameters.get("weight")
                stored = self._parameters.get(f"{name}.{part}.weight")
                if part not in made and weight is not None and weight.dim() == 2 and stored is not None:
                    found.append(stored.removesuffix(".weight"))
        return found

    def prefix(self, layer: int) -> str:
        """How the names of a layer's tensors begin in the files."""
        return self._prefixes[layer]

    def stem(self, layer: int, matrix: str) -> str:
        """A matrix's name in the files, without `.weight`. matrix: its name inside the layer."""
        return self.stems[f"{self.layers[layer][0]}.{matrix}"]

    def stored_name(self, layer: int, parameter: str) -> str:
        """A parameter's name in the files.

        Raises:
            WeftError: UNSUPPORTED when they keep it in another form.
        """
        found = self._parameters.get(f"{self.layers[layer][0]}.{parameter}")
        if found is None:
            raise WeftError(
                ErrorKind.UNSUPPORTED,
                f"{parameter} of layer {layer} takes a scale up, and the weight files keep it in another form.",
                "Quantize by GPTQ.",
            )
        return found


def is_router(name: str) -> bool:
    """Whether a module of a layer, or what it lies in, says which experts a token goes to."""
    return any(part in ROUTERS for part in name.split("."))


def read_tensor(files: BaseFiles, name: str) -> Tensor:
    """A tensor as it is stored."""
    from app.adapters.merge_files import TORCH_NAMES

    stored = files.tensors[name]
    data = bytearray(stored.bytes)
    files.read(stored, 0, memoryview(data))
    if not data:
        return torch.empty(stored.shape, dtype=getattr(torch, TORCH_NAMES[stored.dtype]))
    return torch.frombuffer(data, dtype=getattr(torch, TORCH_NAMES[stored.dtype])).reshape(stored.shape)
