"""The weight files of a quantized model: one a layer, each put on the disk as soon as it is complete, and one for all the rest."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from app.adapters import packed_grid
from app.adapters.merge_files import TORCH_NAMES, BaseFiles
from app.adapters.quantize_model_torch import QuantizableModel, read_tensor
from app.adapters.quantized_layer import LayerResult
from app.core.disk import sync_file, sync_folder

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_REST = "rest"


class MatrixLoss(NamedTuple):
    """How far a matrix is from what it was: Frobenius norms of the change and of the matrix. name: in the files, without `.weight`."""

    name: str
    error: float
    size: float


class LayerFiles:
    """The files of one run, in a folder of their own; an earlier run's are gone on with.

    Args:
        folder: where they lie. files: the 16-bit weights.
        dtype: in which what is not quantized is stored; None for its own, byte for byte.
    """

    def __init__(self, folder: Path, files: BaseFiles, dtype: torch.dtype | None) -> None:
        self.folder, self._files, self._dtype = folder, files, dtype
        folder.mkdir(exist_ok=True)
        for part in folder.glob("*.part"):
            part.unlink()

    def done(self) -> int:
        """How many layers, from the first on, an earlier run has completed."""
        count = 0
        while self._path(str(count)).is_file():
            count += 1
        return count

    def write(self, model: QuantizableModel, layer: int, made: LayerResult) -> None:
        """Put a layer on the disk.

        Raises:
            OSError.
        """
        tensors: dict[str, Tensor] = {}
        losses: list[MatrixLoss] = []
        for name, result in made.matrices.items():
            stem = model.stem(layer, name)
            tensors |= {f"{stem}.{key}": tensor.cpu() for key, tensor in result.parts.items()}
            losses.append(MatrixLoss(stem, result.error, result.size))
        replaced = {f"{loss.name}.weight" for loss in losses}
        for name, tensor in made.changed.items():
            stored = model.stored_name(layer, name)
            own = getattr(torch, TORCH_NAMES[self._files.tensors[stored].dtype])
            tensors[stored] = tensor.to("cpu", self._dtype or own)
        prefix = model.prefix(layer)
        for name in self._files.tensors:
            if name.startswith(prefix) and name not in replaced and name not in tensors:
                tensors[name] = self._as_stored(name)
        left = [model.stem(layer, name) for name in made.left]
        told = json.dumps({"losses": losses, "unseen": made.unseen, "left": left})
        self._save(self._path(str(layer)), tensors, told)

    def write_rest(self, model: QuantizableModel) -> None:
        """Put all that lies in no layer on the disk.

        Raises:
            OSError.
        """
        prefixes = tuple(model.prefix(number) for number in range(len(model.layers)))
        names = [name for name in self._files.tensors if not name.startswith(prefixes)]
        self._save(self._path(_REST), {name: self._as_stored(name) for name in names}, "{}")

    def _as_stored(self, name: str) -> Tensor:
        tensor = read_tensor(self._files, name)
        return tensor.to(self._dtype) if self._dtype is not None and tensor.dtype in _FLOATS else tensor

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _save(self, path: Path, tensors: dict[str, Tensor], told: str) -> None:
        part = path.with_suffix(".part")
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        try:
            save_file(whole, part, metadata={"format": "pt", "weft": told})
        except SafetensorError as error:  # how safetensors tells what the system has refused
            full = "No space left" in str(error) or "os error 28" in str(error) or "quota" in str(error)
            raise OSError(errno.ENOSPC if full else errno.EIO, str(error), str(part)) from error
        sync_file(part)
        part.replace(path)
        sync_folder(self.folder)

    def is_whole(self, model: QuantizableModel, layer: int) -> bool:
        """Whether a layer's file is what it should be: nobody has touched it since."""
        try:
            with safe_open(str(self._path(str(layer))), "pt") as opened:
                names = {name.rpartition(".")[0] for name in opened.keys() if name.endswith((".qweight", ".W_q"))}  # noqa: SIM118
                left = set(json.loads((opened.metadata() or {})["weft"])["left"])
        except (SafetensorError, OSError, ValueError, KeyError):
            return False
        return names | left == {model.stem(layer, matrix.name) for matrix in model.matrices(layer)}

    def gptq_weights(self, model: QuantizableModel, layer: int) -> dict[str, Tensor]:
        """W, float32 (out, in), of a layer that is whole, by the matrices' names in it."""
        found: dict[str, Tensor] = {}
        with safe_open(str(self._path(str(layer))), "pt") as opened:
            names = set(opened.keys())
            for matrix in model.matrices(layer):
                stem = model.stem(layer, matrix.name)
                if f"{stem}.qweight" not in names:
                    continue
                parts = {key: opened.get_tensor(f"{stem}.{key}") for key in ("qweight", "qzeros", "scales", "g_idx")}
                found[matrix.name] = packed_grid.gptq(stem, parts, matrix.weight.shape[1]).weight()
        return found

    def forget(self, layer: int) -> None:
        """Remove a layer's file and all after it."""
        for number in range(layer, self.done()):
            self._path(str(number)).unlink()

    def losses(self, layers: int) -> tuple[list[MatrixLoss], int, list[str]]:
        """Of all matrices that are quantized; how many of them no token came to; the names of those that stayed as they are."""
        found: list[MatrixLoss] = []
        unseen, left = 0, list[str]()
        for number in range(layers):
            with safe_open(str(self._path(str(number))), "pt") as opened:
                told = json.loads((opened.metadata() or {})["weft"])
            found += [MatrixLoss(*each) for each in told["losses"]]
            unseen += told["unseen"]
            left += told["left"]
        return found, unseen, left

    def publish(self, layers: int, target: Path) -> int:
        """Move the files into the model's folder, with the index that says what lies where. Returns their bytes.

        Raises:
            OSError.
        """
        order = [_REST, *map(str, range(layers))]
        names: dict[str, str] = {}
        total = taken = 0
        for number, each in enumerate(order):
            name = f"model-{number + 1:05}-of-{len(order):05}.safetensors"
            with safe_open(str(self._path(each)), "pt") as opened:
                names |= dict.fromkeys(opened.keys(), name)
            size = self._path(each).stat().st_size
            with self._path(each).open("rb") as file:
                total += size - 8 - int.from_bytes(file.read(8), "little")
            taken += size
            try:  # what an interrupted run goes on from stays
                os.link(self._path(each), target / name)
            except OSError:  # a drive without hard links
                self._path(each).replace(target / name)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")
        return taken


def quantization_table(
    method: str, bits: int, group: int, *, by_importance: bool, kept: list[str], blocks: list[list[str]]
) -> Mapping[str, object]:
    """config.json's `quantization_config`, as the programs that read such folders want it.

    Args:
        kept: names, in the files, of what multiplies and is not quantized.
        blocks: names, inside a layer, of what is, where some matrices of layers are not; else [].
    """
    if method == "hqq":
        matrix = {"nbits": bits, "group_size": group, "axis": 1, "channel_wise": True, "optimize": True, "round_zero": False, "view_as_float": False}  # fmt: skip
        return {
            "quant_method": "hqq",
            "quant_config": {
                "weight_quant_params": matrix,
                "scale_quant_params": None,
                "zero_quant_params": None,
                "offload_meta": False,
            },
            "skip_modules": ["lm_head", *kept],
        }
    if method == "awq":
        return {
            "quant_method": "awq",
            "bits": bits,
            "group_size": group,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": kept or None,
        }
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": by_importance,
        "sym": True,
        "lm_head": False,
        "true_sequential": True,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "meta": {"quantizer": ["weft"]},
        **({"modules_in_block_to_quantize": blocks} if blocks else {}),
    }
