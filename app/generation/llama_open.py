"""From a GGUF file to a context that is ready to answer: the library, the weights, room for the context, warming up."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from app.core import memory
from app.core.errors import ErrorKind, WeftError
from app.core.library import ModelEntry
from app.engine.reporting import Report
from app.generation import llama_machine
from app.generation.llama_context import LlamaContext
from app.generation.llama_log import LibraryLog, library_log
from app.generation.llama_model import LlamaModel
from app.generation.llama_options import Options
from app.generation.llama_params import context_params
from app.generation.llama_rules import demand
from app.generation.llama_threads import Threads, fastest_threads


def open_library(options: Options) -> tuple[Any, LibraryLog]:
    """Import and initialise llama_cpp, once in a process. Returns the module and what hears its log.

    Raises:
        WeftError: ENVIRONMENT.
    """
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # an abort would otherwise attach a debugger to itself
    try:
        import llama_cpp as library
    except (ImportError, OSError, RuntimeError) as error:
        raise WeftError(
            ErrorKind.ENVIRONMENT,
            f"llama-cpp-python cannot be imported: {error}.",
            "Repair the llama.cpp environment.",
        ) from error
    log = library_log(library)
    library.llama_backend_init()
    if options.numa != "off":
        library.llama_numa_init(getattr(library, f"GGML_NUMA_STRATEGY_{options.numa.upper()}"))
    return library, log


def place(library: Any, entry: ModelEntry, options: Options) -> tuple[Options, int]:
    """The options with the number of GPU layers settled, and bytes free on GPUs."""
    if options.cpu or not library.llama_supports_gpu_offload():
        return options, 0
    vram = llama_machine.free_gpu_memory()
    weights = entry.weight_bytes or entry.bytes
    if options.n_gpu_layers is None and entry.shape.layers and weights:
        layers = memory.gpu_layers_that_fit(entry.shape, weights, demand(options), vram)
        options = msgspec.structs.replace(options, n_gpu_layers=layers)
    return options, vram


def open_model(library: Any, log: LibraryLog, file: Path, options: Options, report: Report) -> LlamaModel:
    """Read the weights. Raises WeftError: CANCELLED, or why they cannot be loaded."""

    def advance(done: float) -> bool:
        report.progress("Reading the model", done, 1.0)
        return not report.cancelled

    return LlamaModel(library, log, file, options, advance)


def size_of_context(library: Any, model: LlamaModel, options: Options, free: int) -> tuple[int, list[str]]:
    """Tokens to ask a context for, 0 for what the model was trained for, and sentences worth showing.

    Args:
        free: bytes of the memory in which its cache is to lie.
    """
    trained = model.shape.context
    notes: list[str] = []
    if not library.llama_supports_gpu_offload() and options.n_gpu_layers and not options.cpu:
        notes.append("This llama.cpp was built without GPU support: all layers run on the CPU.")
    wanted = options.n_ctx or memory.automatic_context(model.shape, demand(options), free, model.bytes)
    if options.n_ctx is None and trained and wanted < trained:
        notes.append(
            f"The model was trained for {trained:,} tokens; {wanted:,} of them were taken, since memory is short. "
            "Set the context length to have more."
        )
    if options.n_ctx and trained and options.n_ctx > trained:
        notes.append(f"The model was trained for {trained:,} tokens; beyond them it may lose the thread.")
    return wanted, notes


def open_context(
    library: Any, log: LibraryLog, model: LlamaModel, options: Options, *, size: int, parameters: int
) -> LlamaContext:
    """Make room for `size` tokens. parameters: of the model, 0 where that is not known. Raises WeftError."""
    params = context_params(library, model, options, context=size, cores=llama_machine.physical_cores())
    pointer = library.llama_init_from_model(model.pointer, params)
    if not pointer:
        raise _context_failure(log.reason(), size, params.n_ctx)
    chunk = memory.prompt_chunk(parameters or library.llama_model_n_params(model.pointer), options.n_batch)
    return LlamaContext(
        library,
        pointer,
        chunk=options.n_batch if log.offloaded[0] else chunk,
        rows=params.n_outputs_max,
        sliding_window=0 if options.swa_full else model.shape.sliding_window,
    )


def warm_up(
    library: Any,
    context: LlamaContext,
    model: LlamaModel,
    options: Options,
    known: Mapping[str, int],
    report: Report,
) -> Threads:
    """Touch every weight and find the fastest number of threads. known: what was measured before. Raises WeftError CANCELLED."""
    report.on_cancel(context.abort.set)
    report.progress("Warming up")
    measured = fastest_threads(library, context, model, options, llama_machine.physical_cores(), known)
    context.abort.clear()
    context.clear()
    if report.cancelled:
        raise WeftError(ErrorKind.CANCELLED, "Loading was stopped.")
    report.log("info", measured.text)
    return measured


def device(library: Any, log: LibraryLog, context: LlamaContext) -> str:
    """Where it runs, for people."""
    threads = library.llama_n_threads(context.pointer)
    cpu = f"CPU, {threads} thread{'s' if threads != 1 else ''}"
    layers, of = log.offloaded
    if not layers:
        return cpu
    names = ", ".join(dict.fromkeys(log.devices.values())) or "GPU"
    return f"{names}: {layers} of {of} layers" + ("" if layers == of else f"; {cpu}")


def measured_bytes(log: LibraryLog, before: int, after: int) -> int:
    """What a load added: resident memory of this process (mapped pages of the file included), and GPU buffers.

    Args:
        before, after: bytes resident then; 0 where the system does not tell.
    """
    host = sum(size for (where, _), size in log.buffers.items() if _on_host(where))
    gpus = sum(size for (where, _), size in log.buffers.items() if not _on_host(where))
    return (max(0, after - before) if before and after else host) + gpus


def _on_host(where: str) -> bool:
    return where.startswith("CPU") or where.endswith("_Host")


def _context_failure(reason: str, wanted: int, tokens: int) -> WeftError:
    lower = reason.lower()
    if "flash attention" in lower:
        return WeftError(
            ErrorKind.BAD_INPUT,
            f"llama.cpp refused the options: {reason}.",
            "Set both cache types to f16, or flash_attention to on.",
        )
    if "alloc" in lower or "memory" in lower or not reason:
        return WeftError(
            ErrorKind.OUT_OF_MEMORY,
            f"There is not enough memory for a context of {wanted or tokens:,} tokens.",
            "Choose a smaller context length, or q8_0 as cache type.",
        )
    return WeftError(
        ErrorKind.UNSUPPORTED, f"llama.cpp refused the context: {reason}.", "Reset the options that you changed."
    )
