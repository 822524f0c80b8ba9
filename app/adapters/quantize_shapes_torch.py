"""What is to be quantized, read from a model's config alone. Needs torch and transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from app.adapters.layer_walk_torch import layers_of
from app.adapters.packed_experts import standable
from app.adapters.packed_grid import SLABS
from app.adapters.quantize_model_torch import check_share, is_router
from app.core.errors import ErrorKind, WeftError
from app.core.quantize_plan import GROUPS, QuantizePlan

# Of these transformers and AutoAWQ replace the activation by one with scales (transformers/integrations/awq.py).
SCALED_ACTIVATIONS = ("bloom", "falcon", "gpt_bigcode", "gpt_neox", "gptj", "mpt", "starcoder2")


class Shapes(NamedTuple):
    """(name, inputs, outputs) of each matrix in a model's layers, how many other weights there are, and layers."""

    matrices: list[tuple[str, int, int]]
    others: int
    layers: int

    @property
    def weights(self) -> int:
        """In the matrices."""
        return sum(inputs * outputs for _, inputs, outputs in self.matrices)


def shapes_of(folder: Path, original: Mapping[str, Any]) -> Shapes:
    """The model's matrices: no weight is read.

    Args:
        original: its config.json.

    Raises:
        WeftError: UNSUPPORTED for architectures without layers, for models of more than text, and own code.
    """
    import torch
    import transformers

    kind = str(original.get("model_type", ""))
    hint = "Merge into safetensors, or export a GGUF with `weft export`."
    if any(key in original for key in ("vision_config", "audio_config")):
        raise WeftError(ErrorKind.UNSUPPORTED, f"{kind} reads more than text, and only text calibrates it here.", hint)
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # its shapes are those of the model that was packed
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise WeftError(
            ErrorKind.UNSUPPORTED, f"Transformers cannot build this model: {str(error)[:200]}", hint
        ) from error
    layers = layers_of(model)
    matrices = [each for name, layer in layers for each in _matrices(name, layer)]
    packable = [m for _, layer in layers for n, m in layer.named_modules() if not is_router(n) and _holds_matrices(m)]
    check_share(kind, [layer for _, layer in layers], packable)
    if not matrices:
        raise WeftError(ErrorKind.UNSUPPORTED, f"{kind} has no matrices in layers that could be quantized.", hint)
    total = sum(parameter.numel() for parameter in model.parameters())
    return Shapes(matrices, max(0, total - sum(i * o for _, i, o in matrices)), len(layers))


def _holds_matrices(module: Any) -> bool:
    """A module whose own weights are packed: a linear one, or a mixture's experts."""
    import torch

    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D" or standable(module)


def _matrices(name: str, layer: Any) -> Iterator[tuple[str, int, int]]:
    """Those of a layer; an expert's one by one, which transformers keeps together."""
    import torch

    for part, module in layer.named_modules():
        if is_router(part):
            continue
        if isinstance(module, torch.nn.Linear):
            yield f"{name}.{part}", module.in_features, module.out_features
        elif type(module).__name__ == "Conv1D":
            yield f"{name}.{part}", *module.weight.shape
        elif standable(module):
            experts, width, hidden = module.gate_up_proj.shape
            for number in range(experts):
                yield f"{name}.{part}.{number}.gate_proj", hidden, width // 2
                yield f"{name}.{part}.{number}.up_proj", hidden, width // 2
                yield f"{name}.{part}.{number}.down_proj", width // 2, hidden


def stored_dtype(folder: Path) -> Any:
    """The torch dtype that most of a model's weights are stored in; None where that cannot be told."""
    import torch

    from app.core.formats import read_safetensors_header

    names = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
    bytes_of: dict[str, int] = {}
    try:
        for file in sorted(folder.glob("*.safetensors")):
            for tensor in read_safetensors_header(file.resolve()).tensors:
                bytes_of[tensor.dtype] = bytes_of.get(tensor.dtype, 0) + tensor.bytes
    except WeftError:
        return None  # who reads it says what it is
    if bytes_of:
        return names.get(max(bytes_of, key=lambda name: bytes_of[name]))
    config = json.loads((folder / "config.json").read_text("utf-8"))
    told = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    return next((each for each in names.values() if str(each) == f"torch.{told}"), None)


def own_dtype(folder: Path) -> Any:
    """The 16-bit torch dtype that a model is quantized in: its own, so that nothing is rounded that need not be."""
    import torch

    return torch.float16 if stored_dtype(folder) == torch.float16 else torch.bfloat16


def check_shapes(plan: QuantizePlan, shapes: Shapes, kind: str) -> None:
    """Refuse groups that matrices cannot be divided into, and architectures that a method's readers take otherwise.

    Args:
        kind: the model's `model_type`.

    Raises:
        WeftError: BAD_INPUT with the largest group that fits; UNSUPPORTED where none does.
    """
    if plan.method == "awq" and kind in SCALED_ACTIVATIONS:
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            f"Programs that read AWQ expect scales in the activations of {kind}, which are not made here.",
            "Quantize by GPTQ.",
        )
    step = {"awq": 8, "gptq": 32}.get(plan.method, 1)  # outputs that are packed together
    for name, inputs, outputs in shapes.matrices:
        # HQQ packs slabs of groups on one another, with 3 bits also where they do not divide.
        slabs = SLABS[plan.bits] if plan.method == "hqq" and plan.bits != 3 else 1
        if outputs % step or (not inputs % plan.group_size and outputs * inputs // plan.group_size % slabs):
            raise WeftError(
                ErrorKind.UNSUPPORTED,
                f"{name} has {outputs} outputs, and {plan.method.upper()} packs them by {max(step, slabs)}.",
                "Choose other bits, or export a GGUF with `weft export`.",
            )
        if inputs % plan.group_size:
            fitting = [g for g in GROUPS[plan.method] if not any(i % g for _, i, _ in shapes.matrices)]
            raise WeftError(
                ErrorKind.BAD_INPUT if fitting else ErrorKind.UNSUPPORTED,
                f"{name} has {inputs} inputs, which groups of {plan.group_size} do not divide.",
                f"Choose a group size of {fitting[-1]}." if fitting else "Export a GGUF with `weft export`.",
            )
