"""Health of adapters by numbers, held to plain numpy on whole products."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from app.adapters.health import ModuleHealth, measure
from app.core.adapter_file import read_adapter_file


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
