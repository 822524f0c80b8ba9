"""A stack written into the weights: logits as live, the base back to the bit, whatever ends it."""

# ruff: noqa: E402 (imports that need torch come after the check that it is there)

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed in this interpreter")
transformers = pytest.importorskip("transformers", reason="transformers is not installed in this interpreter")

from app.adapters import hf_stack
from app.adapters.live_torch import LiveStack
from app.adapters.tensors_torch import open_adapter
from app.backends.transformers import Backend
from app.core.errors import WeftError
from app.core.sampling import Sampling
from app.engine.protocol import BatchRow, GenerateBatch, Load
from tests.engine import tiny_models
from tests.engine.adapter_kit import FAMILIES, close, logits, merged, random_adapter, random_model, tokens
from tests.engine.backend_kit import FakeReport, ask, ask_surely, loaded
from tests.engine.test_batches_transformers import RowReport, stack
from tests.engine.test_live_stack import make

TOLERANCE = 1e-4


def bits(model: Any) -> dict[str, tuple[int, torch.Tensor]]:
    return {name: (id(value), value.detach().clone()) for name, value in model.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_baked_logits_are_the_live_ones_and_every_bit_of_the_base_comes_back(
    tmp_path: Path, family: str, tie: bool, seed: int
) -> None:
    if tie and family == "dbrx":
        pytest.skip("DBRX has no tied embeddings")
    model, folders = make(tmp_path, family, seed, tie_word_embeddings=tie)
    ids, before, plain = tokens(seed), bits(model), copy.deepcopy(model)
    base = logits(model, ids)
    live = LiveStack(model)
    for folder in folders:
        live.add(str(folder), open_adapter(folder))
    rng = random.Random(seed)
    for size in (1, 3, 8):
        stack = [(folder, rng.uniform(-1, 1.5)) for folder in rng.sample(folders, size)]
        live.apply({str(folder): weight for folder, weight in stack})
        ours = logits(model, ids)
        took, of = live.bake()
        assert took == of and live.baked == bool(of), (family, took, of)
        assert all("forward" not in module.__dict__ for module in model.modules()), "the base's own code runs"
        baked = logits(model, ids)
        if (baked - ours).abs().max() > TOLERANCE:
            assert close(baked, merged(plain, stack), ids) and close(ours, merged(plain, stack), ids), (family, size)
        live.unbake()
        assert torch.equal(logits(model, ids), ours), "live again, to the bit"
    live.bake()
    live.apply({})
    after = bits(model)
    assert not live.baked and torch.equal(logits(model, ids), base)
    for name, (identity, value) in before.items():
        assert after[name][0] == identity and torch.equal(after[name][1], value), name
    live.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_the_weights_are_rounded_once(tmp_path: Path, dtype: torch.dtype, seed: int) -> None:
    model = random_model("llama", seed).to(dtype)
    folder = random_adapter(tmp_path / "a", "llama", model.float(), seed)
    model.to(dtype)
    live = LiveStack(model)
    live.add("a", open_adapter(folder))
    live.apply({"a": 0.7})
    name, module = next((n, m) for n, m in model.named_modules() if n.endswith("q_proj"))
    before = module.weight.detach().clone()
    part = live._sites[name].parts["a"]
    exact = before.float() + 0.7 * (part.b.float() @ part.a.float())
    live.bake()
    assert torch.equal(module.weight, exact.to(dtype))
    live.unbake()
    assert torch.equal(module.weight, before)


def test_the_switch_of_the_loader(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = tiny_models.make(tmp_path / "model", "llama", seed=seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(entry.path)
    first = random_adapter(tmp_path / "first", "llama", model, seed, r=8)
    second = random_adapter(tmp_path / "second", "llama", model, seed, r=4, use_dora=True)
    both = stack((first, 0.7), (second, 1.0))
    with loaded(Backend(), entry) as (backend, _):
        base = ask_surely(backend, "The warp")
        backend.set_adapters(both, FakeReport())
        live = ask_surely(backend, "The warp")
        report = FakeReport()
        backend.set_adapters(both, report, baked=True)
        assert backend.baked and not report.logs
        text, done = ask(backend, "The warp")
        assert live.same_as(text) and live.text != base.text
        assert done.reused_tokens > 0, "the same stack: what was read stays"
        backend.set_adapters(both, FakeReport(), baked=True)
        assert backend.baked, "twice is once"
        # A batch takes it out and puts it back.
        rows = (BatchRow(prompt="The warp"), BatchRow(prompt="The warp", adapters=both))
        rowed = RowReport()
        backend.generate_batch(GenerateBatch(rows=rows, sampling=Sampling(temperature=0, max_tokens=16)), rowed)
        assert all(said.same_as("".join(rowed.rows[n])) for n, said in enumerate((base, live)))
        assert backend.baked and live.same_as(ask(backend, "The warp")[0])
        # So does a stack that is refused.
        with pytest.raises(WeftError):
            backend.set_adapters(stack((first, 1.0), (tmp_path / "none", 1.0)), FakeReport())
        assert backend.baked and live.same_as(ask(backend, "The warp")[0])
        broken = tmp_path / "broken"
        broken.mkdir()
        (broken / "adapter_config.json").write_bytes((first / "adapter_config.json").read_bytes())
        (broken / "adapter_model.safetensors").write_bytes(b"\0" * 100)
        with pytest.raises(WeftError):
            backend.set_adapters(stack((first, 1.0), (broken, 1.0)), FakeReport())
        assert backend.baked and live.same_as(ask(backend, "The warp")[0])
        backend.set_adapters(stack(), FakeReport())
        assert not backend.baked and base.same_as(ask(backend, "The warp")[0])
        monkeypatch.setattr(hf_stack, "_free_memory", lambda: 1000)
        report = FakeReport()
        backend.set_adapters(both, report, baked=True)
        assert not backend.baked and "stay live" in report.logs[0] and live.same_as(ask(backend, "The warp")[0])
    backend, report = Backend(), FakeReport()
    monkeypatch.undo()
    backend.load(Load(model=entry, adapters=both, baked=True), report)
    assert backend.baked and live.same_as(ask(backend, "The warp")[0])
    backend.unload()
    assert not backend.baked


_MEASURE = """
import ctypes, gc, json, sys
from pathlib import Path
import psutil
from app.adapters.live_torch import LiveStack
from app.adapters.tensors_torch import open_adapter
from tests.engine.adapter_kit import random_adapter, random_model
folder, seed = Path(sys.argv[1]), int(sys.argv[2])
model = random_model("llama", seed, hidden_size=1024, intermediate_size=4096, num_hidden_layers=2, head_dim=64)
random_adapter(folder, "llama", model, seed, r=4)
live = LiveStack(model)
live.add("a", open_adapter(folder))
live.apply({"a": 1.0})
def memory():
    gc.collect()
    if sys.platform.startswith("linux"):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return psutil.Process().memory_info().rss
before = memory()
wanted = live.bake_bytes("cpu")
live.bake()
taken = memory() - before
live.unbake()
print(json.dumps({"wanted": wanted, "taken": taken, "left": memory() - before}))
"""


def test_baking_takes_the_weights_once_more_and_gives_them_back(tmp_path: Path, seed: int) -> None:
    # In a process of its own: memory that earlier tests gave back would be taken again unseen.
    root = Path(__file__).resolve().parents[2]
    ran = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path / "a"), str(seed)],
        capture_output=True, text=True, check=False, cwd=root, env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    print({name: f"{value / 1e6:.0f} MB" for name, value in found.items()})
    assert 0.9 * found["wanted"] < found["taken"] < 1.15 * found["wanted"]
    assert found["left"] < 0.1 * found["wanted"]
