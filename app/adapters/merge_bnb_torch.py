"""Bases that bitsandbytes has packed (4 and 8 bits): unpacked tensor by tensor, merged, and packed again where wanted.

Packing loses: what it loses of every matrix that adapters change is measured while it is done, and told.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from app.adapters.merge_files import TORCH_NAMES, StoredTensor
from app.adapters.merge_names_torch import blocks_of
from app.adapters.merge_stream_torch import Merge
from app.adapters.merge_tensor_torch import MergedTensor
from app.adapters.merge_unpacking_torch import STORED_AS, UnpackingFiles
from app.core.errors import ErrorKind, WeftError

_LONGER = 32  # bytes by which the description of a packed tensor may grow: a number in it has more digits
_FORMAT = "weight_format"  # of 8 bits: 0 says that rows lie one after the other
_BLOCKS = frozenset({32, 64, 128, 256, 512, 1024, 2048, 4096})


class Packed(NamedTuple):
    """A packed matrix: its own bytes and what belongs to them.

    Attributes:
        parts: by what follows the matrix's name (`absmax`, `quant_map`, …), `SCB` for 8 bits.
        state: the description of 4 bits; empty for 8.
    """

    stored: StoredTensor
    parts: dict[str, StoredTensor]
    state: dict[str, Any]


class UnpackedFiles(UnpackingFiles):
    """The tensors of a packed folder as if it had never been packed.

    Args:
        dtype: of the matrices of 8 bits, which do not say theirs.

    Attributes:
        original: the tensors as they lie there. packed: those that are packed, by name.
    """

    def __init__(self, files: Iterable[Path], dtype: str) -> None:
        super().__init__(files)
        self.original = dict(self.tensors)
        self.packed: dict[str, Packed] = {}
        try:
            for name in self.original:
                self._find(name, STORED_AS.get(dtype, "BF16"))
        except BaseException:
            self.close()
            raise
        hidden = {part.name for packed in self.packed.values() for part in packed.parts.values()}
        self.tensors = {name: self.tensors[name] for name in self.original if name not in hidden}

    def _find(self, name: str, dtype: str) -> None:
        stored = self.original[name]
        parts = {key.removeprefix(f"{name}."): t for key, t in self.original.items() if key.startswith(f"{name}.")}
        module = name.rpartition(".")[0]
        state_key = next((key for key in parts if key.startswith("quant_state.bitsandbytes__")), "")
        if state_key:
            state = self._state(name, parts[state_key])
            shape = tuple(state["shape"])
            kept = STORED_AS[state["dtype"]]
            self.packed[name] = Packed(stored, parts, state)
        elif stored.dtype == "I8" and f"{module}.SCB" in self.original:
            parts = {k: t for k in ("SCB", _FORMAT) if (t := self.original.get(f"{module}.{k}")) is not None}
            if _FORMAT in parts and any(self.stored_bytes(parts[_FORMAT])):
                raise WeftError(
                    ErrorKind.UNSUPPORTED,
                    f"{name[:80]} is packed in an order that only a graphics card reads.",
                    "Merge into the 16-bit model that it was made from.",
                )
            shape, kept = stored.shape, dtype
            self.packed[name] = Packed(stored, parts, {})
        else:
            return
        self.promise(name, kept, shape, stored.file)

    def _state(self, name: str, part: StoredTensor) -> dict[str, Any]:
        """The description of a packed tensor, checked: bitsandbytes would believe it."""
        try:
            state = json.loads(self.stored_bytes(part)) if part.bytes < 65536 else {}
            shape, packed = state["shape"], self.original[name].bytes
            good = (
                len(shape) == 2
                and all(type(extent) is int and extent > 0 for extent in shape)
                and (math.prod(shape) + 1) // 2 == packed
                and state["blocksize"] in _BLOCKS
                and state["quant_type"] in ("nf4", "fp4")
                and state["dtype"] in STORED_AS
            )
        except (ValueError, KeyError, TypeError, RecursionError, AttributeError):
            good, state = False, {}
        if not good:
            raise WeftError(
                ErrorKind.CORRUPT,
                f"The description of the packed tensor {name[:80]} is damaged.",
                "Get the model again.",
            )
        return state

    def matrix(self, name: str) -> Tensor:
        """A packed matrix, unpacked: of its own dtype from 4 bits, float32 from 8."""
        packed = self.packed[name]
        data = self.stored_tensor(packed.stored)
        if packed.state:
            return unpack_4bit(data, {key: self.stored_tensor(part) for key, part in packed.parts.items()})
        return data.float() * (self.stored_tensor(packed.parts["SCB"]).float()[:, None] / 127.0)


def unpack_4bit(data: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    """A matrix from its packed bytes and what bitsandbytes stores beside them."""
    from bitsandbytes import functional

    state = functional.QuantState.from_dict(dict(parts), device=torch.device("cpu"))
    return functional.dequantize_4bit(data.reshape(-1, 1), state)


class Repacked:
    """A matrix packed again after the merge. Its parts are asked for one by one; the loss is measured once.

    Attributes:
        loss: relative error of the packed matrix against the merged one (root of the mean square); None before.
        lost: the same error in terms of what adapters changed.
    """

    def __init__(self, files: UnpackedFiles, merged: MergedTensor, packed: Packed) -> None:
        self._files, self._merged, self._packed = files, merged, packed
        self.loss: float | None = None
        self.lost: float | None = None

    def parts(self) -> dict[str, bytes]:
        """The bytes of all parts, by what follows the matrix's name; "" is the matrix itself."""
        dtype = getattr(torch, TORCH_NAMES[self._merged.dtype])
        data = bytearray(b"".join(bytes(chunk) for chunk in self._merged.chunks()))
        value = torch.frombuffer(data, dtype=dtype).reshape(self._merged.shape)
        made, again = self._pack_4bit(value) if self._packed.state else self._pack_8bit(value)
        if self.loss is None:
            base = torch.empty_like(value)
            view = memoryview(base.view(torch.uint8).reshape(-1).numpy())
            self._files.read(self._merged.source, 0, view)
            error = float((again.float() - value.float()).norm())
            self.loss = error / max(float(value.float().norm()), 1e-30)
            self.lost = error / max(float((value.float() - base.float()).norm()), 1e-30)
        return made

    def _pack_4bit(self, value: Tensor) -> tuple[dict[str, bytes], Tensor]:
        from bitsandbytes import functional

        state = self._packed.state
        data, made = functional.quantize_4bit(
            value,
            blocksize=state["blocksize"],
            compress_statistics="nested_absmax" in self._packed.parts,
            quant_type=state["quant_type"],
        )
        again = functional.dequantize_4bit(data, made)
        parts = {key: _bytes(tensor) for key, tensor in made.as_dict(packed=True).items()}
        return {"": _bytes(data), **parts}, again

    def _pack_8bit(self, value: Tensor) -> tuple[dict[str, bytes], Tensor]:
        from bitsandbytes import functional

        data, scales, _ = functional.int8_vectorwise_quant(value.to(torch.float16))
        return {"": _bytes(data), "SCB": _bytes(scales.float())}, data.float() * (scales.float()[:, None] / 127.0)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


