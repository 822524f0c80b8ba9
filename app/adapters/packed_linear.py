"""A linear module whose weight stays packed: GPTQ's, AWQ's and HQQ's matrices, on any device, for answers and for training.

Two ways of keeping a matrix:

- `exact`: codes (two to a byte up to 4 bits), scales and zeros as they were saved. Each pass unpacks the matrix in float32, which is
  exact, works for everything, and lets gradients through to the input without keeping the matrix for them.
- `int4`: PyTorch's own 4-bit kernels, of the processor and of NVIDIA's cards; up to 4 bits in one matrix of it, more bits in two
  (sixteens and ones). They compute with bfloat16 scales, 16-bit inputs, and groups of 32, 64, 128 or 256.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from app.adapters.packed_grid import Grid

GROUPS = (256, 128, 64, 32)  # that the 4-bit kernel knows
_HALF = (torch.bfloat16, torch.float16)
_BLOCK = 64  # rows that the kernels' orders take together
_TILES = 8  # of 16 inputs, which the cards' kernel takes together


class PackedLinear(torch.nn.Linear):
    """y = x Wᵀ + b with a packed W. A `torch.nn.Linear` for those who ask; `weight` is W, unpacked anew at each look.

    Args:
        bias: whether there is one. dtype: of the model, and of `weight`.
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool, dtype: torch.dtype) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = inputs, outputs
        self.dtype = dtype
        made = torch.nn.Parameter(torch.empty(outputs, dtype=dtype), requires_grad=False) if bias else None
        self.register_parameter("bias", made)
        self.layout = ""  # "" until `take`
        self.bits = self.group = 0
        self._is_hf_initialized = True  # transformers has nothing to fill here

    # Taking a matrix in ---------------------------------------------------------------------------

    @torch.no_grad()
    def take(self, grid: Grid, layout: str = "exact") -> None:
        """Keep a matrix. `layout`: `exact`, or `int4` where `fits_int4`."""
        self.bits, self.group = grid.bits, grid.group
        self._order(grid.order)
        self.layout = layout
        if layout == "int4":
            self._take_int4(grid)
            return
        codes = grid.codes
        self._shape = tuple(codes.shape)
        self._nibbles = grid.bits <= 4 and codes.numel() % 2 == 0
        if self._nibbles:
            flat = codes.reshape(-1)
            half = flat.numel() // 2
            codes = (flat[:half] << 4) | flat[half:]
        self._hold(codes=codes.contiguous(), scale=grid.scale.contiguous(), zero=grid.zero.contiguous())

    def _hold(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)  # persistent: transformers overwrites all others while it loads

    def _order(self, order: Tensor | None) -> None:
        self._ordered = order is not None
        if order is not None:
            self._hold(order=order)

    def _take_int4(self, grid: Grid) -> None:
        rows, inputs = grid.shape
        codes = grid.codes.reshape(rows, inputs)
        size = next(g for g in GROUPS if grid.group % g == 0)
        scale = grid.scale.float().reshape(rows, -1).repeat_interleave(grid.group // size, 1)
        zero = grid.zero.float().reshape(rows, -1).repeat_interleave(grid.group // size, 1)
        self._size = size
        # The kernel's W is s · (code − 8) + offset, with s and offset in bfloat16: few codes are put in the middle, for small offsets.
        middle = 8 - (1 << min(grid.bits, 4) - 1)
        planes = [(codes + middle, 1.0)] if grid.bits <= 4 else [(codes >> 4, 16.0), (codes & 15, 1.0)]
        rounded = scale.bfloat16().float()
        left = (8.0 * sum(factor for _, factor in planes) - (middle + zero)) * rounded
        for number, (plane, factor) in enumerate(planes):
            offset = left.bfloat16()
            left = left - offset.float()  # what rounding has left, the next plane adds
            both = torch.stack([(rounded * factor).bfloat16(), offset], -1).transpose(0, 1).contiguous()
            self._hold(**{f"packed{number}": to_int4pack(plane), f"scales{number}": both})
        self._planes = len(planes)

    # Reading it -------------------------------------------------------------------------------------

    @property
    def packed_weights(self) -> int:
        """How many weights it stands for."""
        return self.in_features * self.out_features

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return next((buffer.device for buffer in self.buffers(recurse=False)), torch.device("cpu"))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """W in the model's dtype, (out, in)."""
        return self.unpacked(self.dtype) if self.layout else torch.empty(0, dtype=self.dtype)

    @torch.no_grad()
    def unpacked(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W as it is computed with, (out, in), from float32."""
        held: Any = self._buffers
        if self.layout == "int4":
            made = self._planes_unpacked()
        else:
            codes = held["codes"]
            if self._nibbles:
                codes = torch.cat([codes >> 4, codes & 15]).reshape(self._shape)
            made = (codes.float() - held["zero"].float()).mul_(held["scale"].float())
            made = made.reshape(self.out_features, self.in_features)
        if self._ordered:
            made = made[:, held["order"].argsort()]
        return made.to(dtype)

    def _planes_unpacked(self) -> Tensor:
        rows, inputs = self.out_features, self.in_features
        made: Any = None
        for number in range(self._planes):
            scale, offset = self._buffers[f"scales{number}"].float().permute(2, 1, 0)[..., None]
            codes = from_int4pack(self._buffers[f"packed{number}"], rows, inputs)
            values = codes.float().reshape(rows, -1, self._size).mul_(scale).add_(offset - 8 * scale)
            made = values if made is None else made.add_(values)
        return made.reshape(rows, inputs)

    # Computing --------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) to (…, out), in the dtype of x."""
        if self.layout == "int4" and not (torch.is_grad_enabled() and x.requires_grad):
            y = self._by_int4(x)
        else:
            y = _Product.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _by_int4(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features)
        if self._ordered:
            flat = flat[:, self._buffers["order"]]
        flat = flat.to(torch.bfloat16).contiguous()
        kernel = torch.ops.aten
        multiply = kernel._weight_int4pack_mm_for_cpu if flat.device.type == "cpu" else kernel._weight_int4pack_mm
        y: Any = None
        for number in range(self._planes):
            part = multiply(flat, self._buffers[f"packed{number}"], self._size, self._buffers[f"scales{number}"])
            y = part if y is None else y + part
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, layout={self.layout}"
        )


class _Product(torch.autograd.Function):
    """x Wᵀ, whose gradient unpacks W again instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: PackedLinear) -> Tensor:
        ctx.module = module
        return functional.linear(x, module.unpacked(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient @ ctx.module.unpacked(gradient.dtype), None


def fits_int4(grid: Grid, dtype: torch.dtype) -> bool:
    """Whether a 4-bit kernel takes a matrix, and a model of this dtype gains by it."""
    rows, inputs = grid.shape
    device = grid.codes.device.type
    return (
        dtype in _HALF
        and device in ("cpu", "cuda")
        and hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu")
        and grid.bits <= 8
        and grid.group > 0
        and any(grid.group % size == 0 for size in GROUPS)
        and rows % 16 == 0
        and inputs % (32 if device == "cpu" else 16 * _TILES) == 0
    )


def to_int4pack(codes: Tensor) -> Tensor:
    """Codes under 16, uint8 (rows, inputs), in the order of the kernel of their device."""
    if codes.device.type == "cpu":
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32).contiguous(), 1)
    pairs = (codes[:, ::2] << 4) | codes[:, 1::2]
    return torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), _TILES)


def from_int4pack(packed: Tensor, rows: int, inputs: int) -> Tensor:
    """The codes out of the kernel's order, uint8 (rows, inputs)."""
    flat = packed.reshape(-1).view(torch.uint8)
    out = torch.empty(rows, inputs, dtype=torch.uint8, device=packed.device)
    for start in range(0, rows, _BLOCK):
        count = min(_BLOCK, rows - start)
        data = flat[start * inputs // 2 : (start + count) * inputs // 2]
        nibbles = torch.cat([data & 15, data >> 4])
        out[start : start + count] = nibbles.take(_places(count, inputs, packed.device)).reshape(count, inputs)
    return out


@functools.lru_cache(maxsize=16)
def _places(rows: int, inputs: int, device: torch.device) -> Tensor:
    """Where the kernel's order has the nibble of each weight of a block, low nibbles of all bytes first.

    Found out by packing numbers digit by digit: the order differs between processors.
    """
    total = rows * inputs
    number = torch.arange(total, device=device)
    at = torch.zeros(total, dtype=torch.long, device=device)
    for digit in range(0, max(1, (total - 1).bit_length()), 4):
        plane = ((number >> digit) & 15).to(torch.uint8).reshape(rows, inputs)
        packed = to_int4pack(plane).reshape(-1).view(torch.uint8)
        at |= torch.cat([packed & 15, packed >> 4]).long() << digit
    places = torch.empty(total, dtype=torch.long, device=device)
    places[at] = number
    return places
