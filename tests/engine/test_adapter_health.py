"""Health of adapters by numbers, held to plain numpy on whole products."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import msgspec
import numpy as np
import pytest
from safetensors.numpy import save_file

from app.adapters.gguf_writer import write_gguf
from app.adapters.health import ModuleHealth, measure
from app.core.adapter_file import read_adapter_file
from app.core.adapter_plans import HealthPlan, HealthReport
from app.core.errors import ErrorKind, WeftError
from app.tasks import adapter_health
from tests import seeds
from tests.engine.backend_kit import FakeReport


def _adapter(folder: Path, tensors: dict[str, np.ndarray]) -> dict[str, ModuleHealth]:
    folder.mkdir(exist_ok=True)
    save_file(
        {
            f"base_model.model.model.layers.{k}.weight": np.ascontiguousarray(v.astype(np.float32))
            for k, v in tensors.items()
        },
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    return {m.name.removeprefix("model.layers."): m for m in measure(read_adapter_file(folder))}


def test_norms_and_ranks_are_those_of_the_whole_product(tmp_path: Path) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for layer in range(4):
        tensors[f"{layer}.self_attn.q_proj.lora_A"], tensors[f"{layer}.self_attn.q_proj.lora_B"] = (
            rng.normal(size=(4, 24)),
            rng.normal(size=(32, 4)),
        )
    tensors["1.self_attn.q_proj.lora_B"][:, 2] = tensors["1.self_attn.q_proj.lora_B"][:, 0] * 2  # three directions
    tensors["2.self_attn.q_proj.lora_B"][:] = 0
    tensors["3.self_attn.q_proj.lora_A"] *= 100
    found = _adapter(tmp_path / "a", tensors)
    for layer in range(4):
        product = 2.0 * tensors[f"{layer}.self_attn.q_proj.lora_B"] @ tensors[f"{layer}.self_attn.q_proj.lora_A"]
        module = found[f"{layer}.self_attn.q_proj"]
        assert math.isclose(module.norm, np.linalg.norm(product), rel_tol=1e-5) or layer == 2
        assert (
            module.used == np.linalg.matrix_rank(product.astype(np.float32))
            and module.rank == 4
            and module.layer == layer
        )
    assert found["0.self_attn.q_proj"].trouble == ""
    assert found["1.self_attn.q_proj"].trouble == "Only 3 of its 4 ranks are used."
    assert "B matrix is zero" in found["2.self_attn.q_proj"].trouble and found["2.self_attn.q_proj"].norm == 0
    assert "times that of its kind" in found["3.self_attn.q_proj"].trouble


def test_values_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    a, b = np.ones((4, 8)), np.ones((8, 4))
    a[0, 0] = np.inf
    found = _adapter(tmp_path / "a", {"0.mlp.up_proj.lora_A": a, "0.mlp.up_proj.lora_B": b})
    assert "no numbers" in found["0.mlp.up_proj"].trouble


def test_the_task_gives_points_for_a_chart_and_sentences(tmp_path: Path) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for layer in range(5):
        for name, out in (("self_attn.q_proj", 32), ("mlp.up_proj", 48)):
            tensors[f"{layer}.{name}.lora_A"] = rng.normal(size=(4, 24))
            tensors[f"{layer}.{name}.lora_B"] = rng.normal(size=(out, 4))
    tensors["2.mlp.up_proj.lora_B"][:] = 0
    tensors["3.self_attn.q_proj.lora_A"][1, 1] = np.nan
    tensors["4.mlp.up_proj.lora_A"] *= 1000
    _adapter(tmp_path / "a", tensors)
    plan = HealthPlan(path=str(tmp_path / "a"))
    found = msgspec.json.decode(msgspec.json.encode(adapter_health.run(plan, FakeReport())), type=HealthReport)
    assert len(found.modules) == 10 and {m.tail for m in found.modules} == {"self_attn.q_proj", "mlp.up_proj"}
    kinds = {m.module: m.kind for m in found.modules if m.kind}
    assert kinds == {
        "model.layers.2.mlp.up_proj": "zero",
        "model.layers.3.self_attn.q_proj": "broken",
        "model.layers.4.mlp.up_proj": "odd",
    }
    for point in found.modules:
        a, b = (tensors[f"{point.layer}.{point.tail}.lora_{side}"] for side in "AB")
        if point.kind == "broken":
            assert point.norm is None
        else:
            assert point.norm is not None and math.isclose(point.norm, 2 * np.linalg.norm(b @ a), rel_tol=1e-5)
    assert len(found.sentences) == 3 and all("1 of 10 modules" in s for s in found.sentences)
    with pytest.raises(WeftError) as ended:
        adapter_health.run(plan, FakeReport(lambda _: True))
    assert ended.value.kind is ErrorKind.CANCELLED


def test_an_embedding_of_a_gguf_adapter_has_the_norm_of_its_original(tmp_path: Path) -> None:
    rng = np.random.default_rng(seeds.fresh())
    a, b = rng.normal(size=(3, 40)).astype(np.float32), rng.normal(size=(16, 3)).astype(np.float32)
    write_gguf(
        tmp_path / "x.gguf",
        {
            "general.type": "adapter",
            "general.architecture": "llama",
            "adapter.type": "lora",
            "adapter.lora.alpha": 6.0,
        },
        {"token_embd.weight.lora_a": np.ascontiguousarray(a.T), "token_embd.weight.lora_b": b},
    )
    (found,) = measure(read_adapter_file(tmp_path / "x.gguf"))
    assert math.isclose(found.norm, 2 * np.linalg.norm(b @ a), rel_tol=1e-5) and (found.rank, found.used) == (3, 3)
