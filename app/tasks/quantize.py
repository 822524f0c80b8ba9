"""Quantize a model by GPTQ or AWQ, with adapters merged in first: one new model folder that its loaders read.

Runs in the environment `gptq`. What reads the text and rounds is GPTQModel; what goes in is checked before, what comes out
is checked after, and nothing bears the target's name before all of it is on the disk.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from app.adapters.merge_staging import (
    Staging,
    fingerprint,
    job_of,
    require_space,
    require_unchanged,
    stamp,
    write_error,
)
from app.core.errors import ErrorKind, WeftError
from app.core.export_check import check_target
from app.core.merge_plan import MergePlan
from app.core.plain_text import read_plain
from app.core.quantize_plan import ENVIRONMENT, SHORTEST, QuantizePlan, QuantizeResult, check_quantize
from app.core.stack import AdapterStack
from app.engine.pausing import Pausing
from app.engine.reporting import Report
from app.generation.hf_files import Stage, read_json

if TYPE_CHECKING:
    from app.adapters.quantize_shapes_torch import Shapes

Parameters = QuantizePlan
VERSION = 2  # of what the result's bytes depend on, beside the plan
_GOES_ON = ("llama", "qwen3_moe")  # of which GPTQModel can keep what it has done
_MARGIN = 64 * 1024 * 1024
_LARGEST_TEXT = 64 * 1024 * 1024  # bytes of the calibration text that are read; far more than is ever used


class _UnusableLayersError(Exception):
    """What an earlier run had kept cannot be gone on with: begin anew."""


def run(parameters: QuantizePlan, report: Report) -> QuantizeResult:
    """Quantize.

    Raises:
        WeftError: BAD_INPUT, UNSUPPORTED, NOT_FOUND, CORRUPT, HOSTILE before anything is written; DISK_FULL, PERMISSION,
            OUT_OF_MEMORY, CANCELLED.
    """
    # Read when these libraries are imported: the processor's 8-bit kernel would be compiled for minutes, and with few cores
    # their pool of threads takes longer than the work.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    if (os.cpu_count() or 1) <= 2:
        os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    return _Run(parameters, report).run()


class _Run:
    def __init__(self, plan: QuantizePlan, report: Report) -> None:
        self.plan, self.report = plan, report
        self.target = Path(plan.target)
        self.started = time.monotonic()
        self.notes: list[str] = []
        self.pausing = Pausing(report)
        self.inputs: list[tuple[Path, tuple[object, ...]]] = []
        self.all_of_it = False  # the whole text was used
        self.goes_on = False  # with layers that an earlier run had quantized

    def run(self) -> QuantizeResult:
        from app.adapters.quantize_shapes_torch import check_shapes, shapes_of
        from app.tasks.merge import packing_of, stage_of

        plan = self.plan
        check_quantize(plan)
        check_target(self.target)
        self.report.progress("Reading the model and the text")
        with contextlib.closing(stage_of(Path(plan.model), packed=True)) as stage:
            # What is packed already is unpacked by the merge, also where nothing is merged in.
            packed = packing_of(Path(plan.model)) is not None
            merged = packed or any(adapter.weight for adapter in plan.stack.adapters)
            shapes = shapes_of(stage.path, stage.config)
            check_shapes(plan, shapes)
            self._pieces(stage.path)  # a text that is too short is told now, not after the merge
            with Staging(self.target) as staging:
                self._begin(staging)
                try:
                    self._require_space(staging, shapes, merged=merged)
                    source = self._merge(staging) if merged else Path(plan.model)
                    with contextlib.closing(Stage(source, "safetensors") if merged else stage) as ready:
                        pieces = self._pieces(ready.path)
                        self._quantize(self._linked(ready, staging), staging, pieces, shapes)
                        written = self._finish(ready, source, staging.folder, pieces)
                        self._measure(ready, stage if merged else None, staging.folder)
                    self.pausing.check()
                    self.report.progress("Waiting for the disk")
                    require_unchanged(self.inputs)
                    staging.publish()
                except OSError as error:
                    raise _in_words(error, staging) from error
                finally:
                    staging.discard()  # only a death leaves something to go on from
        return QuantizeResult(
            folder=plan.target,
            bytes=written[0],
            matrices=written[1],
            method=plan.method,
            bits=plan.bits,
            samples=len(pieces),
            tokens=sum(map(len, pieces)),
            notes=list(dict.fromkeys(self.notes)),
            seconds=time.monotonic() - self.started,
        )

    def _begin(self, staging: Staging) -> None:
        """Keep what a killed run has completed: the merged model, and layers that are quantized."""
        from gptqmodel import __version__ as version

        plan = self.plan
        weights = [(a.path, a.weight) for a in plan.stack.adapters if a.weight]
        paths = [Path(plan.model), Path(plan.calibration), *(Path(path) for path, _ in weights)]
        self.inputs = [(path, stamp(path)) for path in paths]
        known = msgspec.structs.replace(plan, stack=AdapterStack(), target="", base_name="")
        mark = fingerprint([VERSION, version, known, weights, [each for _, each in self.inputs]])
        self.goes_on = staging.left_by(mark) and (staging.root / "layers").is_dir()
        staging.begin(mark, job_of("quantize", ENVIRONMENT, plan))  # what another job had left goes here
        for folder in (staging.root / "aside", staging.root / "source", staging.folder):
            shutil.rmtree(folder, ignore_errors=True)
        for attempt in (staging.root / "layers").glob("attempt-*"):
            shutil.rmtree(attempt, ignore_errors=True)
        staging.folder.mkdir()

    def _require_space(self, staging: Staging, shapes: Shapes, *, merged: bool) -> None:
        plan = self.plan
        made = shapes.weights * (plan.bits + 32 / plan.group_size) / 8 + 2 * shapes.others
        # Beside the result: what is set aside from memory meanwhile, the merged model, and the layers to go on from.
        sixteen = 2 * (shapes.weights + shapes.others)
        between = sixteen * (2 if merged else 1) + made
        if merged:
            self.report.log("info", f"A merged folder of {sixteen / 1e9:.2f} GB is made on the way, and removed again.")
        there = sum(p.stat().st_size for name in ("merged", "layers") for p in (staging.root / name).rglob("*"))
        needed = int(made + between) - there
        require_space(staging.root, needed, "The model, with what is made on the way,", _MARGIN)

    def _merge(self, staging: Staging) -> Path:
        """The 16-bit model with the stack merged in, in the staging folder."""
        from app.tasks.merge import run as merge

        target = staging.root / "merged"
        if target.is_dir():
            self.notes.append("The merged model of an earlier run was used.")
            return target
        made = merge(
            MergePlan(
                model=self.plan.model,
                stack=self.plan.stack,
                target=str(target),
                packed="16bit",
                base_name=self.plan.base_name,
            ),
            self.report,
        )
        self.notes += made.notes
        return target

    def _linked(self, ready: Stage, staging: Staging) -> Path:
        """The model as GPTQModel reads it: with weights of its own, where it can go on from a layer that it had made.

        It trusts no link that leads out of the folder.
        """
        if ready.config.get("model_type") not in _GOES_ON or not list(ready.path.glob("*.safetensors")):
            return ready.path
        folder = staging.root / "source"
        folder.mkdir()
        for path in ready.path.iterdir():
            try:
                if path.suffix == ".safetensors":
                    os.link(path.resolve(), folder / path.name)
                else:
                    shutil.copyfile(path, folder / path.name)
            except OSError:  # another drive, or one without hard links
                return ready.path
        return folder

    def _pieces(self, folder: Path) -> list[list[int]]:
        """The calibration text as token ids: pieces of `length`, spread evenly over the whole text."""
        import transformers

        path = Path(self.plan.calibration)
        text = read_plain(path, _LARGEST_TEXT)
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
        length = self._length(folder)
        pieces = [ids[i : i + length] for i in range(0, len(ids), length)]
        if len(pieces) > 1 and len(pieces[-1]) < length:
            pieces.pop()  # the library pads; whole pieces weigh alike
        if not pieces or len(pieces[0]) < SHORTEST:
            raise WeftError(
                ErrorKind.BAD_INPUT,
                f"{path.name} has {len(ids)} tokens: too short to calibrate on.",
                "Give a text of some hundred kilobytes, like what the model will read.",
            )
        self.all_of_it = len(pieces) <= self.plan.samples
        if not self.all_of_it:
            pieces = [pieces[i * len(pieces) // self.plan.samples] for i in range(self.plan.samples)]
        return pieces

    def _length(self, folder: Path) -> int:
        """Tokens of a piece: no more than the model reads."""
        context = read_json(folder / "config.json").get("max_position_embeddings")
        if not isinstance(context, int) or not SHORTEST <= context < self.plan.length:
            return self.plan.length
        self.notes.append(f"Pieces of {context:,} tokens, not {self.plan.length:,}: the model reads no longer ones.")
        return context

    def _quantize(self, model: Path, staging: Staging, pieces: list[list[int]], shapes: Shapes) -> None:
        kept = self._kept_layers(model, staging)
        try:
            self._calibrate(model, staging, pieces, shapes, kept)
            usable = True
        except _UnusableLayersError:
            usable = False
        if not usable:
            # Not where the exception is handled: what it holds of the first attempt is the whole model.
            gc.collect()
            self.goes_on = False
            for name in ("layers", "aside"):
                shutil.rmtree(staging.root / name, ignore_errors=True)
            self._calibrate(model, staging, pieces, shapes, kept)
        if self.goes_on:
            self.notes.append("Layers that an earlier run had quantized were used.")

    def _calibrate(
        self, model: Path, staging: Staging, pieces: list[list[int]], shapes: Shapes, kept: dict[str, Any]
    ) -> None:
        import torch
        from gptqmodel import BACKEND, GPTQModel
        from gptqmodel.looper.module_looper import StopMainLoop

        from app.adapters.quantize_shapes_torch import own_dtype

        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1))
        aside = staging.root / "aside"
        aside.mkdir()
        tokens = sum(map(len, pieces))
        if tokens < 50_000 and self.all_of_it:
            self.notes.append(
                f"Calibrated on {tokens:,} tokens: a longer text, like what the model will read, loses less."
            )
        data = [{"input_ids": piece, "attention_mask": [1] * len(piece)} for piece in pieces]
        heard = self._listener(shapes, StopMainLoop)
        # The library writes a folder `logs` where it stands: let it stand in a folder that goes.
        with self._told(StopMainLoop), contextlib.chdir(aside):
            quantizer = GPTQModel.load(str(model), self._config(aside), trust_remote_code=False, dtype=own_dtype(model))
            quantizer.layer_callback = heard
            quantizer.subset_callback = heard
            quantizer.quantize(
                data,
                batch_size=1,
                calibration_data_min_length=1,
                backend=BACKEND.AWQ_TORCH if self.plan.method == "awq" else BACKEND.AUTO,
                **kept,
            )
            self.pausing.check()
            self.report.progress("Writing")
            quantizer.save(str(staging.folder))  # before any forward: the processor's kernels repack the weights in it

    def _config(self, aside: Path) -> Any:
        import torch
        from gptqmodel import QuantizeConfig

        plan = self.plan
        # AWQ's readers expect a zero point (sym=False); GPTQ's fast kernels are for grids without one.
        options: dict[str, Any] = (
            {"format": "gemm", "sym": False} if plan.method == "awq" else {"format": "gptq", "desc_act": plan.desc_act}
        )
        if plan.desc_act:
            options["act_group_aware"] = False  # the two are one another's alternative
        return QuantizeConfig(
            quant_method=plan.method,
            bits=plan.bits,
            group_size=plan.group_size,
            device=plan.device or ("cuda" if torch.cuda.is_available() else "cpu"),
            offload_to_disk_path=str(aside),
            **options,
        )

    def _kept_layers(self, model: Path, staging: Staging) -> dict[str, Any]:
        """What has GPTQModel keep each layer on the disk as it is done, and go on from there."""
        if model != staging.root / "source" or self.plan.method != "gptq":
            return {}  # what it keeps of AWQ's layers it refuses to read again
        from gptqmodel.looper.checkpoint_store import CheckpointConfig

        return {"checkpoint": CheckpointConfig(path=staging.root / "layers", resume="auto")}

    def _listener(self, shapes: Shapes, stopped: Any) -> Callable[..., Any]:
        """What the library calls at each part of a layer, and after each layer."""
        phase, total = f"Quantizing by {self.plan.method.upper()}", 2 * shapes.weights
        furthest = 0.0
        self.report.progress(phase, 0, total, "bytes")

        def heard(**event: Any) -> Any:
            nonlocal furthest
            part = event.get("subset_index", 0) / max(1, event.get("subset_total", 1))
            self.goes_on = self.goes_on and event.get("layer_idx") != 0  # nothing that it could go on with
            furthest = max(furthest, (event.get("layer_idx", 0) + part) / max(1, shapes.layers))
            self.report.progress(phase, min(1.0, furthest) * total, total, "bytes")
            return stopped if self.pausing.stopped() else None

        return heard

    @contextlib.contextmanager
    def _told(self, stopped: type[BaseException]) -> Iterator[None]:
        """What the library raises, as something a person can act on."""
        try:
            yield
        except (WeftError, OSError):
            raise
        except stopped:
            raise WeftError(ErrorKind.CANCELLED, "Cancelled.") from None
        except Exception as error:
            if self.report.cancelled:
                raise WeftError(ErrorKind.CANCELLED, "Cancelled.") from error
            if type(error).__name__.startswith("Checkpoint") and self.goes_on:
                raise _UnusableLayersError from error
            if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
                raise WeftError(
                    ErrorKind.OUT_OF_MEMORY,
                    "The memory did not suffice for a layer with its calibration text.",
                    "Use fewer or shorter pieces of the text (--samples, --length), or the processor.",
                ) from error
            raise WeftError(
                ErrorKind.UNSUPPORTED,
                f"GPTQModel cannot quantize this model: {str(error).strip()[:300] or type(error).__name__}",
                "Choose other bits or another group size, or export a GGUF with `weft export`.",
            ) from error

    # What was made ---------------------------------------------------------------------------------

    def _finish(self, ready: Stage, source: Path, folder: Path, pieces: list[list[int]]) -> tuple[int, int]:
        """Check the weights, and put beside them what goes with them. Returns their bytes, and how many matrices there are."""
        from app.adapters.merge_folder import side_files
        from app.adapters.quantize_shapes_torch import check_weights

        matrices = check_weights(folder)
        self._tell_type(ready, folder)
        (folder / "quant_log.csv").unlink(missing_ok=True)
        for name in ("config.json", "quantize_config.json"):
            made = read_json(folder / name)
            forget(made, "offload_to_disk_path")  # a path of this machine
            if name == "config.json":
                for key in ("pad_token_id", "bos_token_id", "eos_token_id"):  # as the model had them
                    made.pop(key, None)
                    if key in ready.original:
                        made[key] = ready.original[key]
            (folder / name).write_text(json.dumps(made, indent=2, ensure_ascii=False) + "\n", "utf-8")
        for path in side_files(source):
            shutil.copyfile(path, folder / path.name)
        card = self._card(source, pieces)
        (folder / "README.md").write_text(card, "utf-8")
        return sum(path.stat().st_size for path in folder.glob("*.safetensors")), matrices

    def _tell_type(self, ready: Stage, folder: Path) -> None:
        """Say when what is not quantized could not keep its type."""
        from app.adapters.quantize_shapes_torch import own_dtype, stored_dtype

        own, made = stored_dtype(ready.path), str(read_json(folder / "config.json").get("dtype", ""))
        if own is not None and made and made != str(own).removeprefix("torch."):
            forced = str(own_dtype(ready.path)) != f"torch.{made}"
            why = ": GPTQModel has no other for this architecture" if forced else ""
            self.notes.append(f"What is not quantized was {str(own).removeprefix('torch.')} and became {made}{why}.")

    def _measure(self, ready: Stage, before: Stage | None, folder: Path) -> None:
        """Say what quantizing has changed. before: the model that adapters were merged into."""
        from app.adapters.merge_files import BaseFiles
        from app.adapters.quantize_loss_torch import loss_note
        from app.tasks.merge import unpacked_files

        self.report.progress("Measuring what it lost")
        config = read_json(folder / "config.json")
        files = sorted(folder.glob("*.safetensors"))
        table = config.get("quantization_config") or {}
        with contextlib.ExitStack() as opened:
            wanted = opened.enter_context(BaseFiles(ready.weights))
            adapted = any(adapter.weight for adapter in self.plan.stack.adapters)
            base = None
            if before is not None and adapted:
                base = unpacked_files(before, Path(self.plan.model)) or BaseFiles(before.weights)
                opened.callback(base.close)
            kind = str(config.get("model_type", ""))
            self.notes.append(loss_note(files, table, kind, wanted, base, self.pausing.check))

    def _card(self, source: Path, pieces: list[list[int]]) -> str:
        plan = self.plan
        base = re.sub(r"[\r\n|`]", " ", plan.base_name or Path(plan.model).name)
        merged = source / "README.md" if source != Path(plan.model) else None
        lines = [
            "---",
            "library_name: transformers",
            "base_model:",
            f"- {base}",
            "tags:",
            f"- {plan.method}",
            "---",
            "",
        ]
        lines += [f"# {re.sub(r'[|`]', ' ', self.target.name)}", ""]
        lines += [
            f"{base}, quantized to {plan.bits} bits by {plan.method.upper()} (groups of {plan.group_size}"
            f"{', columns in order of importance' if plan.desc_act else ''}) by Weft with GPTQModel, calibrated on "
            f"{sum(map(len, pieces)):,} tokens of a text.",
            "",
        ]
        if merged is not None and merged.is_file():
            text = merged.read_text("utf-8")
            lines += [
                "## Merged in",
                "",
                re.sub(r"\A---\n.*?\n---\n+(# [^\n]*\n+)?", "", text, flags=re.DOTALL).strip(),
                "",
            ]
        return "\n".join(lines)


def forget(value: Any, key: str) -> None:
    """Remove a key at every depth."""
    if isinstance(value, dict):
        value.pop(key, None)
        for part in value.values():
            forget(part, key)


def _in_words(error: OSError, staging: Staging) -> WeftError:
    """What the system has refused: to write the result, or to read what it is made of."""
    refused = (errno.EACCES, errno.EPERM, errno.EROFS)
    named = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None
    # The library stands in the staging folder: there its relative paths lead.
    ours = named is not None and (not named.is_absolute() or named.is_relative_to(staging.root))
    if error.errno in (errno.ENOSPC, errno.EDQUOT) or ours or (named is None and error.errno in refused):
        return write_error(staging.folder, error)
    if error.errno == errno.ENOMEM:
        return WeftError(
            ErrorKind.OUT_OF_MEMORY,
            "The memory did not suffice to quantize this model.",
            "Close other programs, or use fewer or shorter pieces of the text (--samples, --length).",
        )
    if named is not None:
        return WeftError(
            ErrorKind.PERMISSION if error.errno in refused else ErrorKind.CORRUPT,
            f"{named} cannot be read: {error.strerror or type(error).__name__}.",
            "Check the file, and that nothing else writes to it; then quantize again.",
        )
    return WeftError(
        ErrorKind.UNSUPPORTED,
        f"GPTQModel cannot quantize this model: {str(error).strip()[:300] or type(error).__name__}",
        "Check that the model's folder is whole, or export a GGUF with `weft export`.",
    )