class PackedPart:
    """One stored tensor of a matrix that is packed again: what a writer takes for a merged tensor."""

    def __init__(self, repacked: Repacked, source: StoredTensor, suffix: str, cache: _Last) -> None:
        self._repacked, self.source, self._suffix, self._cache = repacked, source, suffix, cache
        self.name, self.dtype, self.shape = source.name, source.dtype, source.shape
        self.changed, self.copied = True, False
        if suffix.startswith("quant_state."):
            self.shape = (source.shape[0] + _LONGER,)

    @property
    def bytes(self) -> int:
        """How many bytes it takes."""
        return math.prod(self.shape) * self.source.item

    @property
    def row_bytes(self) -> int:
        return self.bytes  # it is one piece

    @property
    def pieces(self) -> list[tuple[int, int]]:
        return [(0, 1)]

    def prepared(self) -> PackedPart:
        """Itself: what it needs is made with its first byte."""
        return self

    def fill(self, start: int, end: int, buffer: memoryview) -> None:
        """Write all of it into a buffer."""
        del start, end
        data = self._cache.parts(self._repacked)[self._suffix]
        if self._suffix.startswith("quant_state."):
            data = data.ljust(len(buffer))  # JSON may end in blanks
        if len(data) != len(buffer):
            raise WeftError(
                ErrorKind.UNSUPPORTED,
                f"{self.name} would be packed into {len(data):,} bytes, where the base has {len(buffer):,}.",
                "Merge into 16 bits instead.",
            )
        buffer[:] = data


class _Last:
    """The parts of the matrix that was packed last: they are written one after the other."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of: Repacked | None = None
        self._parts: dict[str, bytes] = {}

    def parts(self, repacked: Repacked) -> dict[str, bytes]:
        with self._lock:
            if self._of is not repacked:
                self._parts = repacked.parts()
                self._of = repacked
            return self._parts


def pack_again(merge: Merge, files: UnpackedFiles) -> tuple[list[Any], list[Repacked]]:
    """What to write instead of `merge.tensors`, so that the result is packed as the base is.

    Returns:
        Tensors in the order of the base's files, and the matrices among them that are packed anew.

    Raises:
        WeftError: UNSUPPORTED for matrices that are stored in a way that is not made here.
    """
    made: list[Any] = []
    repacked: list[Repacked] = []
    last = _Last()
    for tensor in merge.tensors:
        packed = files.packed.get(tensor.source.key or tensor.source.name)
        if packed is None:
            made.append(tensor)
            continue
        if tensor.name != packed.stored.name or packed.stored.dtype not in ("U8", "I8"):
            raise WeftError(
                ErrorKind.UNSUPPORTED,
                f"{tensor.name} cannot be packed again as the base has it.",
                "Merge into 16 bits instead.",
            )
        parts = [("", packed.stored), *packed.parts.items()]
        if not tensor.changed:
            made += [_as_it_is(merge, t) for _, t in parts]
            continue
        one = Repacked(files, tensor, packed)
        repacked.append(one)
        made += [_as_it_is(merge, t) if suffix == _FORMAT else PackedPart(one, t, suffix, last) for suffix, t in parts]
    return made, repacked


def _as_it_is(merge: Merge, stored: StoredTensor) -> MergedTensor:
    blocks = blocks_of("", stored.shape)
    return MergedTensor(merge, stored.name, stored.dtype, stored.shape, stored, [[] for _ in blocks], blocks)


def loss_note(repacked: Iterable[Repacked]) -> str:
    """What packing again has lost, in a sentence."""
    found = [(one.loss, one.lost) for one in repacked if one.loss is not None and one.lost is not None]
    if not found:
        return ""
    mean = sum(loss for loss, _ in found) / len(found)
    worst = max(loss for loss, _ in found)
    share = sum(lost for _, lost in found) / len(found)
    return (
        f"Packed again by bitsandbytes: {len(found)} matrices lost {mean:.1%} of their size on average, {worst:.1%} at worst; "
        f"that is {share:.0%} of what the adapters changed in them."
    )
