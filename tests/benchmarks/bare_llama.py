"""llama.cpp driven as plainly as can be, in a process of its own: the reference of the benchmarks.

`python -m tests.benchmarks.bare_llama make FILE` writes a random model of 43 M parameters. `… serve FILE THREADS CONTEXT`
answers lines of JSON: ["prompt", TEXT] reads a text from nothing, gives the seconds to the first token;
["continue", N] generates N more tokens, gives the seconds from the first of them to the last, and of processor time in all.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any


def make(path: Path) -> None:
    """Write the model: 43 M parameters, q8_0, whose greedy answers do not end."""
    from tests.engine import tiny_gguf

    shape = {"layers": 8, "hidden": 512, "intermediate": 1536, "heads": 8, "kv_heads": 8, "vocab": 16_000}
    entry = tiny_gguf.write(path, **shape, context=4096, kind="Q8_0")
    assert entry.parameters >= 40_000_000


def serve(path: str, threads: int, context: int) -> None:
    """Answer until stdin ends."""
    import llama_cpp as library

    from app.generation.llama_log import library_log
    from tests.engine.llama_helpers import Bare

    library_log(library)
    with Bare(path, context, threads, n_batch=512, n_ubatch=512) as bare:
        sampler = library.llama_sampler_chain_init(library.llama_sampler_chain_default_params())
        library.llama_sampler_chain_add(sampler, library.llama_sampler_init_greedy())
        token = 0
        print(json.dumps("ready"), flush=True)
        for line in sys.stdin:
            what, argument = json.loads(line)
            if what == "prompt":
                tokens = bare.tokenize(argument)
                started = time.perf_counter()
                library.llama_memory_clear(library.llama_get_memory(bare.context), True)
                for at in range(0, len(tokens), 512):
                    bare.decode(tokens[at : at + 512])
                token = library.llama_sampler_sample(sampler, bare.context, -1)
                print(json.dumps([time.perf_counter() - started, len(tokens)]), flush=True)
            else:
                begun = time.process_time()
                seconds, token = run(library, bare, sampler, token, argument)
                print(json.dumps([seconds, time.process_time() - begun]), flush=True)


def run(library: Any, bare: Any, sampler: Any, token: int, count: int) -> tuple[float, int]:
    """Generate `count` tokens after `token`; seconds from the first of them to the last, and the last."""
    decode, sample, context = library.llama_decode, library.llama_sampler_sample, bare.context
    one = (ctypes.c_int32 * 1)(token)
    batch = library.llama_batch_get_one(one, 1)
    decode(context, batch)
    one[0] = sample(sampler, context, -1)
    started = time.perf_counter()
    for _ in range(count - 1):
        decode(context, batch)
        one[0] = sample(sampler, context, -1)
    return time.perf_counter() - started, one[0]


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
    else:
        serve(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
