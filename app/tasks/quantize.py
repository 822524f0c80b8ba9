"""Quantize a model by GPTQ or AWQ, with adapters merged in first: one new model folder that its loaders read.

Runs in the environment `gptq`. What reads the text and rounds is GPTQModel; what goes in is checked before, what comes out
is checked after, and nothing bears the target's name before all of it is on the disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from app.adapters.merge_staging import Staging, job_of, require_space, write_error
from app.core.errors import ErrorKind, WeftError
from app.core.merge_plan import MergePlan
from app.core.quantize_plan import ENVIRONMENT, SHORTEST, QuantizePlan, QuantizeResult, check_quantize
from app.engine.reporting import Report
from app.generation.hf_files import Stage, read_json

Parameters = QuantizePlan
_MARGIN = 64 * 1024 * 1024
_LARGEST_TEXT = 64 * 1024 * 1024  # bytes of the calibration text that are read; far more than is ever used
_INSIDE_A_LAYER = re.compile(r"\.\d+\.")


class _Shapes(NamedTuple):
    """Of the model, read from its config alone: (name, inputs, outputs) of each matrix in its layers, and all other weights."""

    matrices: list[tuple[str, int, int]]
    others: int
    layers: int


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

    def run(self) -> QuantizeResult:
        from app.tasks.merge import check_target, stage_of

        plan = self.plan
        check_quantize(plan)
        check_target(self.target)
        merged = any(adapter.weight for adapter in plan.stack.adapters)
        self.report.progress("Reading the model and the text")
        with contextlib.closing(stage_of(Path(plan.model))) as stage:
            shapes = shapes_of(stage)
            check_shapes(plan, shapes)
            self._pieces(stage.path)  # a text that is too short is told now, not after the merge
            with Staging(self.target) as staging:
                # A mark of its own each time: what a killed run has left is not gone on with.
                staging.begin(f"quantize {time.time_ns()}", job_of("quantize", ENVIRONMENT, plan))
                for left in ("aside", "merged"):
                    shutil.rmtree(staging.root / left, ignore_errors=True)
                try:
                    self._require_space(staging, shapes, merged=merged)
                    source = self._merge(staging) if merged else Path(plan.model)
                    with contextlib.closing(Stage(source, "safetensors") if merged else stage) as ready:
                        pieces = self._pieces(ready.path)
                        self._quantize(ready.path, staging, pieces, shapes.layers)
                        written = self._finish(ready, source, staging.folder, pieces)
                    self._check()
                    self.report.progress("Waiting for the disk")
                    staging.publish()
                except OSError as error:
                    raise write_error(staging.folder, error) from error
                finally:
                    staging.discard()  # nothing to go on from: a calibration is begun anew
        return QuantizeResult(
            folder=plan.target,
            bytes=written[0],
            matrices=written[1],
            samples=len(pieces),
            tokens=sum(map(len, pieces)),
            notes=list(dict.fromkeys(self.notes)),
            seconds=time.monotonic() - self.started,
        )

    def _check(self) -> None:
        if self.report.cancelled:
            raise WeftError(ErrorKind.CANCELLED, "Cancelled.")

    def _require_space(self, staging: Staging, shapes: _Shapes, *, merged: bool) -> None:
        weights = sum(rows * columns for _, columns, rows in shapes.matrices)
        made = weights * (self.plan.bits + 32 / self.plan.group_size) / 8 + 2 * shapes.others
        # Beside the result: what is set aside from memory meanwhile, and the merged model.
        sixteen = 2 * (weights + shapes.others)
        between = sixteen * (2 if merged else 1)
        if merged:
            self.report.log("info", f"A merged folder of {sixteen / 1e9:.2f} GB is made on the way, and removed again.")
        require_space(staging.root, int(made + between) + _MARGIN, "The model, with what is made on the way,")

    def _merge(self, staging: Staging) -> Path:
        """The 16-bit model with the stack merged in, in the staging folder."""
        from app.tasks.merge import run as merge

        target = staging.root / "merged"
        made = merge(
            MergePlan(model=self.plan.model, stack=self.plan.stack, target=str(target), base_name=self.plan.base_name),
            self.report,
        )
        self.notes += made.notes
        return target

    def _pieces(self, folder: Path) -> list[list[int]]:
        """The calibration text as token ids: pieces of `length`, spread evenly over the whole text."""
        import transformers

        path = Path(self.plan.calibration)
        try:
            with path.open("rb") as file:
                text = file.read(_LARGEST_TEXT).decode("utf-8", "replace")
        except FileNotFoundError:
            raise WeftError(ErrorKind.NOT_FOUND, f"There is no text {path}.", "Check the path.") from None
        except OSError as error:
            raise WeftError(
                ErrorKind.PERMISSION, f"{path} cannot be read: {error.strerror}.", "Check the file."
            ) from error
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
        length = self.plan.length
        pieces = [ids[i : i + length] for i in range(0, len(ids), length)]
        if len(pieces) > 1 and len(pieces[-1]) < length:
            pieces.pop()  # the library pads; whole pieces weigh alike
        if not pieces or len(pieces[0]) < SHORTEST:
            raise WeftError(
                ErrorKind.BAD_INPUT,
                f"{path.name} has {len(ids)} tokens: too short to calibrate on.",
                "Give a text of some hundred kilobytes, like what the model will read.",
            )
        if len(pieces) > self.plan.samples:
            pieces = [pieces[i * len(pieces) // self.plan.samples] for i in range(self.plan.samples)]
        return pieces

    def _quantize(self, model: Path, staging: Staging, pieces: list[list[int]], layers: int) -> None:
        import torch
        from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
        from gptqmodel.looper.module_looper import StopMainLoop

        plan = self.plan
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1))
        aside = staging.root / "aside"
        aside.mkdir()
        awq = plan.method == "awq"
        # AWQ's readers expect a zero point (sym=False); GPTQ's fast kernels are for grids without one.
        options: dict[str, Any] = (
            {"format": "gemm", "sym": False} if awq else {"format": "gptq", "desc_act": plan.desc_act}
        )
        if plan.desc_act:
            options["act_group_aware"] = False  # the two are one another's alternative
        config = QuantizeConfig(
            quant_method=plan.method,
            bits=plan.bits,
            group_size=plan.group_size,
            device=plan.device or ("cuda" if torch.cuda.is_available() else "cpu"),
            offload_to_disk_path=str(aside),
            **options,
        )
        tokens = sum(map(len, pieces))
        if tokens < 50_000:
            self.notes.append(
                f"Calibrated on {tokens:,} tokens: a longer text, like what the model will read, loses less."
            )
        data = [{"input_ids": piece, "attention_mask": [1] * len(piece)} for piece in pieces]
        phase = f"Quantizing by {plan.method.upper()}"

        def heard(**event: Any) -> Any:
            """Called by the library at each part of a layer, and after each layer."""
            self.report.progress(phase, event.get("layer_idx", 0), layers, "layers")
            return StopMainLoop if self.report.cancelled else None

        # The library writes a folder `logs` where it stands: let it stand in a folder that goes.
        with self._in_words(StopMainLoop), contextlib.chdir(aside):
            quantizer = GPTQModel.load(str(model), config, trust_remote_code=False)
            quantizer.layer_callback = heard
            quantizer.subset_callback = heard
            self.report.progress(phase, 0, layers, "layers")
            quantizer.quantize(
                data,
                batch_size=1,
                calibration_data_min_length=1,
                backend=BACKEND.AWQ_TORCH if awq else BACKEND.AUTO,
            )
            self._check()
            self.report.progress("Writing")
            quantizer.save(str(staging.folder))  # before any forward: the processor's kernels repack the weights in it

    @contextlib.contextmanager
    def _in_words(self, stopped: type[BaseException]) -> Iterator[None]:
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

        matrices = check_weights(folder)
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


def shapes_of(stage: Stage) -> _Shapes:
    """The model's matrices, from its config alone: no weight is read.

    Raises:
        WeftError: UNSUPPORTED for architectures that GPTQModel does not know, for models of more than text, and own code.
    """
    import torch
    import transformers

    kind = str(stage.config.get("model_type", ""))
    hint = "Merge into safetensors, or export a GGUF with `weft export`."
    if any(key in stage.config for key in ("vision_config", "audio_config")):
        raise WeftError(ErrorKind.UNSUPPORTED, f"{kind} reads more than text, and only text calibrates it here.", hint)
    from gptqmodel.models.auto import SUPPORTED_MODELS

    if kind.lower() not in SUPPORTED_MODELS:
        raise WeftError(
            ErrorKind.UNSUPPORTED, f"GPTQModel does not know the architecture {kind or 'of this model'}.", hint
        )
    try:
        config = transformers.AutoConfig.from_pretrained(str(stage.path), local_files_only=True)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise WeftError(
            ErrorKind.UNSUPPORTED, f"Transformers cannot build this model: {str(error)[:200]}", hint
        ) from error
    matrices: list[tuple[str, int, int]] = []
    for name, module in model.named_modules():
        if not _INSIDE_A_LAYER.search(f".{name}"):
            continue
        if isinstance(module, torch.nn.Linear):
            matrices.append((name, module.in_features, module.out_features))
        elif type(module).__name__ == "Conv1D":
            matrices.append((name, *module.weight.shape))
    if not matrices:
        raise WeftError(ErrorKind.UNSUPPORTED, f"{kind} has no matrices in layers that could be quantized.", hint)
    total = sum(parameter.numel() for parameter in model.parameters())
    layers = int(getattr(config, "num_hidden_layers", 0) or 0)
    return _Shapes(matrices, max(0, total - sum(i * o for _, i, o in matrices)), layers)


def check_shapes(plan: QuantizePlan, shapes: _Shapes) -> None:
    """Refuse groups that matrices cannot be divided into.

    Raises:
        WeftError: BAD_INPUT with the largest group that fits; UNSUPPORTED where none does.
    """
    from app.core.quantize_plan import GROUPS

    step = 8 if plan.method == "awq" else 32  # outputs that are packed together
    for name, inputs, outputs in shapes.matrices:
        if outputs % step:
            raise WeftError(
                ErrorKind.UNSUPPORTED,
                f"{name} has {outputs} outputs, and {plan.method.upper()} packs them by {step}.",
                "Choose other bits, or export a GGUF with `weft export`.",
            )
        if inputs % plan.group_size:
            fitting = [g for g in GROUPS[plan.method] if not any(i % g for _, i, _ in shapes.matrices)]
            raise WeftError(
                ErrorKind.BAD_INPUT if fitting else ErrorKind.UNSUPPORTED,
                f"{name} has {inputs} inputs, which groups of {plan.group_size} do not divide.",
                f"Choose a group size of {fitting[-1]}." if fitting else "Export a GGUF with `weft export`.",
            )


def check_weights(folder: Path) -> int:
    """Refuse what nobody should load: files that cannot be read, and scales that are no numbers. Returns the packed matrices.

    Raises:
        WeftError: CORRUPT, UNSUPPORTED.
    """
    import safetensors
    import torch

    matrices = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(str(file), "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (not a dict)
                matrices += name.endswith(".qweight")
                if name.endswith(".scales") and not bool(torch.isfinite(opened.get_tensor(name)).all()):
                    raise WeftError(
                        ErrorKind.CORRUPT,
                        f"{name.removesuffix('.scales')} came out with scales that are no numbers.",
                        "Check that the model itself answers sensibly, and calibrate on another or a longer text.",
                    )
    if not matrices:
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            "Nothing of this model was quantized.",
            "Export a GGUF with `weft export` instead.",
        )
    return matrices


def forget(value: Any, key: str) -> None:
    """Remove a key at every depth."""
    if isinstance(value, dict):
        value.pop(key, None)
        for part in value.values():
            forget(part, key)
