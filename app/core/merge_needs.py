"""What a merge will take of disk and memory against what there is, from headers alone: no machine-learning library."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec

from app.core.errors import ErrorKind, WeftError
from app.core.formats import read_json, read_safetensors_header
from app.core.merge_plan import MergePlan

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_FLOATS = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
IMPORTS = 400_000_000  # bytes of memory that the libraries take (PEFT's fallback takes the model's size more)
CHUNKS = 100 * 2**20  # and the pieces in hand, at most


class MergeNeeds(msgspec.Struct, frozen=True, kw_only=True):
    """What a merge takes.

    Attributes:
        disk: bytes that are written. free: bytes that there are, on the drive of `drive`.
        memory: bytes at most, libraries and all.
    """

    disk: int
    free: int
    drive: str
    memory: int

    @property
    def fits(self) -> bool:
        return self.disk <= self.free


def merge_needs(plan: MergePlan) -> MergeNeeds:
    """Ask the headers.

    Raises:
        WeftError: NOT_FOUND, CORRUPT.
    """
    folder = Path(plan.model)
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / "model.safetensors").is_file():
        mapping = read_json(index, 64 * 1024 * 1024).get("weight_map")
        names = {str(v) for v in mapping.values()} if isinstance(mapping, dict) else set[str]()  # type: ignore[reportUnknownVariableType]
        files = [path for path in files if path.name in names]
    size = 0
    for path in files:
        for tensor in read_safetensors_header(path).tensors:
            item = _FLOATS.get(tensor.dtype, 0)
            wanted = _BYTES.get(plan.dtype, item) if item else 0
            size += tensor.bytes * wanted // item if item else tensor.bytes
    if not files:
        files = sorted(folder.glob("pytorch_model*.bin"))
        size = sum(path.stat().st_size for path in files)
    if not files:
        raise WeftError(ErrorKind.NOT_FOUND, f"There are no weight files in {folder}.", "Download the model again.")
    beside = sum(p.stat().st_size for p in folder.iterdir() if p.suffix in (".json", ".model", ".txt", ".jinja"))
    target = Path(plan.target).absolute()
    drive = next(p for p in [target, *target.parents] if p.exists())
    return MergeNeeds(
        disk=size + beside + 16 * 1024 * 1024,
        free=shutil.disk_usage(drive).free,
        drive=str(drive),
        memory=IMPORTS + CHUNKS,
    )
