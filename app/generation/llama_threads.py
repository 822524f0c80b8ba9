"""How many threads decode fastest here: measured with the model that is loaded, once for each size of models.

More threads are not always faster: decoding waits for memory, and threads that spin on shared cores can make it a
hundred times slower. So a few decodes are timed, with all physical cores and with fewer.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import msgspec

from app.generation.llama_context import LlamaContext
from app.generation.llama_model import LlamaModel
from app.generation.llama_options import Options

BUDGET = 0.8  # seconds for all of it, warm-up apart
_TIMED = 5  # decodes per candidate at most
_WORTH = 0.9  # fewer threads must take less than this share of the time to be chosen


class Threads(msgspec.Struct, frozen=True, kw_only=True):
    """What was found, and how, in a sentence for the log.

    Attributes:
        calibration: worth knowing at the next load: see `Loaded.calibration`.
    """

    threads: int
    text: str
    calibration: dict[str, int] = {}


def fastest_threads(
    library: Any,
    context: LlamaContext,
    model: LlamaModel,
    options: Options,
    cores: int,
    known: Mapping[str, int],
) -> Threads:
    """Warm the model up and, where the options leave it open, set the fastest number of threads.

    Args:
        known: what was measured on this machine before.

    The context's cache holds rubbish afterwards. Stops early, at any time, when `context.abort` is set.
    """
    token = max(0, library.llama_vocab_bos(model.vocab))
    batch_threads = options.threads_batch or options.threads or cores
    library.llama_set_warmup(context.pointer, True)
    context.read([token])  # touches every weight, so that the first answer need not wait for the disk
    library.llama_set_warmup(context.pointer, False)
    chosen = options.threads or cores
    key = f"threads/{cores}/{model.bytes.bit_length()}"  # models of about one size have one optimum
    if options.threads is not None or cores == 1:
        return Threads(threads=chosen, text=f"Decoding with {chosen} threads.")
    if 1 <= known.get(key, 0) <= cores:
        library.llama_set_n_threads(context.pointer, known[key], batch_threads)
        return Threads(threads=known[key], text=f"Decoding with {known[key]} threads, as measured before.")
    times = _measure(library, context, token, _candidates(cores), batch_threads)
    calibration: dict[str, int] = {}
    if len(times) > 1:
        best = min(times, key=lambda threads: times[threads])
        if times[best] < _WORTH * times[cores]:
            chosen = best
        calibration[key] = chosen
    library.llama_set_n_threads(context.pointer, chosen, batch_threads)
    text = ", ".join(f"{threads} threads {1000 * seconds:.1f} ms a token" for threads, seconds in times.items())
    return Threads(threads=chosen, text=f"Measured: {text}; decoding with {chosen}.", calibration=calibration)


def _candidates(cores: int) -> list[int]:
    found = [cores]
    while found[-1] > 1 and len(found) < 4:
        found.append(found[-1] // 2)
    return found


def _measure(
    library: Any, context: LlamaContext, token: int, candidates: list[int], batch_threads: int
) -> dict[int, float]:
    """Median seconds of a decode by number of threads, as many as the budget allows, the first one always."""
    ends = time.monotonic() + BUDGET
    times: dict[int, float] = {}
    for threads in candidates:
        library.llama_set_n_threads(context.pointer, threads, batch_threads)
        samples: list[float] = []
        while len(samples) < _TIMED and len(context.tokens) < context.size - 1:
            started = time.perf_counter()
            if not context.step(token):
                return times
            samples.append(time.perf_counter() - started)
            if time.monotonic() + samples[-1] > ends:
                break
        if len(samples) < 2 and times:
            return times  # too slow to say anything about it
        # The first decode with a new number of threads starts them: it says nothing.
        times[threads] = statistics.median(samples[1:] or samples)
        if time.monotonic() + 2 * times[threads] > ends:
            break
    return times
