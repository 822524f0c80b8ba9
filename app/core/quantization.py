"""Which quantization a folder holds: from its configs, or from the names and shapes of its tensors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from app.core.formats import JsonObject, SafetensorsTensor
from app.core.library import ModelFormat
from app.core.model_config import number, table, text
from app.core.safetensors_header import DTYPES

_BY_METHOD = {
    "gptq": ModelFormat.GPTQ,
    "awq": ModelFormat.AWQ,
    "exl2": ModelFormat.EXL2,
    "exl3": ModelFormat.EXL3,
    "hqq": ModelFormat.HQQ,
    "bitsandbytes": ModelFormat.BITSANDBYTES,
}
PACKED = frozenset({ModelFormat.GPTQ, ModelFormat.AWQ, ModelFormat.HQQ})  # what Weft unpacks itself
# Tensors that hold no weights of their own, only how to unpack others.
_SIDE = re.compile(
    r"(\.(scales|qzeros|g_idx|q_scale|q_scale_max|q_groups|q_group_map|q_invperm|q_perm|suh|svh|su|sv|mcg|mul1|absmax"
    r"|quant_map|nested_absmax|nested_quant_map|SCB|weight_format|weight_scale|weight_scale_inv|weight_scale_2|input_scale"
    r"|weight_shape|weight_zero_point|weight_g_idx|zero|scale|shape|nbits|axis|group_size|meta)|_scales|quant_state\.\S+)$"
)


class Quantization(NamedTuple):
    """A folder's format, its quantization in words (`4-bit, group 128`), and bits of a packed weight, 0 when mixed."""

    format: ModelFormat
    label: str
    bits: float = 0


def from_config(config: JsonObject, gptq: JsonObject, awq: JsonObject) -> Quantization | None:
    """From config.json's `quantization_config`, AutoGPTQ's quantize_config.json or AWQ's quant_config.json."""
    quantization = table(config, "quantization_config") or table(table(config, "text_config"), "quantization_config")
    if not quantization and gptq:
        quantization = {"quant_method": "gptq", **gptq}
    if not quantization and awq:
        quantization = {"quant_method": "awq", **awq}
    if not quantization:
        return None
    method = text(quantization, "quant_method").lower()
    if not method and (quantization.get("load_in_4bit") or quantization.get("load_in_8bit")):
        method = "bitsandbytes"
    if method == "bitsandbytes":
        return _bitsandbytes(quantization)
    bits = _bits(quantization)
    group = number(quantization, "group_size", "q_group_size")
    if method == "hqq":
        weights = table(table(quantization, "quant_config"), "weight_quant_params")
        bits = bits or number(weights, "nbits")
        group = group or number(weights, "group_size")
    if method in ("exl2", "exl3"):
        return Quantization(_BY_METHOD[method], f"{bits:g} bpw" if bits else method.upper(), bits)
    label = _label(bits, group)
    if method in _BY_METHOD:
        return Quantization(_BY_METHOD[method], label, bits)
    return Quantization(ModelFormat.OTHER, f"{method or 'unknown'} {label}".strip(), bits)


def _bits(quantization: JsonObject) -> float:
    for key in ("bits", "w_bit", "nbits", "num_bits"):
        value = quantization.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 32:
            return value
    return 0


def _bitsandbytes(quantization: JsonObject) -> Quantization:
    if quantization.get("load_in_8bit") or quantization.get("_load_in_8bit"):
        return Quantization(ModelFormat.BITSANDBYTES, "int8", 8)
    kind = text(quantization, "bnb_4bit_quant_type") or "fp4"
    double = ", double" if quantization.get("bnb_4bit_use_double_quant") else ""
    return Quantization(ModelFormat.BITSANDBYTES, f"{kind[:8]}{double}", 4)


def _label(bits: float, group: int) -> str:
    return f"{bits:g}-bit" + (f", group {group}" if group else "") if bits else ""


