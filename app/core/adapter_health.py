"""Is an adapter sound? Found from its bytes without a numerical library: matrices of zeros, numbers that are none.

Norms and ranks take arithmetic: app/adapters/health.py measures them in an engine's environment.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from app.core.adapter_file import AdapterFile
from app.core.tensor_info import TensorInfo, tensor_pieces

_CHUNK = 1 << 22  # bytes; a multiple of every element's size


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """What is odd about an adapter's numbers. Names are of modules.

    Attributes:
        zero: B is all zeros: the module changes nothing (an adapter that was never trained has nothing else).
        broken: NaN or infinity stands in one of its tensors: every answer would be spoilt.
        checked: tensors that were looked at; types other than floats are not.
    """

    zero: tuple[str, ...]
    broken: tuple[str, ...]
    checked: int

    def sentences(self, total: int) -> list[str]:
        """What to tell a person. `total`: how many modules the adapter has."""
        told: list[str] = []
        if self.broken:
            told.append(f"It holds values that are no numbers (NaN or infinity) in {_some(self.broken)}.")
        if self.zero and len(self.zero) == total:
            told.append("All of its B matrices are zero: it changes nothing, as if it had never been trained.")
        elif self.zero:
            told.append(f"B is zero in {_some(self.zero)}: there it changes nothing.")
        return told


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 1} more modules" if len(names) > 1 else ""
    return f"{names[0][:80]}{more}"


def look(adapter: AdapterFile) -> Health:
    """Read an adapter's data once, in small pieces.

    Raises:
        WeftError: when the file cannot be read any more.
    """
    zero: list[str] = []
    broken: list[str] = []
    checked = 0
    for module in adapter.modules.values():
        tensors = list(module.saved.values()) + [t for t in (module.tokens,) if t]
        nothing = bool(module.loras) and not tensors
        for lora in module.loras:
            # DoRA's magnitudes change the module even where B is zero.
            nothing = nothing and lora.magnitude is None and lora.bias is None and _is_zero(lora.b)
            tensors += [t for t in (lora.a, lora.b, lora.magnitude, lora.bias) if t]
        if nothing:
            zero.append(module.name)
        checked += len(tensors)
        if any(_not_finite(tensor) for tensor in tensors):
            broken.append(module.name)
    return Health(zero=tuple(zero), broken=tuple(broken), checked=checked)


def _is_zero(tensor: TensorInfo) -> bool:
    """Whether nothing but 0.0 and -0.0 stands in it (-0.0: what a factor of 0 makes of negative numbers)."""
    kind = tensor.type.upper()
    size = 2 if kind == "F16" else _HIGH[kind][0] if kind in _HIGH else 0
    for piece in tensor_pieces(tensor, _CHUNK):
        if piece.count(0) == len(piece):
            continue
        if not size or len(piece.translate(None, b"\0")) != piece[size - 1 :: size].count(0x80):
            return False
    return True


# A float is NaN or infinite when all bits of its exponent are set. They lie in the last byte, and the top of the one before.
_F16 = bytes(b for b in range(256) if b & 0x7C == 0x7C)
_HIGH = {
    "F32": (4, bytes((0x7F, 0xFF)), 0x80),
    "BF16": (2, bytes((0x7F, 0xFF)), 0x80),
    "F64": (8, bytes((0x7F, 0xFF)), 0xF0),
}
_KEEP = {allowed: bytes(b for b in range(256) if b not in allowed) for allowed in (_F16, bytes((0x7F, 0xFF)))}


def _not_finite(tensor: TensorInfo) -> bool:
    kind = tensor.type.upper()
    if kind == "F16":
        return any(piece[1::2].translate(None, _KEEP[_F16]) for piece in tensor_pieces(tensor, _CHUNK))
    if kind not in _HIGH:
        return False
    size, high, mask = _HIGH[kind]
    for piece in tensor_pieces(tensor, _CHUNK):
        last = piece[size - 1 :: size]
        if not last.translate(None, _KEEP[high]):
            continue
        before = piece[size - 2 :: size]
        if any(top in high and below & mask == mask for top, below in zip(last, before, strict=True)):
            return True
    return False
