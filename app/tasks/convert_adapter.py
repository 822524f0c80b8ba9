"""Make a GGUF adapter of a PEFT one, or a PEFT folder of a GGUF one, as an adapter of the library's own.

Needs numpy alone. The model's weights are not read, only its headers.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from app.core.convert_plan import Converted, ConvertPlan
from app.core.disk import sync_folder
from app.core.errors import ErrorKind, WeftError
from app.core.formats import read_gguf_header
from app.core.library import ModelEntry, ModelFormat
from app.core.module_names import gguf_architectures
from app.core.recognise_gguf import parts_of
from app.engine.reporting import Report

if TYPE_CHECKING:
    from app.adapters.to_gguf import Base

Parameters = ConvertPlan


def run(parameters: ConvertPlan, report: Report) -> Converted:
    """Convert, staged beside the target.

    Raises:
        WeftError: BAD_INPUT (something lies at the target), UNSUPPORTED (kinds that the other format has no place for, a model
            that it does not fit), CORRUPT; nothing is left behind then. OSError goes to the host.
    """
    source, target = Path(parameters.adapter), Path(parameters.to)
    if target.exists() or target.is_symlink():
        raise WeftError(ErrorKind.BAD_INPUT, f"{target} exists already.", "Choose another name, or move it away first.")
    target.parent.mkdir(parents=True, exist_ok=True)
    report.progress("Converting", 0, 1, "adapters")
    with tempfile.TemporaryDirectory(prefix=f".{target.name[:60]}-", suffix=".incomplete", dir=target.parent) as stage:
        if source.suffix.lower() == ".gguf":
            made, notes = _to_peft(source, parameters.model, Path(stage))
        else:
            made, notes = _to_gguf(source, parameters.model, Path(stage))
        if report.cancelled:
            raise WeftError(ErrorKind.CANCELLED, "Cancelled.")
        made.rename(target)
    sync_folder(target.parent)
    report.progress("Converting", 1, 1, "adapters")
    files = [target] if target.is_file() else [path for path in target.rglob("*") if path.is_file()]
    return Converted(adapter=str(target), bytes=sum(path.stat().st_size for path in files), notes=notes)


def _to_gguf(source: Path, model: ModelEntry, stage: Path) -> tuple[Path, list[str]]:
    from app.adapters.to_gguf import converted

    return converted(source, _gguf_base(model), stage)


def _to_peft(source: Path, model: ModelEntry, stage: Path) -> tuple[Path, list[str]]:
    from app.adapters.from_gguf import base_of_entry, converted

    if model.format is ModelFormat.GGUF:
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            f"{model.name} is a GGUF file, which does not tell how transformers names its parts.",
            "Choose the same model as a folder of safetensors.",
        )
    return converted(source, base_of_entry(model), stage)


def _gguf_base(model: ModelEntry) -> Base:
    from app.adapters.from_gguf import base_of_entry
    from app.adapters.to_gguf import Base, base_of

    if model.format is ModelFormat.GGUF:
        return base_of([read_gguf_header(part) for part in parts_of(Path(model.path))[0]])
    base = base_of_entry(model)
    shapes: dict[str, tuple[int, int]] = {}
    known = _matrices(model)
    for (layer, role), name in base.names.items():
        if name in known:
            shapes[f"blk.{layer}.{role}" if layer >= 0 else role] = known[name]
    architecture = gguf_architectures(base.model_type)[0]
    return Base(architecture, base.heads, base.kv_heads, shapes)


def _matrices(model: ModelEntry) -> dict[str, tuple[int, int]]:
    """A safetensors model's matrices as (out, in), by module name."""
    from app.core.compatibility import model_modules
    from app.core.formats import read_safetensors_header
    from app.core.module_names import place_of

    shapes = model_modules(model).shapes
    found: dict[str, tuple[int, int]] = {}
    for file in model.files:
        if file.endswith(".safetensors"):
            for tensor in read_safetensors_header(Path(file)).tensors:
                name = tensor.name.removesuffix(".weight")
                shape = shapes.get(place_of(name))
                if tensor.name.endswith(".weight") and shape is not None:
                    found[name] = shape
    return found
