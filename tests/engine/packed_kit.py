"""Folders as GPTQ, AWQ and HQQ save them, made of a small model by rounding to the nearest; packed by code of the tests' own.

The reference is a plain model that holds what the packed numbers stand for, in float32.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import load_file, save_file

from app.core.library import ModelEntry
from app.core.recognise import recognise_model
from tests.engine import tiny_models

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
MATRICES = ("_proj.weight", "w1.weight", "w2.weight", "w3.weight")
SLABS = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}


class Packed(NamedTuple):
    """A packed folder: what the library says of it, and a plain model in float32 with the same numbers."""

    entry: ModelEntry
    reference: Any

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The matrices that are packed, float32, (out, in)."""
        return {
            name: module.weight.detach()
            for name, module in self.reference.named_modules()
            if isinstance(module, torch.nn.Linear) and ".layers." in f".{name}"
        }


def entry_of(folder: Path) -> ModelEntry:
    """What the library's scan says of a folder."""
    found = recognise_model(folder)
    assert found is not None and not found.problem, found
    return found


def make(folder: Path, seed: int, family: str = "llama", **changes: Any) -> Path:
    """A 16-bit folder to pack."""
    settings = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "initializer_range": 0.15}
    tiny_models.make(folder, family, seed=seed, dtype=torch.float16, **{**settings, **changes})
    return folder


def words_of(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes (n, columns) as a stream of bits down each column, in words of 32."""
    words = torch.zeros(-(-len(codes) * bits // 32) + 1, codes.shape[1], dtype=torch.int64)
    for number, row in enumerate(codes.long()):
        word, shift = divmod(number * bits, 32)
        wide = row << shift
        words[word] |= wide & 0xFFFFFFFF
        words[word + 1] |= wide >> 32
    words = words[: len(codes) * bits // 32]
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def rounded(
    weight: torch.Tensor, bits: int, group: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes (out, in), scales and zeros (out, groups), and what they stand for (out, in): whole zeros, float16 scales."""
    most = 2**bits - 1
    values = weight.float().reshape(weight.shape[0], -1, group)
    low, high = values.amin(-1).clamp(max=0), values.amax(-1).clamp(min=0)
    scale = ((high - low) / most).half()
    zero = (-low / scale.float()).round().clamp(0, most)
    codes = (values / scale.float()[..., None] + zero[..., None]).round().clamp(0, most)
    back = (codes - zero[..., None]) * scale.float()[..., None]
    return codes.reshape(weight.shape), scale, zero, back.reshape(weight.shape)


def one_sided(weight: torch.Tensor, group: int) -> torch.Tensor:
    """A matrix some of whose groups hold nothing below 0."""
    changed = weight.clone()
    changed[::7, :group] = changed[::7, :group].abs()
    return changed


def gptq_parts(weight: torch.Tensor, bits: int, group: int, version: int, order: torch.Tensor | None) -> Any:
    """GPTQ's tensors of a matrix, and what they stand for. Some groups have a zero of 0.

    Format 1 as GPTQModel writes it: a one taken from each code, with 2, 4 and 8 bits all of a word's in one subtraction.
    """
    taken = one_sided(weight if order is None else weight[:, order], group)
    codes, scale, zero, back = rounded(taken, bits, group)
    owner = torch.arange(weight.shape[1]) // group
    if order is not None:
        place = order.argsort()
        codes, back, owner = codes[:, place], back[:, place], owner[place]
    whole = version == 1 and 32 % bits == 0
    zeros = words_of((zero - 1 if version == 1 and not whole else zero).long() & (2**bits - 1), bits)
    if whole:
        words = zeros.long() - sum(1 << place for place in range(0, 32, bits))
        zeros = torch.where(words < -(2**31), words + 2**32, words).to(torch.int32)
    return {
        "qweight": words_of(codes.T, bits),
        "qzeros": zeros.T.contiguous(),
        "scales": scale.T.contiguous(),
        "g_idx": owner.to(torch.int32),
    }, back


def awq_parts(weight: torch.Tensor, group: int) -> Any:
    """AWQ's tensors of a matrix, and what they stand for."""
    codes, scale, zero, back = rounded(weight, 4, group)

    def pack(values: torch.Tensor) -> torch.Tensor:
        eights = values.long().reshape(values.shape[0], -1, 8)
        words = sum(eights[..., column] << 4 * place for place, column in enumerate(AWQ_ORDER))
        return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).contiguous()

    return {"qweight": pack(codes.T), "qzeros": pack(zero.T), "scales": scale.T.contiguous()}, back


