"""Codes, scales and zeros written as GPTQ's, AWQ's and HQQ's tensors: the other direction of `packed_grid`, whose layouts these are."""

from __future__ import annotations

import torch
from torch import Tensor

from app.adapters.gptq_quantize import Rounded
from app.adapters.packed_grid import AWQ_COLUMNS, SLABS, Grid


def gptq(made: Rounded, bits: int) -> dict[str, Tensor]:
    """`qweight`, `qzeros`, `scales` and `g_idx` in format 1, in which zeros are one too small.

    Args:
        bits: 2, 3, 4 or 8; `out` and `in` are multiples of 32.
    """
    zeros = (made.zeros.T.int() - 1) & ((1 << bits) - 1)  # (groups, out)
    return {
        "qweight": _stream(made.codes.T.int(), bits),
        "qzeros": _stream(zeros.T, bits).T.contiguous(),
        "scales": made.scales.T.contiguous(),
        "g_idx": made.owner,
    }


def awq(made: Rounded) -> dict[str, Tensor]:
    """`qweight`, `qzeros` and `scales` of the gemm layout; 4 bits, `out` a multiple of 8, groups of neighbours."""
    return {
        "qweight": _nibbles(made.codes.T),
        "qzeros": _nibbles(made.zeros.T),
        "scales": made.scales.T.contiguous(),
    }


def hqq(made: Grid) -> dict[str, Tensor]:
    """`W_q`, `scale` and `zero`, and what hqq's own loader reads beside them, as it writes each value into a safetensors file.

    Args:
        made: groups along the inputs; as many rows of them as HQQ's slabs divide.
    """
    bits, codes = made.bits, made.codes
    slabs = SLABS[bits]
    rows = -(-len(codes) // slabs)
    filled = torch.zeros(rows * slabs, codes.shape[1], dtype=torch.int32, device=codes.device)
    filled[: len(codes)] = codes
    packed = torch.zeros(rows, codes.shape[1], dtype=torch.int32, device=codes.device)
    for number, slab in enumerate(filled.reshape(slabs, rows, -1)):
        packed |= slab << bits * (slabs - 1 - number)
    element = torch.int32 if bits == 3 else torch.uint8
    numbers = {"nbits": bits, "group_size": codes.shape[1], "axis": 1}
    switches = {"view_as_float": 0, "channel_wise": 1, "optimize": 1, "round_zero": 0, "offload_meta": 0}
    switches |= {"stores_quant_config": 1, "encoded_state_dict": 1, "quant_scale": 0, "quant_zero": 0}
    words = {"packing": "3bit_32" if bits == 3 else f"{bits}bit_u8", "unpack_view_dtype": str(element)}
    return {
        "W_q": packed.to(element),
        "scale": made.scale.contiguous(),
        "zero": made.zero.contiguous(),
        "shape": torch.tensor(made.shape),
        **{key: torch.tensor(value, dtype=torch.int32) for key, value in numbers.items()},
        **{key: torch.tensor(value, dtype=torch.uint8) for key, value in switches.items()},
        **{key: torch.tensor([ord(letter) for letter in value], dtype=torch.uint8) for key, value in words.items()},
    }


def _stream(codes: Tensor, bits: int) -> Tensor:
    """Codes int32 (n, columns) as a stream of bits down each column: int32 (n · bits / 32, columns)."""
    codes = codes.long()
    if 32 % bits == 0:
        per = 32 // bits
        split = codes.reshape(-1, per, codes.shape[1])
        words = torch.zeros(split.shape[0], split.shape[2], dtype=torch.int64, device=codes.device)
        for i in range(per):
            words |= split[:, i] << bits * i
        return _as_int32(words)
    split = codes.reshape(-1, 32, codes.shape[1])
    words = torch.zeros(split.shape[0], bits, split.shape[2], dtype=torch.int64, device=codes.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        words[:, word] |= split[:, i] << shift  # what reaches beyond 32 bits is cut off below
        if shift + bits > 32:
            words[:, word + 1] |= split[:, i] >> 32 - shift
    return _as_int32(words.flatten(0, 1))


def _nibbles(codes: Tensor) -> Tensor:
    """Codes (rows, columns) as AWQ has them: int32 (rows, columns / 8)."""
    split = codes.long().reshape(codes.shape[0], -1, 8)
    words = torch.zeros(split.shape[:2], dtype=torch.int64, device=codes.device)
    for i, column in enumerate(AWQ_COLUMNS):
        words |= split[:, :, column] << 4 * i
    return _as_int32(words)


def _as_int32(words: Tensor) -> Tensor:
    """The low 32 bits of int64, as int32."""
    low = words & 0xFFFFFFFF
    return torch.where(low >= 2**31, low - 2**32, low).to(torch.int32).contiguous()