def from_tensors(tensors: Sequence[SafetensorsTensor]) -> Quantization | None:
    """Without any config: by what the tensors are called and how they are packed. None for plain weights."""
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    for name, shape in shapes.items():
        stem, _, last = name.rpartition(".")
        if last == "qweight" and len(shape) == 2:
            return _gptq_or_awq(stem, shape, shapes)
        if last == "q_weight" and f"{stem}.q_scale" in shapes:
            return Quantization(ModelFormat.EXL2, _per_weight(tensors, ".q_weight"))
        if last == "trellis":
            return Quantization(ModelFormat.EXL3, _per_weight(tensors, ".trellis"))
        if last == "W_q":
            return Quantization(ModelFormat.HQQ, "")
        if ".quant_state.bitsandbytes__" in name:
            return Quantization(ModelFormat.BITSANDBYTES, name.rpartition("__")[2][:8], 4)
        if last == "SCB":
            return Quantization(ModelFormat.BITSANDBYTES, "int8", 8)
    return None


def _gptq_or_awq(stem: str, packed: tuple[int, ...], shapes: dict[str, tuple[int, ...]]) -> Quantization:
    scales, zeros = shapes.get(f"{stem}.scales", ()), shapes.get(f"{stem}.qzeros", ())
    if len(scales) != 2 or not scales[0] or not scales[1]:
        return Quantization(ModelFormat.GPTQ, "")
    groups, columns = scales
    if packed[1] * 8 == columns:  # AWQ packs along the output
        return Quantization(ModelFormat.AWQ, _label(4, packed[0] // groups), 4)
    bits = zeros[1] * 32 // columns if len(zeros) == 2 else 4
    rows = packed[0] * 32 // bits if bits else 0
    return Quantization(ModelFormat.GPTQ, _label(bits, rows // groups if groups > 1 else 0), bits)


def _per_weight(tensors: Sequence[SafetensorsTensor], ending: str) -> str:
    bits = sum(tensor.bytes for tensor in tensors if tensor.name.endswith(ending)) * 8
    weights = sum(
        count for tensor, count in zip(tensors, _counts(tensors, 0), strict=True) if tensor.name.endswith(ending)
    )
    return f"{bits / weights:.2g} bpw" if weights else ""


def parameters(tensors: Sequence[SafetensorsTensor], bits: float) -> int:
    """How many weights the tensors stand for, packed ones unpacked.

    Args:
        tensors: of all files. bits: of a packed weight where the names alone do not tell; 0 when unknown.
    """
    return sum(_counts(tensors, bits))


def _counts(tensors: Sequence[SafetensorsTensor], bits: float) -> list[int]:
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    packed4 = {name.partition(".quant_state.")[0] for name in shapes if ".quant_state.bitsandbytes__" in name}
    return [_count(tensor, bits, shapes, packed4) for tensor in tensors]


def _count(tensor: SafetensorsTensor, bits: float, shapes: dict[str, tuple[int, ...]], packed4: set[str]) -> int:
    name, shape = tensor.name, tensor.shape
    stem, _, last = name.rpartition(".")
    if _SIDE.search(name) and not (last in ("zero", "scale", "shape", "meta") and f"{stem}.W_q" not in shapes):
        return 0
    width = DTYPES[tensor.dtype]
    if last in ("qweight", "weight_packed") and width == 32:
        return int(tensor.elements * 32 / (bits or 4))
    if last == "q_weight" and len(shapes.get(f"{stem}.q_scale", ())) == 2:
        rows = shapes.get(f"{stem}.q_invperm") or shapes.get(f"{stem}.q_perm") or (0,)
        return rows[0] * shapes[f"{stem}.q_scale"][1] * 8
    if last == "trellis" and len(shape) == 3:
        return shape[0] * shape[1] * 256  # tiles of 16 by 16
    if last == "W_q":
        if width == 32:
            return tensor.elements * 10  # 3-bit: ten in 32 bits
        return int(tensor.elements * 8 / bits) if 0 < bits < 8 and width == 8 else tensor.elements
    if name in packed4 or name.endswith("_blocks") or (last == "weight" and f"{stem}.weight_scale_2" in shapes):
        return tensor.elements * 2  # two 4-bit values in a byte
    return tensor.elements


def plain_label(tensors: Sequence[SafetensorsTensor]) -> str:
    """`BF16`, `F16`, `F32`: the type that most bytes are of."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.dtype] += tensor.bytes
    return sizes.most_common(1)[0][0] if sizes else ""
