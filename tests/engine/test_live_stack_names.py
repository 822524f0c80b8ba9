"""Live stacks of adapters whose names are not the model's: fused matrices, single experts, other programs; 16-bit models; tying."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from app.adapters.live_torch import LiveStack
from app.adapters.tensors_torch import open_adapter
from app.core.errors import WeftError
from tests.engine.adapter_kit import logits, merged, random_adapter, random_model, rms, tokens


def write(
    folder: Path,
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]],
    sides: tuple[str, str] = ("lora_A.weight", "lora_B.weight"),
    **config: Any,
) -> Path:
    folder.mkdir()
    prefix = "" if "lora_parameters" in config else "base_model.model."
    tensors = {
        f"{prefix}{name}.{side}": t.contiguous()
        for name, pair in pairs.items()
        for side, t in zip(sides, pair, strict=True)
    }
    file = "adapters.safetensors" if "lora_parameters" in config else "adapter_model.safetensors"
    save_file(tensors, folder / file)
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 6, **config} if prefix else config)
    )
    return folder


def live_logits(model: Any, folder: Path, weight: float, ids: torch.Tensor) -> torch.Tensor:
    stack = LiveStack(model)
    assert stack.add("it", open_adapter(folder)) == []
    stack.apply({"it": weight})
    found = logits(model, ids)
    stack.close()
    return found


def pair(rank: int, out: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rank, inputs) * 0.2, torch.randn(out, rank) * 0.2


def test_parts_of_a_fused_matrix_go_into_their_rows(tmp_path: Path, seed: int) -> None:
    model = random_model("phi3", seed)
    ids = tokens(seed)
    start = "model.layers.1"
    rows = {"self_attn.q_proj": (0, 32), "self_attn.k_proj": (32, 48), "self_attn.v_proj": (48, 64)}
    pairs = {f"{start}.{name}": pair(3, last - first, 32) for name, (first, last) in rows.items()}
    pairs[f"{start}.mlp.gate_proj"], pairs[f"{start}.mlp.up_proj"] = pair(3, 48, 32), pair(3, 48, 32)
    folder = write(tmp_path / "apart", pairs)
    expected = copy.deepcopy(model).double()
    layer = expected.model.layers[1]
    with torch.no_grad():
        for name, (first, last) in rows.items():
            a, b = pairs[f"{start}.{name}"]
            layer.self_attn.qkv_proj.weight[first:last] += 0.7 * 2 * (b @ a)
        for name, first in (("gate_proj", 0), ("up_proj", 48)):
            a, b = pairs[f"{start}.mlp.{name}"]
            layer.mlp.gate_up_proj.weight[first : first + 48] += 0.7 * 2 * (b @ a)
    assert (live_logits(model, folder, 0.7, ids) - logits(expected, ids)).abs().max() < 1e-4


def test_adapters_of_single_experts_go_into_the_parameter_of_all(tmp_path: Path, seed: int) -> None:
    model = random_model("mixtral", seed)
    ids = tokens(seed)
    start = "model.layers.0.block_sparse_moe.experts.2"
    pairs = {f"{start}.w1": pair(3, 48, 32), f"{start}.w3": pair(3, 48, 32), f"{start}.w2": pair(3, 32, 48)}
    folder = write(tmp_path / "old", pairs)
    expected = copy.deepcopy(model).double()
    expected.config._experts_implementation = "eager"
    experts = expected.model.layers[0].mlp.experts
    with torch.no_grad():
        for name, place in (
            ("w1", experts.gate_up_proj[2, :48]),
            ("w3", experts.gate_up_proj[2, 48:]),
            ("w2", experts.down_proj[2]),
        ):
            a, b = pairs[f"{start}.{name}"]
            place += -0.5 * 2 * (b @ a)
    assert (live_logits(model, folder, -0.5, ids) - logits(expected, ids)).abs().max() < 1e-4


def test_mlx_keeps_both_matrices_transposed_and_gives_the_whole_scale(tmp_path: Path, seed: int) -> None:
    model = random_model("llama", seed)
    ids = tokens(seed)
    a, b = pair(3, 48, 32)
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": 3, "scale": 1.5}}
    folder = write(tmp_path / "mlx", {"model.layers.0.mlp.up_proj": (a.T, b.T)}, ("lora_a", "lora_b"), **config)
    expected = copy.deepcopy(model).double()
    with torch.no_grad():
        expected.model.layers[0].mlp.up_proj.weight += 1.5 * (b @ a)
    assert (live_logits(model, folder, 1.0, ids) - logits(expected, ids)).abs().max() < 1e-4


@pytest.mark.parametrize("kind", [{"target_modules": ["embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}])
def test_embeddings_that_are_to_stay_tied_do(tmp_path: Path, kind: dict[str, Any], seed: int) -> None:
    import peft

    model = random_model("llama", seed, tie_word_embeddings=True)
    ids = tokens(seed)
    folder = random_adapter(tmp_path / "tied", "llama", model, seed, ensure_weight_tying=True, **kind)
    stack = LiveStack(model)
    stack.add("it", open_adapter(folder))
    stack.apply({"it": 1.0})
    ours = logits(model, ids)
    stack.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = logits(peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval(), ids)
    assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2", "bloom"])
def test_sixteen_bit_models_are_no_further_from_the_merge_than_from_themselves(
    tmp_path: Path, family: str, dtype: torch.dtype, seed: int
) -> None:
    model = random_model(family, seed).to(dtype)
    ids = tokens(seed)
    kinds: list[dict[str, Any]] = [{"r": 4}, {"r": 3, "use_dora": True}, {"r": 2, "modules_to_save": ["lm_head"]}]
    plain = copy.deepcopy(model).float()
    folders = [random_adapter(tmp_path / str(i), family, plain, seed + i, **kind) for i, kind in enumerate(kinds)]
    pairs = [(folder, 0.6) for folder in folders]
    stack = LiveStack(model)
    for folder in folders:
        stack.add(str(folder), open_adapter(folder))
    stack.apply({str(folder): 0.6 for folder in folders})
    ours = rms(logits(model, ids).double() - logits(merged(plain, pairs), ids))
    stack.close()
    rounded = merged(plain, pairs).to(dtype)
    rounding = rms(logits(rounded, ids).double() - logits(merged(plain, pairs), ids))
    print(f"{family} {dtype}: live {ours:.4f}, merged in 16 bits {rounding:.4f}")
    assert ours < 3 * rounding


@pytest.mark.parametrize("init", ["pissa", "olora", "gaussian", "orthogonal"])
def test_adapters_that_changed_their_base_are_refused_and_all_others_are_peft_s(
    tmp_path: Path, init: str, seed: int
) -> None:
    """PEFT takes the initial B·A of PiSSA and OLoRA out of the base when it loads; a live stack has the base as it is."""
    import peft

    model = random_model("llama", seed)
    ids = tokens(seed)
    folder = random_adapter(tmp_path / init, "llama", model, seed, init_lora_weights=init)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = logits(peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval(), ids)
    off = (theirs - logits(merged(model, [(folder, 1.0)]), ids)).abs().max()
    print(f"{init}: PEFT against W + s·B·A {off:.2g}")
    if off > 1e-3:
        with pytest.raises(WeftError, match=init):
            open_adapter(folder)
    else:
        assert (live_logits(model, folder, 1.0, ids) - theirs).abs().max() < 1e-4
    assert (off > 1e-3) == (init in ("pissa", "olora"))
