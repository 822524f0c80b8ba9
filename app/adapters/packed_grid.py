"""Weights that GPTQ, AWQ and HQQ have packed, read into one form: small whole numbers on a grid, with a scale and a zero a group.

Layouts, all in words of 32 bits unless said otherwise; W is (out, in), q the codes:

- GPTQ: `qweight` (in · bits / 32, out), a stream of bits down each column; `qzeros` (groups, out · bits / 32) the same along each row;
  `scales` (groups, out); `g_idx` (in,) the group of each input. In format 1 zeros are one too small. GPTQModel takes the ones from whole
  words (a zero of 0 borrows from its neighbour), with 3 bits code by code.
- AWQ, gemm: `qweight` (in, out / 8), the nibbles of a word standing for columns 0 2 4 6 1 3 5 7; `qzeros` so too; `scales` (groups, out).
- HQQ: `W_q`, groups as rows (axis 1) or columns (axis 0), packed by slabs of rows, the first slab in the highest bits; 3 bits ten to a word;
  `scale` and `zero` beside it, zeros no whole numbers.

Sources: the GPTQ, AWQ and HQQ papers' programs, of which the tests hold GPTQModel's and hqq's to the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from app.core.errors import ErrorKind, WeftError

AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # column of a nibble, counted from the lowest
SLABS = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}  # HQQ: codes in an element
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}  # a one in every code of a word
LARGEST = 2**34  # weights of a matrix: beyond this a header lies


class Grid(NamedTuple):
    """A matrix as W = ((codes − zero) · scale), laid out (out, in), columns in `order`.

    Attributes:
        codes: uint8, 2-D: (out · groups, group) where groups lie along the inputs, else (group, out · in / group).
        scale, zero: float, (out · groups, 1) or (1, out · in / group).
        shape: (out, in). bits: of the largest code.
        order: the input that each column stands for; None for their own order.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    shape: tuple[int, int]
    bits: int
    order: Tensor | None = None

    @property
    def group(self) -> int:
        """Inputs that share a scale; 0 where groups do not lie along the inputs."""
        return self.codes.shape[1] if self.scale.shape[1] == 1 else 0

    def weight(self) -> Tensor:
        """W, float32, (out, in)."""
        values = (self.codes.float() - self.zero.float()).mul_(self.scale.float()).reshape(self.shape)
        return values if self.order is None else values[:, self.order.argsort()]


def damaged(name: str, why: str) -> WeftError:
    return WeftError(
        ErrorKind.CORRUPT, f"The packed matrix {name[-80:]} is damaged: {why}.", "Download the model again."
    )


