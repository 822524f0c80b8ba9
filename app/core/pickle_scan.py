"""Which code would a pickled checkpoint run? Read opcode by opcode, before torch is even imported.

What passes is what `torch.load(weights_only=True)` itself can read: its opcodes and its globals, no more.
Both container formats are known: the zip of torch 1.6 and later, and the row of pickles before it.
"""

from __future__ import annotations

import pickletools
import re
import struct
import zipfile
from pathlib import Path
from typing import BinaryIO

from app.core.errors import ErrorKind, WeftError
from app.core.gguf_header import os_error

MAX_PICKLE = 32 * 1024 * 1024  # bytes; the pickle of 10,000 tensors takes 2 MiB
MAX_OPCODES = 2_000_000
MAX_DIRECTORY = 8 * 1024 * 1024  # bytes of a zip's directory
MAX_MEMBERS = 100_000

_DTYPES = (
    "float64 double float32 float float16 half bfloat16 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz "
    "float8_e8m0fnu float4_e2m1fn_x2 uint8 int8 int16 short int32 int int64 long bool uint16 uint32 uint64 complex32 "
    "chalf complex64 cfloat complex128 cdouble quint8 qint8 qint32 quint4x2 quint2x4 bits1x8 bits2x4 bits4x2 bits8 "
    "bits16 uint1 uint2 uint3 uint4 uint5 uint6 uint7 int1 int2 int3 int4 int5 int6 int7 per_tensor_affine "
    "per_tensor_symmetric per_channel_affine per_channel_symmetric per_channel_affine_float_qparams"
)
_KINDS = ["Double", "Float", "Half", "BFloat16", "Byte", "Char", "Short", "Int", "Long", "Bool"]
_STORAGES = [*_KINDS, "ComplexDouble", "ComplexFloat", "QUInt8", "QInt8", "QInt32", "QUInt4x2", "QUInt2x4"]
_REBUILDERS = (
    "parameter parameter_with_state qtensor tensor tensor_v2 tensor_v3 sparse_tensor meta_tensor_no_storage nested_tensor "
    "wrapper_subclass device_tensor_from_numpy device_tensor_from_cpu_tensor"
)

ALLOWED: frozenset[str] = frozenset(
    [
        "collections.OrderedDict",
        "collections.Counter",
        "torch.nn.parameter.Parameter",
        "torch.serialization._get_layout",
        "torch.Size",
        "torch.Tensor",
        "torch.device",
        "torch._tensor._rebuild_from_type_v2",
        "torch.storage.TypedStorage",
        "torch.storage.UntypedStorage",
        "_codecs.encode",
        "builtins.bytearray",
        "builtins.set",
        "builtins.complex",
        # What these were called when Python 2 wrote the file; torch maps the names as pickle does.
        "__builtin__.bytearray",
        "__builtin__.set",
        "__builtin__.complex",
        *(f"torch.{name}" for name in _DTYPES.split()),
        *(f"torch.{name}Storage" for name in _STORAGES),
        *(f"torch.cuda.{name}Storage" for name in [*_KINDS, "ComplexDouble", "ComplexFloat"]),
        *(f"torch.{name}Tensor" for name in _KINDS),
        *(f"torch.cuda.{name}Tensor" for name in _KINDS),
        *(f"torch._utils._rebuild_{name}" for name in _REBUILDERS.split()),
    ]
)

# Opcodes of weights_only's unpickler with the bytes that their argument takes.
_FIXED: dict[int, int] = {
    **dict.fromkeys(
        b"\x81R" + b"b" + b"ae" + b"su" + b"(" + b"t\x85\x86\x87" + b"N\x88\x89" + b")" + b"]}" + b"\x8f" + b"Q", 0
    ),
    ord("J"): 4,
    ord("K"): 1,
    ord("M"): 2,
    ord("G"): 8,
    ord("h"): 1,
    ord("j"): 4,
    ord("q"): 1,
    ord("r"): 4,
    0x80: 1,
}
_GLOBAL, _STOP, _BINUNICODE = ord("c"), ord("."), ord("X")
_SHORT_BINSTRING, _LONG1 = ord("U"), 0x8A
_NAMES = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
_LEGACY_MAGIC = re.compile(rb"\x80.\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19\.", re.DOTALL)


def check(path: Path) -> None:
    """Refuse a `.bin`, `.pt`, `.pth` or `.ckpt` file that would run code when loaded.

    Raises:
        WeftError: HOSTILE naming the global or opcode outside the allow-list, or the bound that is broken;
            CORRUPT when it is no checkpoint; UNSUPPORTED for TorchScript and the oldest (tar) format.
    """
    try:
        with path.open("rb") as file:
            start = file.read(4)
            file.seek(0)
            if start[:2] == b"PK":
                _check_zip(path, file)
            else:
                _check_legacy(path, file)
    except OSError as error:
        raise os_error(path, error) from error


