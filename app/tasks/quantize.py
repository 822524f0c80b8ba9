"""Quantize a model by GPTQ, AWQ or HQQ, with adapters merged in first: one new model folder that its loaders read.

Layer by layer, in the memory of the 16-bit model: each layer is on the disk as soon as it is complete, and a run that was killed goes on
from there. Nothing bears the target's name before all of it is on the disk.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
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
from app.core.quantize_plan import CALIBRATED, ENVIRONMENT, QuantizePlan, QuantizeResult, check_quantize
from app.core.stack import AdapterStack
from app.engine.pausing import Pausing
from app.engine.reporting import Report
from app.generation.hf_files import Stage

if TYPE_CHECKING:
    from app.adapters.merge_files import BaseFiles
    from app.adapters.quantize_shapes_torch import Shapes
    from app.adapters.quantized_folder import MatrixLoss

Parameters = QuantizePlan
VERSION = 3  # of what the result's bytes depend on, beside the plan
_MARGIN = 64 * 1024 * 1024


def run(parameters: QuantizePlan, report: Report) -> QuantizeResult:
    """Quantize.

    Raises:
        WeftError: BAD_INPUT, UNSUPPORTED, NOT_FOUND, CORRUPT, HOSTILE before anything is written; DISK_FULL, PERMISSION,
            OUT_OF_MEMORY, CANCELLED.
    """
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

    def run(self) -> QuantizeResult:
        from app.adapters.merge_files import BaseFiles
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
            check_shapes(plan, shapes, str(stage.config.get("model_type", "")))
            self._pieces(stage.path)  # a text that is too short is told now, not after the merge
            with Staging(self.target) as staging:
                self._begin(staging)
                try:
                    self._require_space(staging, shapes, _merged_bytes(stage, packed=packed) if merged else 0)
                    source = self._merge(staging) if merged else Path(plan.model)
                    with contextlib.closing(Stage(source, "safetensors") if merged else stage) as ready:
                        pieces = self._pieces(ready.path)
                        with BaseFiles(ready.weights) as files:
                            losses, table, size = self._quantize(ready, files, staging, pieces, shapes)
                            self._say_loss(losses, files, stage if merged else None)
                        self._finish(ready, source, staging.folder, pieces, table)
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
            bytes=size,
            matrices=len(losses),
            method=plan.method,
            bits=plan.bits,
            samples=len(pieces),
            tokens=sum(map(len, pieces)),
            notes=list(dict.fromkeys(self.notes)),
            seconds=time.monotonic() - self.started,
        )

    def _begin(self, staging: Staging) -> None:
        """Keep what a killed run has completed: the merged model, and layers that are quantized."""
        plan = self.plan
        weights = [(a.path, a.weight) for a in plan.stack.adapters if a.weight]
        texts = [Path(plan.calibration)] if plan.method in CALIBRATED else []
        paths = [Path(plan.model), *texts, *(Path(path) for path, _ in weights)]
        self.inputs = [(path, stamp(path)) for path in paths]
        known = msgspec.structs.replace(plan, stack=AdapterStack(), target="", base_name="")
        mark = fingerprint([VERSION, known, weights, [each for _, each in self.inputs]])
        staging.begin(mark, job_of("quantize", ENVIRONMENT, plan))  # what another job had left goes here
        shutil.rmtree(staging.folder, ignore_errors=True)
        try:
            staging.folder.mkdir()
        except OSError as error:
            raise write_error(staging.folder, error) from error

    def _require_space(self, staging: Staging, shapes: Shapes, merged: int) -> None:
        """merged: bytes of the folder that is made on the way."""
        plan = self.plan
        needed = shapes.weights * (plan.bits + 32 / plan.group_size) / 8 + 2 * shapes.others + merged
        if merged:
            self.report.log("info", f"A merged folder of {merged / 1e9:.2f} GB is made on the way, and removed again.")
        there = sum(path.stat().st_size for path in staging.root.rglob("*") if path.is_file())  # by a killed run
        require_space(staging.root, int(needed) - there, "The model, with what is made on the way,", _MARGIN)

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

    def _pieces(self, folder: Path) -> list[list[int]]:
        """The calibration text as token ids; none for HQQ."""
        from app.adapters.calibration_text import pieces_of

        if self.plan.method not in CALIBRATED:
            return []
        pieces, self.all_of_it, notes = pieces_of(self.plan, folder)
        self.notes += notes
        return pieces

    # Quantizing -------------------------------------------------------------------------------------

    def _quantize(
        self, ready: Stage, files: BaseFiles, staging: Staging, pieces: list[list[int]], shapes: Shapes
    ) -> tuple[list[MatrixLoss], Mapping[str, object], int]:
        """Returns how far each matrix is from what it was, config.json's table, and the files' bytes."""
        import torch

        from app.adapters.layer_walk_torch import walk
        from app.adapters.quantize_layers_torch import QuantizeLayers
        from app.adapters.quantize_model_torch import QuantizableModel
        from app.adapters.quantize_shapes_torch import own_dtype, stored_dtype
        from app.adapters.quantized_folder import LayerFiles, quantization_table

        plan, dtype = self.plan, own_dtype(ready.path)
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1))
        tokens = sum(map(len, pieces))
        if pieces and tokens < 50_000 and self.all_of_it:
            self.notes.append(
                f"Calibrated on {tokens:,} tokens: a longer text, like what the model will read, loses less."
            )
        with self._told(str(ready.config.get("model_type", ""))):
            model = QuantizableModel(ready.path, files, dtype)
            written = LayerFiles(staging.root / "layers", files, None if stored_dtype(ready.path) == dtype else dtype)
            layers = QuantizeLayers(plan, model, written, dtype, self._listener(shapes), self.pausing.check)
            if layers.done:
                self.notes.append("Layers that an earlier run had quantized were used.")
            kept, blocks = model.kept(), model.blocks()
            if pieces:
                device = plan.device or ("cuda" if torch.cuda.is_available() else "cpu")
                walk(model.model, pieces, layers.each, device, compute_dtype(device, dtype))
            else:
                layers.pack()
        self.report.progress("Writing")
        written.write_rest(model)
        count = len(model.layers)
        losses, unseen, left = written.losses(count)
        if unseen:
            self.notes.append(
                f"No token of the text came to {unseen} of {len(losses)} matrices (experts that were not chosen): "
                "they are rounded plainly. A longer text reaches more."
            )
        if left:
            names = ", ".join(sorted({name.rpartition(".")[2] for name in left}))
            self.notes.append(
                f"{len(left)} matrices ({names}) are read in a way that cannot be heard: they stay in 16 bits."
            )
        self._tell_type(ready, dtype)
        table = quantization_table(
            plan.method, plan.bits, plan.group_size, by_importance=plan.desc_act, kept=[*kept, *left], blocks=blocks
        )
        return losses, table, written.publish(count, staging.folder)

    def _listener(self, shapes: Shapes) -> Callable[[float], None]:
        """What is told how many layers are done, in fractions of one too."""
        phase, total = f"Quantizing by {self.plan.method.upper()}", 2 * shapes.weights
        self.report.progress(phase, 0, total, "bytes")

        def heard(layers: float) -> None:
            self.report.progress(phase, min(1.0, layers / max(1, shapes.layers)) * total, total, "bytes")

        return heard

    @contextlib.contextmanager
    def _told(self, kind: str) -> Iterator[None]:
        """What a model's own code and the machine's memory refuse, as something a person can act on."""
        from app.adapters.layer_walk_torch import ForeignError

        try:
            yield
        except ForeignError as error:
            raise WeftError(
                ErrorKind.UNSUPPORTED,
                f"The layers of {kind or 'this architecture'} cannot be run one by one: {str(error)[:300]}",
                "Merge into safetensors, or export a GGUF with `weft export`.",
            ) from error
        except (MemoryError, RuntimeError) as error:
            said = str(error)
            short = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
            if not short and "allocate memory" not in said:
                raise
            raise WeftError(
                ErrorKind.OUT_OF_MEMORY,
                "The memory did not suffice for a layer with its calibration text.",
                "Use fewer or shorter pieces of the text (--samples, --length), or the processor.",
            ) from error

    def _say_loss(self, losses: list[MatrixLoss], files: BaseFiles, before: Stage | None) -> None:
        """Say what quantizing has changed. before: the model that adapters were merged into."""
        from app.adapters.merge_files import BaseFiles
        from app.adapters.quantize_loss_torch import loss_note
        from app.tasks.merge import packing_of, unpacked_files

        self.report.progress("Measuring what it lost")
        with contextlib.ExitStack() as opened:
            base = None
            if before is not None and any(adapter.weight for adapter in self.plan.stack.adapters):
                base = unpacked_files(before, Path(self.plan.model)) or BaseFiles(before.weights)
                opened.callback(base.close)
            packed = packing_of(Path(self.plan.model)) is not None
            of = "what was unpacked" if packed else "16 bits"
            self.notes.append(loss_note(losses, files, base, self.pausing.check, of))

    # What goes beside the weights ---------------------------------------------------------------------

    def _finish(
        self, ready: Stage, source: Path, folder: Path, pieces: list[list[int]], table: Mapping[str, object]
    ) -> None:
        """Put beside the weights what goes with them."""
        from app.adapters.merge_folder import side_files
        from app.adapters.quantize_shapes_torch import own_dtype
        from app.adapters.quantized_card import quantized_card

        plan, dtype = self.plan, str(own_dtype(ready.path)).removeprefix("torch.")
        # Under its older name too: other programs read that.
        config = {**ready.original, "dtype": dtype, "torch_dtype": dtype, "quantization_config": table}
        for name, made in (("config.json", config), ("quantize_config.json", table)):
            if name == "config.json" or plan.method == "gptq":
                (folder / name).write_text(json.dumps(made, indent=2, ensure_ascii=False) + "\n", "utf-8")
        for path in side_files(source):
            if path.name not in ("quantize_config.json", "quant_config.json"):  # of a base that was packed
                shutil.copyfile(path, folder / path.name)
        card = quantized_card(plan, source, sum(map(len, pieces)))
        (folder / "README.md").write_text(card, "utf-8")

    def _tell_type(self, ready: Stage, made: Any) -> None:
        """Say when what is not quantized could not keep its type."""
        from app.adapters.quantize_shapes_torch import stored_dtype

        own = stored_dtype(ready.path)
        if own is not None and own != made:
            was, became = (str(each).removeprefix("torch.") for each in (own, made))
            self.notes.append(f"What is not quantized was {was} and became {became}.")


def _merged_bytes(stage: Stage, *, packed: bool) -> int:
    """Of the weights with a stack merged in: the base's own, or 16 bits of what is packed."""
    from app.adapters.quantize_shapes_torch import shapes_of

    if packed:
        shapes = shapes_of(stage.path, stage.config)
        return 2 * (shapes.weights + shapes.others)
    return sum(path.stat().st_size for path in stage.weights)


def compute_dtype(device: str, own: Any) -> Any:
    """The torch dtype in which the text goes through the layers: a graphics card is far faster in the model's own 16 bits."""
    import torch

    return own if device.startswith("cuda") else torch.float32


def _in_words(error: OSError, staging: Staging) -> WeftError:
    """What the system has refused: to write the result, or to read what it is made of."""
    refused = (errno.EACCES, errno.EPERM, errno.EROFS)
    named = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None
    ours = named is not None and named.is_relative_to(staging.root)
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
        f"This model cannot be quantized: {str(error).strip()[:300] or type(error).__name__}",
        "Check that the model's folder is whole, or export a GGUF with `weft export`.",
    )