def _stream(words: Tensor, bits: int) -> Tensor:
    """Codes out of a stream of bits down each column. Words int32 (n, columns); returns uint8 (n · 32 / bits, columns)."""
    most = (1 << bits) - 1
    if 32 % bits == 0:
        per = 32 // bits
        out = torch.empty(words.shape[0], per, words.shape[1], dtype=torch.uint8, device=words.device)
        for i in range(per):
            out[:, i] = (words >> bits * i) & most
        return out.flatten(0, 1)
    blocks = words.reshape(-1, bits, words.shape[1])
    out = torch.empty(blocks.shape[0], 32, words.shape[1], dtype=torch.uint8, device=words.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        value = (blocks[:, word] >> shift) & ((1 << min(bits, 32 - shift)) - 1)
        if shift + bits > 32:
            value = value | ((blocks[:, word + 1] << 32 - shift) & most)
        out[:, i] = value
    return out.flatten(0, 1)


def gptq(name: str, parts: Mapping[str, Tensor], inputs: int, *, version: int = 1) -> Grid:
    """From GPTQ's tensors. Bits, groups and the order of columns are what the shapes say.

    Args:
        parts: `qweight`, `qzeros`, `scales`, and `g_idx` where there is one. version: 1, or 2 for zeros stored as they are.

    Raises:
        WeftError: CORRUPT when shapes or indices disagree.
    """
    packed, zeros, scales = (_part(name, parts, key, 2) for key in ("qweight", "qzeros", "scales"))
    groups, out = scales.shape
    bits, rest = divmod(packed.shape[0] * 32, inputs)
    if rest or bits not in range(2, 9) or packed.shape[1] != out or packed.dtype is not torch.int32:
        raise damaged(name, f"its qweight is {tuple(packed.shape)} for {inputs} inputs and {out} outputs")
    if bits in (5, 6, 7):
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            f"{name[-80:]} has {bits} bits, which GPTQ's programs save in a layout of planes (gptq_p) that is not read here.",
            "Get the model in 2, 3, 4 or 8 bits, or its 16-bit original.",
        )
    if 32 % bits and (packed.shape[0] % bits or zeros.shape[1] % bits):
        raise damaged(name, f"{bits} bits do not fill its words")
    if zeros.dtype is not torch.int32 or zeros.shape[0] != groups or zeros.shape[1] * 32 < out * bits:
        raise damaged(name, f"its qzeros are {tuple(zeros.shape)} for {groups} groups")
    if version == 1 and bits in _ONES:
        zeros = zeros + _ONES[bits]  # int32 wraps, as it did when the ones were taken away
    zero = _stream(zeros.T.contiguous(), bits)[:out].T  # (groups, out)
    if version == 1 and bits not in _ONES:
        zero = (zero + 1) & ((1 << bits) - 1)
    codes = _stream(packed, bits)[:inputs]
    owner = parts.get("g_idx")
    order: Tensor | None = None
    if owner is not None and groups > 1 and not bool(owner.any()):
        owner = None  # nobody filled it in: other readers take it for absent too
    if owner is not None:
        owner = owner.reshape(-1).long()
        if owner.shape[0] != inputs or int(owner.min()) < 0 or int(owner.max()) >= groups:
            raise damaged(name, "its g_idx names groups that there are not")
        if not bool(torch.bincount(owner, minlength=groups).all()):
            raise damaged(name, "its g_idx leaves out a group")
        if bool((owner[1:] < owner[:-1]).any()):
            order = owner.argsort(stable=True)
            codes, owner = codes[order], owner[order]
    else:
        size = -(-inputs // groups)
        owner = torch.arange(inputs, device=packed.device) // size
        if int(owner.max()) != groups - 1:
            raise damaged(name, f"{groups} groups do not divide its {inputs} inputs")
    return _along(codes, scales, zero, owner, bits, order)


def awq(name: str, parts: Mapping[str, Tensor], inputs: int) -> Grid:
    """From the tensors of AWQ's gemm layout.

    Raises:
        WeftError: CORRUPT when shapes disagree; UNSUPPORTED for other layouts of AWQ.
    """
    packed, zeros, scales = (_part(name, parts, key, 2) for key in ("qweight", "qzeros", "scales"))
    groups, out = scales.shape
    if packed.dtype is not torch.int32 or packed.shape != (inputs, out // 8) or out % 8:
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            f"{name[-80:]} is packed in a layout of AWQ that is not read here ({tuple(packed.shape)} {packed.dtype}).",
            "Get the model in AWQ's gemm layout, which is the usual one, or its 16-bit original.",
        )
    if zeros.shape != (groups, out // 8) or zeros.dtype is not torch.int32 or inputs % groups:
        raise damaged(name, f"its qzeros are {tuple(zeros.shape)} for {groups} groups")

    def columns(words: Tensor) -> Tensor:
        found = torch.empty(*words.shape, 8, dtype=torch.uint8, device=words.device)
        for i, column in enumerate(AWQ_COLUMNS):
            found[:, :, column] = (words >> 4 * i) & 15
        return found.flatten(1)

    owner = torch.arange(inputs, device=packed.device) // (inputs // groups)
    return _along(columns(packed), scales, columns(zeros), owner, 4, None)


def _along(codes: Tensor, scales: Tensor, zero: Tensor, owner: Tensor, bits: int, order: Tensor | None) -> Grid:
    """A grid of codes (in, out), scales and zeros (groups, out), owner (in,) the group of each input, not falling."""
    inputs, out = codes.shape
    counts = torch.bincount(owner, minlength=scales.shape[0])
    group = math.gcd(*(int(c) for c in counts))  # groups of unlike size become several of equal size
    of = owner[::group]
    return Grid(
        codes.T.reshape(-1, group),
        scales[of].T.reshape(-1, 1),
        zero[of].T.reshape(-1, 1).to(torch.float16),  # whole numbers under 2048
        (out, inputs),
        bits,
        order,
    )


def hqq(name: str, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Grid:
    """From HQQ's tensors.

    Args:
        parts: `W_q`, `scale`, `zero`; `nbits` and `axis` where they are known.

    Raises:
        WeftError: CORRUPT when shapes disagree; UNSUPPORTED for scales that are packed themselves.
    """
    if "scale" not in parts or "zero" not in parts:
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            f"The scales of {name[-80:]} are packed themselves, which HQQ has given up.",
            "Quantize the 16-bit model again, with load_in_hqq.",
        )
    packed, scale, zero = _part(name, parts, "W_q", 2), parts["scale"], parts["zero"]
    bits = _number(name, parts, "nbits") or 0
    if packed.is_floating_point():  # view_as_float: the same bytes under another name
        packed = packed.view(torch.int32 if bits == 3 else torch.uint8)
    count = shape[0] * shape[1]
    if not bits:
        bits = 3 if packed.dtype is torch.int32 else round(packed.numel() * 8 / count)
    slabs = SLABS.get(1 if bits == 1 else bits)
    if slabs is None or packed.dtype is not (torch.int32 if bits == 3 else torch.uint8):
        raise damaged(name, f"it has {bits} bits in {packed.dtype}")
    if scale.dim() != 2 or scale.shape != zero.shape or 1 not in scale.shape:
        raise damaged(name, f"its scale is {tuple(scale.shape)}, its zero {tuple(zero.shape)}")
    axis = _number(name, parts, "axis")
    across = scale.shape[0] == 1 if axis is None else axis == 0
    groups = scale.numel()
    if (
        groups == 0
        or count % groups
        or scale.shape[1 - across] != 1
        or packed.shape[1] != (groups if across else count // groups)
    ):
        raise damaged(name, f"its W_q is {tuple(packed.shape)} for {groups} groups of {count} weights")
    codes = torch.empty(slabs, *packed.shape, dtype=torch.uint8, device=packed.device)
    for slab in range(slabs):
        codes[slab] = (packed >> bits * (slabs - 1 - slab)) & ((1 << bits) - 1)
    rows = count // packed.shape[1]
    codes = codes.flatten(0, 1)
    if not 0 <= codes.shape[0] - rows < slabs:
        raise damaged(name, f"its W_q is {tuple(packed.shape)} for {count} weights")
    return Grid(codes[:rows], scale, zero, shape, bits)


def _number(name: str, parts: Mapping[str, Tensor], key: str) -> int | None:
    found = parts.get(key)
    if found is None:
        return None
    if found.numel() != 1 or not math.isfinite(found.item()) or found.item() % 1:
        raise damaged(name, f"its {key} is no whole number")
    return int(found.item())


def _part(name: str, parts: Mapping[str, Tensor], key: str, dimensions: int) -> Tensor:
    found = parts.get(key)
    if found is None or found.dim() != dimensions or not 0 < found.numel() < LARGEST:
        raise damaged(name, f"its {key} is missing" if found is None else f"its {key} is {tuple(found.shape)}")
    return found
