"""A 16-bit model opened to be quantized: its layers, the matrices in them, and what each is called in the weight files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.adapters.layer_inputs_torch import Matrix
from app.adapters.layer_walk_torch import foreign, layers_of
from app.adapters.merge_files import BaseFiles
from app.adapters.packed_experts import PARTS, PackedExperts, standable
from app.adapters.packed_places import Places
from app.core.errors import ErrorKind, WeftError

_MOST_LEFT = 0.2  # of the layers' weights: convolutions, routers and the like
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

        model: Any
        model, info = foreign(
            transformers.AutoModelForCausalLM.from_pretrained,
            str(folder),
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        if missing := sorted(info["missing_keys"]):  # transformers fills them with random numbers
            raise WeftError(
                ErrorKind.CORRUPT,
                f"The weight files lack {missing[0]}" + (f" and {len(missing) - 1} more." if missing[1:] else "."),
                "Download the model again.",
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
        made = [module for matrices in self._matrices for module in (m.module for m in matrices)]
        check_share(str(model.config.model_type), [layer for _, layer in self.layers], made)

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
        """Names in the files, without `.weight`, of what multiplies and is not quantized: routers, and what lies in no layer."""
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        made = {id(matrix.module) for matrices in self._matrices for matrix in matrices}
        found: list[str] = []
        for name, module in self.model.named_modules():
            weight, stored = module._parameters.get("weight"), self._parameters.get(f"{name}.weight")
            if id(module) in made or weight is None or weight.dim() != 2 or stored is None:
                continue
            if module is not head and module is not embedding and not isinstance(module, torch.nn.Embedding):
                found.append(stored.removesuffix(".weight"))
        return found

    def blocks(self) -> list[list[str]]:
        """Names, inside a layer, of what is quantized, where other matrices of layers are not; else []."""
        names = {matrix.name for matrices in self._matrices for matrix in matrices}
        linear = {n for _, layer in self.layers for n, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
        return [[name] for name in sorted(names)] if linear - names else []

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


def check_share(kind: str, layers: Sequence[Any], made: Iterable[Any]) -> None:
    """Refuse models most of whose layers would stay in 16 bits.

    Args:
        made: modules whose weights are quantized; experts that are taken apart for it too.

    Raises:
        WeftError: UNSUPPORTED.
    """
    packed = sum(p.numel() for module in made for p in module.parameters() if p.dim() > 1)
    whole = sum(p.numel() for layer in layers for p in layer.parameters() if p.dim() > 1)
    if whole - packed > _MOST_LEFT * whole:
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            f"{(whole - packed) / whole:.0%} of the weights in {kind}'s layers lie in tensors that hold no packed weights, "
            "such as experts that are kept together.",
            "Export a GGUF with `weft export`.",
        )


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
