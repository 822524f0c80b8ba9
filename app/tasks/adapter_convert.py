"""Convert an adapter for one model: a PEFT adapter to GGUF, a GGUF adapter to a PEFT folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from app.adapters import from_gguf, to_gguf
from app.core.adapter_plans import ConvertPlan, ConvertResult
from app.core.errors import ErrorKind, WeftError
from app.core.formats import read_gguf_header
from app.core.gguf_header import os_error
from app.core.library import ModelEntry, ModelFormat
from app.core.recognise import recognise_model
from app.core.recognise_gguf import parts_of
from app.engine.reporting import Report

Parameters = ConvertPlan


def run(parameters: ConvertPlan, report: Report) -> ConvertResult:
    """Convert; the target appears when it is complete.

    Raises:
        WeftError: BAD_INPUT for a target that exists or a model of the wrong format; UNSUPPORTED for what the other
            format cannot say (DoRA, whole modules, …) or when nothing fits; CORRUPT; NOT_FOUND.
    """
    source, target = Path(parameters.adapter), Path(parameters.target)
    if target.exists():
        raise WeftError(ErrorKind.BAD_INPUT, f"{target} exists already.", "Choose another name.")
    to_llama = target.suffix.lower() == ".gguf"
    if to_llama == (source.suffix.lower() == ".gguf"):
        raise WeftError(
            ErrorKind.BAD_INPUT,
            f"{source.name} is in that format already.",
            "Give a target that ends in .gguf for a PEFT adapter, and a folder for a GGUF adapter.",
        )
    entry = _model(Path(parameters.model), to_llama)
    report.progress(f"Converting {source.name}")
    stage = target.with_name(f".{target.name[:100]}.making-{os.getpid()}")
    try:
        stage.mkdir(parents=True)
        made, notes = _convert(parameters, entry, stage, to_llama)
        if report.cancelled:
            raise WeftError(ErrorKind.CANCELLED, "Cancelled.")
        made.rename(target)
    except OSError as error:
        raise os_error(target, error) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    size = sum(file.stat().st_size for file in (target.rglob("*") if target.is_dir() else (target,)) if file.is_file())
    return ConvertResult(path=str(target), bytes=size, notes=tuple(notes))


def _convert(parameters: ConvertPlan, entry: ModelEntry, stage: Path, to_llama: bool) -> tuple[Path, list[str]]:
    source = Path(parameters.adapter)
    if to_llama:
        base = to_gguf.base_of([read_gguf_header(part) for part in parts_of(Path(entry.path))[0]])
        return to_gguf.converted(source, base, stage, parameters.alpha)
    return from_gguf.converted(source, from_gguf.base_of_entry(entry), stage)


def _model(path: Path, gguf: bool) -> ModelEntry:
    entry = recognise_model(path)
    if entry is None or entry.problem:
        raise WeftError(
            ErrorKind.NOT_FOUND,
            f"No model was found at {path}. {entry.problem if entry else ''}".strip(),
            "Check the path.",
        )
    if gguf != (entry.format is ModelFormat.GGUF) or (not gguf and entry.format is not ModelFormat.SAFETENSORS):
        wanted = "a GGUF model" if gguf else "a model in safetensors"
        raise WeftError(
            ErrorKind.BAD_INPUT,
            f"{entry.name} is a {entry.format.value} model, and the adapter is converted for {wanted}.",
            f"Choose {wanted} that the adapter is to be used with.",
        )
    return entry
