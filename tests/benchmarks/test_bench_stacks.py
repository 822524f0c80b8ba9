"""Stacks: a change of weights over 32 layers, four stacks in one batch against switching, one adapter live in llama.cpp.

Ratios of one run, by turns in one process; of batches by processor time, which for one thread is the time on an idle machine. Other programs slow single rounds down and never speed them up: the best third of
each tells the cost.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.bench
ROOT = Path(__file__).resolve().parents[2]

START = r"""
import json, statistics, sys, tempfile, time
from pathlib import Path
import torch
from app.adapters.live_torch import LiveStack
from app.adapters.tensors_torch import open_adapter
from tests.engine.adapter_kit import random_adapter, random_model

torch.set_num_threads(1)
folder = Path(tempfile.mkdtemp())
SIZES = dict(num_hidden_layers=8, hidden_size=512, intermediate_size=1408, num_attention_heads=8, num_key_value_heads=8,
             vocab_size=8192, head_dim=64, max_position_embeddings=512)
"""

REWEIGHT = (
    START
    + r"""
SIZES.update(num_hidden_layers=32, hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=4)
model = random_model("llama", 0, **SIZES)
live = LiveStack(model)
for key, kind in (("lora", {"r": 16}), ("dora", {"r": 8, "use_dora": True})):
    live.add(key, open_adapter(random_adapter(folder / key, "llama", model, 1, **kind)))
times = []
for i in range(60):
    started = time.perf_counter()
    live.apply({"lora": 0.1 + 0.01 * i, "dora": 1 - 0.01 * i})
    times.append(time.perf_counter() - started)
print(json.dumps({"seconds": times}))
"""
)

BATCH = (
    START
    + r"""
from app.generation.hf_batch import Rows
from app.generation.hf_decode import Decoder

model = random_model("llama", 0, **SIZES)
kinds = [{"r": 16}, {"r": 8, "use_dora": True}, {"r": 32, "use_rslora": True}]
live, decoder = LiveStack(model), Decoder(model, torch.device("cpu"))
for i, kind in enumerate(kinds):
    live.add(str(i), open_adapter(random_adapter(folder / str(i), "llama", model, i, **kind)))
stacks = [{}, {"0": 1.0}, {"1": 1.0}, {"0": 0.5, "2": 0.7}]
prompt = [5 + i % 90 for i in range(40)]
COUNT = 80

def one_after_the_other():
    texts = []
    for stack in stacks:
        live.apply(stack)
        decoder.reset()
        decoder.begin(prompt)
        logits = decoder.read(prompt, lambda *_: None, lambda: False)
        text = []
        for _ in range(COUNT):
            text.append(int(logits.argmax()))
            logits = decoder.step(text[-1])
        texts.append(text)
    return texts

def together():
    live.apply_rows(stacks)
    rows = Rows(decoder, [prompt] * len(stacks))
    logits = rows.read(lambda *_: None, lambda: False)
    texts = [[] for _ in stacks]
    for _ in range(COUNT):
        tokens = logits.argmax(-1).tolist()
        for text, token in zip(texts, tokens):
            text.append(token)
        logits = rows.step(tokens)
    return texts

assert one_after_the_other() == together(), "they must say the same"
found = {"turns": [], "batch": []}
for _ in range(4):
    for name, run in (("turns", one_after_the_other), ("batch", together)):
        started = time.process_time()
        run()
        found[name].append(len(stacks) * COUNT / (time.process_time() - started))
print(json.dumps(found))
"""
)

LLAMA = (
    START
    + r"""
import os
import llama_cpp
os.environ["WEFT_CACHE"] = str(folder / "cache")
from app.adapters.llama_stack import LlamaStack
from app.core.stack import AdapterStack, StackedAdapter
from app.generation.llama_context import LlamaContext
from app.generation.llama_log import library_log
from tests.engine import gguf_kit

SIZES.update(num_hidden_layers=10)
model = random_model("llama", 0, **SIZES)
parameters = sum(p.numel() for p in model.parameters())
path = gguf_kit.write(model, "llama", folder / "model.gguf")
paths = {f"r{r}": random_adapter(folder / f"r{r}", "llama", model, r, r=r) for r in (8, 16)}
del model
log = library_log(llama_cpp)
llama_cpp.llama_backend_init()
pointer = llama_cpp.llama_model_load_from_file(os.fsencode(path), llama_cpp.llama_model_default_params())
options = llama_cpp.llama_context_default_params()
options.n_ctx, options.n_threads, options.n_threads_batch = 512, 1, 1
context = LlamaContext(llama_cpp, llama_cpp.llama_init_from_model(pointer, options), chunk=64, rows=64)
stack = LlamaStack(llama_cpp, pointer, context.pointer, path, log.reason)

def decode(count):
    context.clear()
    context.read([5, 6, 7])
    started = time.perf_counter()
    for i in range(count):
        context.step(5 + i)
    return count / (time.perf_counter() - started)

found = {"parameters": parameters, "base": [], "r8": [], "r16": []}
for _ in range(21):
    for name in ("base", "r8", "r16"):
        adapters = () if name == "base" else (StackedAdapter(path=str(paths[name])),)
        stack.set(AdapterStack(adapters=adapters), lambda *_: None)
        decode(3)
        found[name].append(decode(16))
print(json.dumps(found))
"""
)


def _run(program: str, *needs: str) -> dict[str, Any]:
    python = os.environ.get("WEFT_PYTHON_CORE") or (sys.executable if all(map(find_spec, needs)) else "")
    if not python:
        pytest.skip(f"{', '.join(needs)} are not installed; `python3 run.py test --bench` installs them")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    ran = subprocess.run(
        [python, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    if "llama_cpp" in needs and "No module named 'llama_cpp'" in ran.stderr:
        pytest.skip("PyTorch and llama-cpp-python are not installed together, which making the model needs")
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(ran.stdout.splitlines()[-1])


def _best(values: list[float]) -> float:
    return statistics.median(sorted(values, reverse=True)[: max(1, len(values) // 3)])


def test_a_change_of_weights_over_32_layers_takes_5_ms_at_most() -> None:
    seconds = _run(REWEIGHT, "torch", "peft")["seconds"]
    median = statistics.median(seconds)
    print(
        f"reweight: {1000 * median:.2f} ms over 32 layers, one LoRA and one DoRA on 224 modules (best {1000 * min(seconds):.2f})"
    )
    assert median <= 0.005


def test_four_stacks_in_one_batch_against_switching() -> None:
    found = _run(BATCH, "torch", "peft")
    batch, turns = _best(found["batch"]), _best(found["turns"])
    print(
        f"4 stacks, a prompt of 40 tokens and answers of 80: {batch:.0f} tokens/s in one batch, {turns:.0f} one after the other, ratio {batch / turns:.2f}"
    )
    assert batch / turns >= 2.5


def test_one_adapter_live_in_llama_cpp() -> None:
    found = _run(LLAMA, "torch", "peft", "llama_cpp")
    best = {name: _best(found[name]) for name in ("base", "r8", "r16")}
    for name in ("r8", "r16"):
        print(
            f"llama.cpp, {found['parameters'] / 1e6:.0f} M parameters, {name}: {best[name]:.0f} tokens/s, "
            f"base {best['base']:.0f}, ratio {best[name] / best['base']:.2f}"
        )
    assert min(best["r8"], best["r16"]) / best["base"] >= 0.9