def hqq_parts(weight: torch.Tensor, bits: int, group: int, axis: int) -> Any:
    """HQQ's tensors of a matrix as its safetensors have them, and what they stand for."""
    most, values = 2**bits - 1, weight.float()
    values = values.reshape(-1, group) if axis == 1 else values.reshape(group, -1)
    low, high = values.amin(axis, keepdim=True), values.amax(axis, keepdim=True)
    scale = ((high - low) / most).half()
    zero = (-low / scale.float()).half()  # no whole number
    codes = (values / scale.float() + zero.float()).round().clamp(0, most)
    back = ((codes - zero.float()) * scale.float()).reshape(weight.shape)
    slabs = SLABS[bits]
    rows = -(-len(codes) // slabs)
    filled = torch.zeros(rows * slabs, codes.shape[1], dtype=torch.int64)
    filled[: len(codes)] = codes.long()
    packed = sum(slab << bits * (slabs - 1 - number) for number, slab in enumerate(filled.reshape(slabs, rows, -1)))
    return {
        "W_q": packed.to(torch.int32 if bits == 3 else torch.uint8),
        "scale": scale,
        "zero": zero,
        "shape": torch.tensor(weight.shape),
        "nbits": torch.tensor(bits, dtype=torch.int32),
        "axis": torch.tensor(axis, dtype=torch.int32),
        "group_size": torch.tensor(group, dtype=torch.int32),
        "packing": torch.tensor([ord(letter) for letter in f"{bits}bit"], dtype=torch.uint8),
        "stores_quant_config": torch.tensor(1, dtype=torch.uint8),
    }, back


def pack(
    base: Path,
    folder: Path,
    method: str,
    *,
    bits: int = 4,
    group: int = 32,
    version: int = 1,
    act_order: bool = False,
    axis: int = 1,
    seed: int = 0,
    name: str = "model.safetensors",
    biases: bool = False,
    metadata: bool = True,
) -> Packed:
    """Make a packed folder of a 16-bit one.

    Args:
        group: -1 for a whole column. version: of GPTQ's zeros. act_order: columns in a random order. axis: HQQ's.
        name: of the weight file. biases: zeros where the model has none, as AutoGPTQ wrote them. metadata: in config.json.
    """
    folder.mkdir()
    for path in base.iterdir():
        if path.suffix in (".json", ".jinja", ".model") and path.name != "config.json":
            (folder / path.name).write_bytes(path.read_bytes())
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(base / "model.safetensors")
    plain = dict(tensors)
    for key in [k for k in tensors if ".layers." in k and k.endswith(MATRICES)]:
        weight, stem = tensors.pop(key), key.removesuffix(".weight")
        size = group if group > 0 else weight.shape[1]
        if method == "gptq":
            order = torch.randperm(weight.shape[1], generator=generator) if act_order else None
            parts, back = gptq_parts(weight, bits, size, version, order)
        elif method == "awq":
            parts, back = awq_parts(weight, size)
        else:
            parts, back = hqq_parts(weight, bits, size, axis)
        tensors |= {f"{stem}.{part}": value for part, value in parts.items()}
        if biases:
            tensors[f"{stem}.bias"] = torch.zeros(weight.shape[0], dtype=torch.float16)
        plain[key] = back.contiguous()
    save_file(tensors, folder / name, {"format": "pt"})
    config = json.loads((base / "config.json").read_text("utf-8"))
    with tempfile.TemporaryDirectory() as unpacked:
        save_file(plain, Path(unpacked) / "model.safetensors", {"format": "pt"})
        (Path(unpacked) / "config.json").write_text(json.dumps(config), "utf-8")
        reference = transformers.AutoModelForCausalLM.from_pretrained(unpacked, dtype=torch.float32).eval()
    table: dict[str, Any] = {"quant_method": method, "bits": bits, "group_size": group}
    if method == "gptq":
        table |= {"desc_act": act_order, "checkpoint_format": "gptq_v2" if version == 2 else "gptq"}
    elif method == "awq":
        table |= {"version": "gemm", "zero_point": True}
    else:
        table = {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": bits, "group_size": group}}}
    if metadata:
        config["quantization_config"] = table
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return Packed(entry_of(folder), reference)