def _check_zip(path: Path, file: BinaryIO) -> None:
    _check_directory(path, file)
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            names = {member.filename for member in members}
            if len(names) != len(members):
                raise _hostile(path, "a member stands in its archive twice")
            if any("/code/" in f"/{name}" for name in names) or any(n.endswith("/constants.pkl") for n in names):
                raise WeftError(
                    ErrorKind.UNSUPPORTED,
                    f"{path.name} is a TorchScript program, not a checkpoint.",
                    "Get the weights alone, as safetensors.",
                )
            pickles = [member for member in members if member.filename.endswith(".pkl")]
            if not any(member.filename.rpartition("/")[2] == "data.pkl" for member in pickles):
                raise _corrupt(path, "its archive holds no data.pkl")
            for member in pickles:
                if member.flag_bits & 1:
                    raise _corrupt(path, "its archive is encrypted")
                with archive.open(member) as source:
                    # A member may unpack to more than its directory entry says: read no further than the bound.
                    data = source.read(MAX_PICKLE + 1)
                if len(data) > MAX_PICKLE:
                    raise _hostile(path, f"{member.filename} unpacks to more than {MAX_PICKLE // 2**20} MiB")
                scan(path, data)
    except (zipfile.BadZipFile, NotImplementedError, struct.error, EOFError, zipfile.LargeZipFile) as error:
        raise _corrupt(path, f"its archive cannot be read ({error})") from error
    except (ValueError, IndexError) as error:  # zlib and zipfile, on crafted entries
        raise _corrupt(path, f"its archive cannot be read ({error})") from error


def _check_directory(path: Path, file: BinaryIO) -> None:
    """Bound the zip's directory before zipfile makes an object of each entry."""
    size = file.seek(0, 2)
    tail = min(size, 65_557 + 20)
    file.seek(size - tail)
    data = file.read(tail)
    file.seek(0)
    at = data.rfind(b"PK\x05\x06")
    if at < 0 or len(data) - at < 22:
        raise WeftError(
            ErrorKind.CORRUPT, f"{path.name} is truncated: its archive has no directory.", "Download or copy it again."
        )
    entries, length = struct.unpack_from("<HI", data, at + 10)
    locator = at - 20
    if locator >= 0 and data[locator : locator + 4] == b"PK\x06\x07":
        file.seek(min(struct.unpack_from("<Q", data, locator + 8)[0], size))
        record = file.read(56)
        file.seek(0)
        if len(record) < 56 or record[:4] != b"PK\x06\x06":
            raise _corrupt(path, "its archive's directory cannot be found")
        entries, length = struct.unpack_from("<Q", record, 32)[0], struct.unpack_from("<Q", record, 40)[0]
    if entries > MAX_MEMBERS or length > MAX_DIRECTORY:
        raise _hostile(path, f"its archive claims {entries:,} members")


def _check_legacy(path: Path, file: BinaryIO) -> None:
    """magic number, protocol version, system information, the object, keys of its storages; then raw data."""
    data = file.read(MAX_PICKLE)
    if data[257:262] == b"ustar":
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            f"{path.name} is in the tar format of torch before 0.2.",
            "Load and save it again with a newer torch, or get the model as safetensors.",
        )
    position = 0
    rows = 5 if _LEGACY_MAGIC.match(data) else 1
    for _ in range(rows):
        position = scan(path, data, position)


def scan(path: Path, data: bytes, position: int = 0) -> int:
    """Check one pickle that begins at `position`; returns where it ends.

    Raises:
        WeftError: as `check` does.
    """
    size = len(data)
    for _ in range(MAX_OPCODES):
        if position >= size:
            raise _cut(path, size)
        opcode = data[position]
        position += 1
        fixed = _FIXED.get(opcode)
        if fixed is not None:
            position += fixed
        elif opcode == _BINUNICODE:
            position += 4 + int.from_bytes(data[position : position + 4], "little")
        elif opcode in (_SHORT_BINSTRING, _LONG1):
            position += 1 + (data[position] if position < size else 0)
        elif opcode == _GLOBAL:
            position = _check_global(path, data, position)
        elif opcode == _STOP:
            return position
        else:
            name = _NAMES.get(opcode)
            if name is None:
                raise _corrupt(path, f"byte {position - 1:,} is no pickle opcode")
            raise _hostile(path, f"its pickle uses the instruction {name}, which plain tensors never need")
    raise _hostile(path, f"its pickle has more than {MAX_OPCODES:,} instructions")


def _check_global(path: Path, data: bytes, position: int) -> int:
    end = data.find(b"\n", position, position + 1024)
    last = data.find(b"\n", end + 1, end + 1025) if end >= 0 else -1
    if last < 0:
        raise _cut(path, len(data))
    name = f"{data[position:end].decode('utf-8', 'replace')}.{data[end + 1 : last].decode('utf-8', 'replace')}"
    if name not in ALLOWED:
        raise _hostile(path, f"it would run {name[:200]!r} when loaded")
    return last + 1


def _cut(path: Path, size: int) -> WeftError:
    if size >= MAX_PICKLE:
        return _hostile(path, f"its pickle is longer than {MAX_PICKLE // 2**20} MiB")
    return WeftError(
        ErrorKind.CORRUPT,
        f"{path.name} is truncated or no checkpoint: its pickle has no end.",
        "Download or copy it again.",
    )


def _corrupt(path: Path, what: str) -> WeftError:
    return WeftError(
        ErrorKind.CORRUPT, f"{path.name} is damaged: {what}.", "Download it again, or get it as safetensors."
    )


def _hostile(path: Path, what: str) -> WeftError:
    return WeftError(
        ErrorKind.HOSTILE,
        f"{path.name} is not safe to load: {what}.",
        "Get the model as safetensors, which cannot hold code, or from somebody you trust.",
    )
