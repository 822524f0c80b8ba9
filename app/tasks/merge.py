"""Merge a stack of adapters into its base: one new model folder, written piece by piece.

Killed at any moment it leaves nothing under the target's name, and goes on from the last complete tensor when it is run again.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from pathlib import Path
from typing import Any

import msgspec

from app.adapters.hf_stack import signature
from app.adapters.merge_staging import PREFIX
from app.core.errors import ErrorKind, WeftError
from app.core.export_check import check_target
from app.core.library import ModelFormat
from app.core.merge_plan import MergeAdjustment, MergePlan, MergeResult
from app.core.quantization import PACKED, Quantization
from app.engine.reporting import Report
from app.generation.hf_files import INDEXES, SINGLES, Stage, read_json

Parameters = MergePlan
VERSION = 1  # of what a merge's bytes depend on, beside its plan
UNPACKABLE = PACKED | {ModelFormat.BITSANDBYTES}
_CONFIGS = ("config.json", "quantize_config.json", "quant_config.json")  # of a base: how its tensors are read
_MARGIN = 16 * 1024 * 1024  # bytes for headers, the index and the journal


def run(parameters: MergePlan, report: Report) -> MergeResult:
    """Merge.

    Raises:
        WeftError: BAD_INPUT, UNSUPPORTED, NOT_FOUND, CORRUPT, HOSTILE before anything is written; DISK_FULL, PERMISSION, CANCELLED.
    """
    import torch

    from app.adapters.merge_write_torch import Control

    torch.set_num_threads(1)  # pieces go to threads of our own
    control = Control()
    report.on_cancel(control.stop)
    report.on_adjust(lambda text: control.pause(msgspec.json.decode(text, type=MergeAdjustment).paused))
    return _Run(parameters, report, control).run()


class _Run:
    def __init__(self, plan: MergePlan, report: Report, control: Any) -> None:
        self.plan, self.report, self.control = plan, report, control
        self.started = time.monotonic()

    def run(self) -> MergeResult:
        from app.adapters.merge_stream_torch import NeedsPeft

        check_plan(self.plan)
        self.report.progress("Reading the model and the adapters")
        stage = stage_of(Path(self.plan.model), packed=self.plan.packed != "refuse")
        try:
            try:
                return self._stream(stage)
            except NeedsPeft as reason:
                if packing_of(Path(self.plan.model)) in PACKED:
                    raise WeftError(
                        ErrorKind.UNSUPPORTED,
                        f"This stack cannot be merged into packed weights: {reason}.",
                        "Unpack the model first, with `weft merge … --packed 16bit` and no adapter, and merge into that.",
                    ) from reason
                return self._with_peft(stage, str(reason))
        finally:
            stage.close()

    def _stream(self, stage: Stage) -> MergeResult:
        from app.adapters.merge_folder import side_files, write_side_files
        from app.adapters.merge_shards import divide, index_of
        from app.adapters.merge_staging import Staging, job_of, require_space, write_atomically
        from app.adapters.merge_stream_torch import Merge
        from app.adapters.merge_write_torch import Writer

        plan, target = self.plan, Path(self.plan.target)
        unpacked = self._unpacked(stage)
        with Merge(plan, stage.weights, stage.config, str(stage.path), opened=unpacked) as merge:
            repacked = self._packing(merge, unpacked)
            tensors = merge.tensors
            shards = divide(tensors, [t.source.file.name for t in tensors], plan.shard_size)
            total = sum(t.bytes for t in tensors)
            beside = sum(path.stat().st_size for path in side_files(Path(plan.model)))
            mark = self._mark(merge)
            with Staging(target) as staging:
                if staging.finished(mark):
                    staging.discard()
                    return self._result(merge, total, 0, ["An earlier run had completed it."])
                check_target(target)
                done = staging.begin(mark, job_of("merge", "core", plan))
                with staging.making():
                    files = sum(shard.size for shard in shards)
                    require_space(staging.root, files + beside - staging.allocated(), "The merged model", _MARGIN)
                    writer = Writer(merge, shards, staging, done, self.control, lambda now: self._progress(now, total))
                    writer.run(threads())
                    if len(shards) > 1:
                        write_atomically(staging.folder / INDEXES["safetensors"], index_of(shards, tensors))
                    if lost := loss_of(repacked):
                        merge.notes.append(lost)
                    notes = merge.notes + write_side_files(
                        plan, stage.original, merge.config, staging.folder, merge.notes
                    )
                    if self._mark(merge) != mark:
                        raise WeftError(
                            ErrorKind.CORRUPT,
                            "The base or an adapter changed while it was merged.",
                            "Merge again when nothing writes to them any more.",
                        )
                    self.report.progress("Waiting for the disk", total, total, "bytes")
                    staging.publish()
        return self._result(merge, total, writer.resumed, notes)

    def _unpacked(self, stage: Stage) -> Any:
        """The files of a packed base, unpacked; None for any other."""
        return unpacked_files(stage, Path(self.plan.model), self.plan.dtype)

    def _packing(self, merge: Any, unpacked: Any) -> list[Any]:
        """Have a packed base's tensors written as the plan wants them."""
        if unpacked is None:
            return []
        if self.plan.packed == "16bit":
            merge.config["quantization_config"] = None
            by = getattr(unpacked, "method", "").upper() or "bitsandbytes"
            merge.notes.append(f"The base was packed by {by}: what that had lost of it is lost here too.")
            return []
        if hasattr(unpacked, "method"):
            raise WeftError(
                ErrorKind.UNSUPPORTED,
                f"Packing again by {unpacked.method.upper()} is not part of a merge.",
                "Merge into 16 bits (--packed 16bit), then pack that with `weft quantize` or load_in_hqq.",
            )
        from app.adapters.merge_bnb_torch import pack_again

        merge.tensors, repacked = pack_again(merge, unpacked)
        return repacked

    def _result(self, merge: Any, total: int, resumed: int, notes: list[str]) -> MergeResult:
        return MergeResult(
            folder=self.plan.target,
            bytes=total,
            tensors=len(merge.tensors),
            changed=sum(t.changed for t in merge.tensors),
            copied=sum(t.bytes for t in merge.tensors if t.copied),
            resumed=resumed,
            notes=notes,
            seconds=time.monotonic() - self.started,
        )

    def _progress(self, now: int, total: int) -> None:
        self.report.progress("Paused" if self.control.paused else "Merging", now, total, "bytes")

    def _mark(self, merge: Any) -> str:
        """What the bytes depend on: a staging folder with another mark is begun anew."""
        import torch

        from app.adapters.merge_staging import fingerprint, stamp

        plan = self.plan
        base = [
            (f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted({t.source.file for t in merge.tensors})
        ]
        stack = [(a.path, a.weight, signature(Path(a.path))) for a in plan.stack.adapters if a.weight]
        told = [stamp(file) for name in _CONFIGS if (file := Path(plan.model) / name).is_file()]
        shapes = [(t.name, t.dtype, t.shape) for t in merge.tensors]
        return fingerprint(
            [
                VERSION,
                torch.__version__,
                plan.model,
                plan.dtype,
                plan.packed,
                plan.shard_size,
                base,
                told,
                stack,
                shapes,
            ]
        )

    def _with_peft(self, stage: Stage, reason: str) -> MergeResult:
        from app.adapters.merge_folder import write_side_files
        from app.adapters.merge_peft_torch import merge_with_peft
        from app.adapters.merge_staging import Staging, job_of, require_space, require_unchanged, stamp

        plan = self.plan
        paths = [Path(plan.model), *(Path(adapter.path) for adapter in plan.stack.adapters if adapter.weight)]
        inputs = [(path, stamp(path)) for path in paths]
        note = f"Merged by PEFT with the whole model in memory, since streaming could not: {reason}."
        self.report.log("warning", note)
        size = sum(path.stat().st_size for path in stage.weights)
        with Staging(Path(plan.target)) as staging:
            check_target(Path(plan.target))
            # A mark that no other run has: nothing of it can be gone on with.
            staging.begin(f"peft-{os.urandom(8).hex()}", job_of("merge", "core", plan))
            with staging.making():
                require_space(staging.root, size * (2 if plan.dtype == "float32" else 1), "The merged model", _MARGIN)
                self.report.progress("Merging with PEFT, the whole model in memory")
                count = merge_with_peft(plan, str(stage.path), staging.folder, self.control.check)
                config = read_json(staging.folder / "config.json")
                for part in staging.folder.iterdir():
                    if part.suffix == ".json" and not part.name.endswith(".index.json"):
                        part.unlink()
                kept = {
                    key: config[key]
                    for key in ("tie_word_embeddings", "num_hidden_layers", "layer_types")
                    if key in config
                }
                notes = [note, *write_side_files(plan, stage.original, kept, staging.folder, [note])]
                written = sum(p.stat().st_size for p in staging.folder.glob("*.safetensors"))
                require_unchanged(inputs)
                staging.publish()
        return MergeResult(
            folder=plan.target, bytes=written, tensors=count, changed=count, method="peft", notes=notes,
            seconds=time.monotonic() - self.started,
        )  # fmt: skip


def loss_of(repacked: list[Any]) -> str:
    """What packing again has lost, "" where nothing was packed."""
    if not repacked:
        return ""
    from app.adapters.merge_bnb_torch import loss_note

    return loss_note(repacked)


def threads() -> int:
    """How many pieces are worked on at once."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
    wanted = os.environ.get("WEFT_MERGE_THREADS", "")
    return int(wanted) if wanted.isdecimal() and int(wanted) else max(1, min(8, usable))


def unpacked_files(stage: Stage, folder: Path, wanted: str = "") -> Any:
    """The files of a packed folder, unpacked; None for 16 and 32 bits.

    Args:
        wanted: precision of the matrices, so that they are rounded once; "" for the model's own.
    """
    dtype = str(stage.original.get("dtype") or stage.original.get("torch_dtype"))
    found = packing_of(folder)
    if found in PACKED:
        from app.adapters.merge_packed_torch import PackedFiles
        from app.adapters.packed_load import table_of

        return PackedFiles(
            stage.weights, table_of(stage.config, folder), str(stage.config.get("model_type", "")), wanted or dtype
        )
    if found is not ModelFormat.BITSANDBYTES:
        return None
    from app.adapters.merge_bnb_torch import UnpackedFiles

    return UnpackedFiles(stage.weights, dtype)


def stage_of(folder: Path, *, packed: bool = False) -> Stage:
    """The base's folder, its files checked.

    Args:
        packed: a base that bitsandbytes, GPTQ, AWQ or HQQ has packed will do.

    Raises:
        WeftError: NOT_FOUND, HOSTILE, CORRUPT; UNSUPPORTED for quantized bases, with the 16-bit base to fetch instead.
    """
    if not folder.is_dir():
        raise WeftError(ErrorKind.NOT_FOUND, f"There is no model folder {folder}.", "Check the path; GGUF files take adapters through `weft export`.")  # fmt: skip
    form = "safetensors" if any((folder / t["safetensors"]).is_file() for t in (SINGLES, INDEXES)) else "bin"
    refuse_quantized(folder, packed=packed)
    lone = sorted(folder.glob("*.safetensors")) if packed and form == "bin" else []  # a file of a name of its own
    return Stage(folder, "safetensors", lone[0]) if len(lone) == 1 else Stage(folder, form)


def refuse_quantized(folder: Path, *, packed: bool = False) -> None:
    """Refuse a base whose weights are packed, and say what to fetch instead.

    Raises:
        WeftError: UNSUPPORTED.
    """
    from app.core.quantized_base import likely_base

    found = quantization_of(folder)
    if found is None or (packed and found.format in UNPACKABLE):
        return
    base = likely_base(folder, read_json(folder / "config.json"))
    hint = "Merge into the 16-bit model that it was made from"
    raise WeftError(
        ErrorKind.UNSUPPORTED,
        f"{folder.name} is quantized ({found.format.value} {found.label}): a merge into it would be rounded away.",
        (f"{hint}, {base}: get it with `weft download {base}`." if "/" in base else f"{hint}.")
        + (
            " Or unpack it first with `weft merge … --packed 16bit`, with the loss that it has."
            if found.format in UNPACKABLE
            else ""
        ),
    )


def quantization_of(folder: Path) -> Quantization | None:
    """How a folder says, or its tensors show, that it is packed; None for 16 and 32 bits."""
    from app.core.formats import read_safetensors_header
    from app.core.quantization import from_config, from_tensors

    tables = [read_json(folder / name) if (folder / name).is_file() else {} for name in _CONFIGS[1:]]
    found = from_config(read_json(folder / "config.json"), *tables)
    if found is None:
        with contextlib.suppress(WeftError):  # a damaged file is named by who reads it
            first = sorted(folder.glob("*.safetensors"))[:1]
            found = from_tensors([t for path in first for t in read_safetensors_header(path).tensors])
    return found


def packing_of(folder: Path) -> ModelFormat | None:
    """The format of a packed folder; None for 16 and 32 bits."""
    found = quantization_of(folder)
    return found.format if found is not None else None


def check_plan(plan: MergePlan) -> None:
    """Refuse what cannot be a merge.

    Raises:
        WeftError: BAD_INPUT.
    """
    for adapter in plan.stack.adapters:
        if not math.isfinite(adapter.weight):
            raise WeftError(ErrorKind.BAD_INPUT, f"The weight of {adapter.name or adapter.path} is no number.", "Set a number.")  # fmt: skip
    unpackable = Path(plan.model).is_dir() and packing_of(Path(plan.model)) in UNPACKABLE
    if not any(a.weight for a in plan.stack.adapters) and not (unpackable and plan.packed == "16bit"):
        hint = "Add one with a weight other than 0" + (
            ", or unpack the model with `weft merge … --packed 16bit`." if unpackable else "."
        )
        raise WeftError(ErrorKind.BAD_INPUT, "No adapter is on: there is nothing to merge.", hint)
    if plan.shard_size < 0:
        raise WeftError(ErrorKind.BAD_INPUT, "A negative shard size means nothing.", "Give a size in bytes, or 0.")
    model, target = Path(plan.model), Path(plan.target)
    if target.parent.name.startswith(PREFIX):
        return  # on the way to something else, such as a GGUF file beside its base: hidden, and removed again
    with contextlib.suppress(OSError):
        if target.resolve() == model.resolve() or model.resolve() in target.resolve().parents:
            raise WeftError(
                ErrorKind.BAD_INPUT, f"{target} lies in the base's own folder.", "Choose a folder of its own."
            )
