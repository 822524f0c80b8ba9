"""Make a GGUF file of a model, with adapters merged in on the way, of any type that llama.cpp has.

The converter is llama.cpp's own; the merge streams into it, so f32, f16, bf16 and q8_0 need no copy on the way. All other
types are quantized from a 16-bit file beside the target, which is removed again. Killed at any moment it leaves nothing
under the target's name and goes on from the last complete tensor of what it was writing.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from app.adapters.merge_staging import (
    Staging,
    fingerprint,
    job_of,
    require_space,
    require_unchanged,
    stamp,
)
from app.core.disk import sync_file, sync_folder
from app.core.errors import ErrorKind, WeftError
from app.core.export_check import check_export
from app.core.export_plan import OWN, ExportPlan, ExportResult, gguf_type
from app.core.merge_plan import MergePlan
from app.core.own_sampling import write_for_converter
from app.core.plain_text import read_plain
from app.core.stack import AdapterStack
from app.engine.pausing import Pausing
from app.engine.reporting import Report
from app.generation.hf_files import Stage, stage_tokenizer

Parameters = ExportPlan
VERSION = 1  # of what an export's bytes depend on, beside its plan
_MARGIN = 64 * 1024 * 1024
_WHOLE = "converted"  # lies in the staging folder when what is quantized next is whole


def run(parameters: ExportPlan, report: Report) -> ExportResult:
    """Export.

    Raises:
        WeftError: BAD_INPUT, UNSUPPORTED, NOT_FOUND, CORRUPT, HOSTILE before anything is written; DISK_FULL, PERMISSION, CANCELLED.
    """
    return _Export(parameters, report).run()


class _Export:
    def __init__(self, plan: ExportPlan, report: Report) -> None:
        self.plan, self.report = plan, report
        self.type = gguf_type(plan.type)
        self.target = Path(plan.target)
        self.started = time.monotonic()
        self.notes: list[str] = []
        self.resumed = 0
        self.inputs: list[tuple[Path, tuple[object, ...]]] = []
        self.mark = ""
        self._stopped = Pausing(report).stopped  # asked as it goes

    def run(self) -> ExportResult:
        check_export(self.plan)
        self._check_text()
        intermediate = 0
        plan = self.plan
        paths = [plan.model, *(a.path for a in plan.stack.adapters if a.weight), *filter(None, [plan.imatrix])]
        self.inputs = [(Path(path), stamp(Path(path))) for path in paths]
        self.mark = self._mark()
        with Staging(self.target) as staging:
            staging.begin(self.mark, job_of("export_gguf", "export", self.plan))
            with staging.making():
                made = staging.folder / "model.gguf"
                if Path(self.plan.model).suffix.lower() == ".gguf":
                    source = self._gguf_source(staging)
                elif self.type.direct:
                    source = self._convert(staging, made, self.type.name)
                else:
                    source = self._convert(staging, staging.folder / "sixteen.gguf", "auto")
                    intermediate = source.stat().st_size
                if source != made:
                    self._quantize(source, made, requantize=not intermediate)
                result = self._publish(made, intermediate)
        return result

    def _check_text(self) -> None:
        """A text that is none, or too short for an importance matrix, is told now, not after the conversion."""
        if not self.plan.imatrix:
            return
        from app.adapters.imatrix import require_enough
        from app.tasks.merge import stage_of

        text, model = read_plain(Path(self.plan.imatrix)), Path(self.plan.model)
        if model.is_dir():
            with contextlib.closing(stage_of(model)) as stage:
                require_enough(stage.path, text)
        else:
            require_enough(model, text)

    def _mark(self) -> str:
        """What the bytes depend on: a staging folder with another mark is begun anew."""
        import llama_cpp
        import torch

        from app.adapters.gguf_source import converter_folder

        plan = self.plan
        versions: list[object] = [VERSION, torch.__version__, llama_cpp.__version__]
        if Path(plan.model).is_dir():
            place = converter_folder()
            parts = (place / "conversion", place / "gguf-py" / "gguf")
            versions += [stamp(part) for part in parts if part.is_dir()]
        weights = [(a.path, a.weight) for a in plan.stack.adapters if a.weight]
        read = [(str(path), each) for path, each in self.inputs]
        return fingerprint([*versions, plan.type, plan.name, plan.pre_tokenizer, plan.imatrix_chunks, weights, read])

    # From a folder -------------------------------------------------------------------------------

    def _convert(self, staging: Staging, file: Path, kind: str) -> Path:
        """Write the merged model as a GGUF of one of the converter's own types. Finished files of an earlier run are kept."""
        if self._is_whole(staging, file):
            self.notes.append("The 16-bit file of an earlier run was used.")
            return file
        from app.adapters.gguf_convert_torch import model_of, refusal
        from app.adapters.gguf_file_writer import write_model
        from app.adapters.merge_stream_torch import merged_tensors

        self.report.progress("Reading the model and the adapters")
        with self._merge(staging) as (merge, stage, side):
            size = sum(math.prod(t.shape) for t in merge.tensors)
            self._require_space(staging, size, kind)
            try:
                model = model_of(
                    side,
                    merge.config,
                    merged_tensors(merge),
                    kind,
                    name=self._name(),
                    pre_tokenizer=self.plan.pre_tokenizer,
                )
                done, found = write_model(model, file, self.mark, self._progress("Converting"), self._stopped)
            except Exception as error:
                told = (
                    refusal(error)
                    if not isinstance(error, WeftError | OSError) or isinstance(error, FileNotFoundError)
                    else None
                )
                if told is None:
                    raise
                raise told from error
            self.resumed += found
            self.notes += merge.notes
            assert done == file.stat().st_size and stage is not None
        self._is_made(staging)
        return file

    def _is_whole(self, staging: Staging, file: Path) -> bool:
        """Whether an earlier run had finished what is quantized next."""
        whole = (staging.folder / _WHOLE).exists() and file.is_file()
        self.resumed += file.stat().st_size if whole else 0
        return whole

    def _is_made(self, staging: Staging) -> None:
        (staging.folder / _WHOLE).touch()

    @contextlib.contextmanager
    def _merge(self, staging: Staging) -> Generator[tuple[Any, Stage, Path]]:
        """The merged model's tensors, and a folder of what goes with them."""
        from app.adapters.merge_folder import write_side_files
        from app.adapters.merge_stream_torch import Merge, NeedsPeft
        from app.tasks.merge import run as merge_into_folder
        from app.tasks.merge import stage_of

        plan = MergePlan(model=self.plan.model, stack=self.plan.stack, target=str(staging.root / "merged"))
        stage = stage_of(Path(plan.model))
        try:
            try:
                merge = Merge(plan, stage.weights, stage.config, str(stage.path))
            except NeedsPeft:
                if Path(plan.target).is_dir():  # it gets its name when it is whole, and goes when the mark is another
                    self.notes.append("The merged model of an earlier run was used.")
                else:
                    self.notes += merge_into_folder(plan, self.report).notes
                stage.close()
                plan = MergePlan(model=plan.target, stack=AdapterStack(), target=str(staging.root / "unused"))
                stage = stage_of(Path(plan.model))
                merge = Merge(plan, stage.weights, stage.config, str(stage.path))
            with merge:
                # First all as it stands there, then what runs code or points elsewhere is taken out of it.
                raw, side = staging.root / "raw", staging.root / "side"
                for folder in (raw, side):
                    shutil.rmtree(folder, ignore_errors=True)
                    folder.mkdir()
                self.notes += write_side_files(plan, stage.config, merge.config, raw, merge.notes)
                for name in ("config.json", "README.md", "generation_config.json"):
                    if (raw / name).is_file():
                        shutil.move(raw / name, side / name)
                write_for_converter(side)
                stage_tokenizer(raw, side)  # links into raw
                yield merge, stage, side
        finally:
            stage.close()

    def _name(self) -> str:
        if self.plan.name:
            return self.plan.name
        adapters = [a.name or Path(a.path).name for a in self.plan.stack.adapters if a.weight]
        return " + ".join([Path(self.plan.model).name, *adapters])

    def _require_space(self, staging: Staging, weights: int, kind: str) -> None:
        converted = weights * {"f32": 4, "q8_0": 1.0625}.get(kind, 2)
        total = converted + (0 if self.type.name == kind else weights * self.type.bits / 8)
        if self.type.name != kind:
            self.report.log(
                "info",
                f"A 16-bit file of {converted / 1e9:.2f} GB is made on the way to {self.type.name}, and removed again.",
            )
        require_space(
            staging.root, int(total) - staging.allocated(), "The GGUF file, with what is made on the way,", _MARGIN
        )

    # From a GGUF ---------------------------------------------------------------------------------

    def _gguf_source(self, staging: Staging) -> Path:
        """The GGUF that is quantized: the base itself, or one with the stack merged in."""
        from app.core.formats import read_gguf_header

        base = Path(self.plan.model)
        header = read_gguf_header(base)
        if any(a.weight for a in self.plan.stack.adapters):
            from app.adapters.merge_gguf import VERSION as MERGE_VERSION
            from app.adapters.merge_gguf import MergeIntoGguf

            own = self.type is OWN
            merged = staging.folder / ("model.gguf" if own else "merged.gguf")
            merge = MergeIntoGguf(base, self.plan.stack, "own" if own else "open")
            after = 0 if own else int(sum(math.prod(t.shape) for t in merge.tensors) * self.type.bits / 8)
            if after:
                self.report.log(
                    "info",
                    f"A merged file of {merge.bytes / 1e9:.2f} GB is made on the way to {self.type.name}, and removed again.",
                )
            needed = merge.bytes + after - staging.allocated()
            require_space(staging.root, needed, "The GGUF file, with what is made on the way,", _MARGIN)
            self.notes += merge.notes
            if self._is_whole(staging, merged):
                self.notes.append("The merged file of an earlier run was used.")
            else:
                made_of = f"{self.mark} {MERGE_VERSION}"
                self.resumed += merge.write(merged, self._progress("Merging"), self._stopped, made_of)
                self._is_made(staging)
            return merged
        weights = sum(math.prod(t.shape) for t in header.tensors)
        needed = int(weights * self.type.bits / 8) - staging.allocated()
        require_space(staging.root, needed, "The GGUF file", _MARGIN)
        self.notes.append("It was made from a GGUF: what was rounded there stays rounded.")
        return base

    # Quantizing ----------------------------------------------------------------------------------

    def _quantize(self, source: Path, made: Path, *, requantize: bool) -> None:
        from app.adapters.gguf_quantize import quantize

        matrix, weighed = self._imatrix(source, made.with_name("imatrix")) if self.plan.imatrix else (None, "")
        self.report.progress("Quantizing")
        self.resumed += quantize(
            source,
            made,
            self.type.name,
            imatrix=matrix,
            threads=self.plan.threads,
            requantize=requantize,
            progress=self._progress("Quantizing"),
            cancelled=self._stopped,
            made_of=f"{self.mark} {weighed}",
        )

    def _imatrix(self, source: Path, file: Path) -> tuple[dict[str, Any], str]:
        """What matters in each matrix, and a hash of it. It is kept in `file`: measured again it might round otherwise."""
        from app.adapters.imatrix import kept, measure

        self.notes.append(f"Quantized with an importance matrix of {Path(self.plan.imatrix).name}.")

        def measured() -> dict[str, Any]:
            text = Path(self.plan.imatrix).read_text("utf-8", errors="replace")
            usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
            return measure(
                source,
                text,
                self.plan.imatrix_chunks,
                threads=self.plan.threads or usable,
                progress=self._progress("Reading the text for the importance matrix", "chunks"),
                cancelled=self._stopped,
            )

        return kept(file, measured)

    # The end -------------------------------------------------------------------------------------

    def _publish(self, made: Path, intermediate: int) -> ExportResult:
        from app.core.formats import read_gguf_header

        self.report.progress("Waiting for the disk")
        sync_file(made)
        # What cannot be read and loaded again never gets its name.
        header = read_gguf_header(made)
        check_loads(made)
        require_unchanged(self.inputs)
        if self.target.exists():
            raise WeftError(
                ErrorKind.BAD_INPUT, f"{self.target} has appeared in the meantime.", "Export under another name."
            )
        modelfile = self._modelfile(header) if self.plan.modelfile else ""
        made.rename(self.target)
        sync_folder(self.target.absolute().parent)
        return ExportResult(
            file=str(self.target),
            bytes=self.target.stat().st_size,
            type=self.type.name,
            tensors=len(header.tensors),
            intermediate=intermediate,
            resumed=self.resumed,
            modelfile=modelfile,
            notes=list(dict.fromkeys(self.notes)),
            seconds=time.monotonic() - self.started,
        )

    def _modelfile(self, header: Any) -> str:
        """Ollama's description of the model: it reads the template from the file itself."""
        path = self.target.with_name(self.target.stem + ".Modelfile")
        context = header.metadata.get(f"{header.text('general.architecture')}.context_length")
        lines = [f"FROM ./{self.target.name}"]
        lines += [f"PARAMETER num_ctx {min(int(context), 8192)}"] if isinstance(context, int) else []
        if path.exists():
            self.notes.append(f"{path.name} was there already and stays as it is.")
        else:
            path.write_text("\n".join(lines) + "\n", "utf-8")
        return str(path)

    def _progress(self, phase: str, unit: str = "bytes") -> Callable[[int, int], None]:
        return lambda done, total: self.report.progress(phase, done, total, unit)


def check_loads(file: Path) -> None:
    """Have llama.cpp load a file, mapped and not read. Raises WeftError UNSUPPORTED with its reason."""
    import importlib

    from app.generation.llama_log import library_log

    llama_cpp: Any = importlib.import_module("llama_cpp")

    log = library_log(llama_cpp)
    log.attach(llama_cpp)
    log.clear()
    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(os.fsencode(file), parameters)
    if not model:
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            f"llama.cpp cannot load what its converter made of this model: {log.reason()[:300]}.",
            "Merge into safetensors instead; the converter expects other shapes of this architecture.",
        )
    llama_cpp.llama_model_free(model)
