"""What GPTQModel is to quantize, read from a model's config alone, and a look at what came out. Needs torch and transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from app.core.errors import ErrorKind, WeftError
from app.core.quantize_plan import GROUPS, QuantizePlan

_INSIDE_A_LAYER = re.compile(r"\.\d+\.")


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
        WeftError: UNSUPPORTED for architectures that GPTQModel does not know, for models of more than text, and own code.
    """
    import torch
    import transformers

    kind = str(original.get("model_type", ""))
    hint = "Merge into safetensors, or export a GGUF with `weft export`."
    if any(key in original for key in ("vision_config", "audio_config")):
        raise WeftError(ErrorKind.UNSUPPORTED, f"{kind} reads more than text, and only text calibrates it here.", hint)
    from gptqmodel.models.auto import SUPPORTED_MODELS

    if kind.lower() not in SUPPORTED_MODELS:
        raise WeftError(
            ErrorKind.UNSUPPORTED, f"GPTQModel does not know the architecture {kind or 'of this model'}.", hint
        )
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
    matrices: list[tuple[str, int, int]] = []
    for name, module in model.named_modules():
        if not _INSIDE_A_LAYER.search(f".{name}"):
            continue
        if isinstance(module, torch.nn.Linear):
            matrices.append((name, module.in_features, module.out_features))
        elif type(module).__name__ == "Conv1D":
            matrices.append((name, *module.weight.shape))
    if not matrices:
        raise WeftError(ErrorKind.UNSUPPORTED, f"{kind} has no matrices in layers that could be quantized.", hint)
    total = sum(parameter.numel() for parameter in model.parameters())
    layers = int(getattr(config, "num_hidden_layers", 0) or 0)
    return Shapes(matrices, max(0, total - sum(i * o for _, i, o in matrices)), layers)


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


def check_shapes(plan: QuantizePlan, shapes: Shapes) -> None:
    """Refuse groups that matrices cannot be divided into.

    Raises:
        WeftError: BAD_INPUT with the largest group that fits; UNSUPPORTED where none does.
    """
    step = 8 if plan.method == "awq" else 32  # outputs that are packed together
    for name, inputs, outputs in shapes.matrices:
        if outputs % step:
            raise WeftError(
                ErrorKind.UNSUPPORTED,
                f"{name} has {outputs} outputs, and {plan.method.upper()} packs them by {step}.",
                "Choose other bits, or export a GGUF with `weft export`.",
            )
        if inputs % plan.group_size:
            fitting = [g for g in GROUPS[plan.method] if not any(i % g for _, i, _ in shapes.matrices)]
            raise WeftError(
                ErrorKind.BAD_INPUT if fitting else ErrorKind.UNSUPPORTED,
                f"{name} has {inputs} inputs, which groups of {plan.group_size} do not divide.",
                f"Choose a group size of {fitting[-1]}." if fitting else "Export a GGUF with `weft export`.",
            )


def check_weights(folder: Path) -> int:
    """Refuse what nobody should load: files that cannot be read, and scales that are no numbers. Returns the packed matrices.

    Raises:
        WeftError: CORRUPT, UNSUPPORTED.
    """
    import safetensors
    import torch

    matrices = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(str(file), "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (not a dict)
                matrices += name.endswith(".qweight")
                if name.endswith(".scales") and not bool(torch.isfinite(opened.get_tensor(name)).all()):
                    raise WeftError(
                        ErrorKind.CORRUPT,
                        f"{name.removesuffix('.scales')} came out with scales that are no numbers.",
                        "Check that the model itself answers sensibly, and calibrate on another or a longer text.",
                    )
    if not matrices:
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            "Nothing of this model was quantized.",
            "Export a GGUF with `weft export` instead.",
        )
    return matrices
