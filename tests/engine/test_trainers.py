"""Adapters as each program leaves them on disk: brought into the library, used live, with the logits of a plain merge.

The reference adds s·B·A to the weights of a copy in float64 by hand; it shares no code with the program.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file

from app.adapters.hf_stack import ModelStack
from app.core.adapter_import import ImportOptions, Outcome, import_adapters
from app.core.stack import AdapterStack, StackedAdapter
from tests.engine.adapter_kit import close, logits, random_model, tokens

SHAPES = {"self_attn.q_proj": (32, 32), "self_attn.v_proj": (16, 32), "mlp.up_proj": (48, 32)}
PEFT_CONFIG: dict[str, Any] = {
    "alpha_pattern": {}, "auto_mapping": None, "base_model_name_or_path": "meta-llama/Llama-3.2-1B", "bias": "none", "fan_in_fan_out": False,
    "inference_mode": True, "init_lora_weights": True, "layer_replication": None, "layers_pattern": None, "layers_to_transform": None,
    "loftq_config": {}, "lora_alpha": 12, "lora_bias": False, "lora_dropout": 0.05, "megatron_config": None, "megatron_core": "megatron.core",
    "modules_to_save": None, "peft_type": "LORA", "r": 4, "rank_pattern": {}, "revision": None,
    "target_modules": ["q_proj", "v_proj", "up_proj"], "task_type": "CAUSAL_LM", "trainable_token_indices": None, "use_dora": False, "use_rslora": False,
}  # fmt: skip
Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]


class Trained(NamedTuple):
    """What to drop on the window, the scale that it means, how it is called afterwards, and magnitudes of DoRA."""

    give: Path
    scale: float
    name: str
    alpha: float | None = None
    magnitudes: dict[str, torch.Tensor] = {}


def random_pairs(dtype: torch.dtype = torch.float32) -> Pairs:
    return {
        f"model.layers.{layer}.{name}": (
            (torch.randn(4, inputs) * 0.2).to(dtype).float(),
            (torch.randn(out, 4) * 0.2).to(dtype).float(),
        )
        for layer in range(2)
        for name, (out, inputs) in SHAPES.items()
    }


def named(
    pairs: Pairs, prefix: str, sides: tuple[str, str] = ("lora_A.weight", "lora_B.weight")
) -> dict[str, torch.Tensor]:
    return {
        f"{prefix}{name}.{side}": tensor.clone().contiguous()
        for name, pair in pairs.items()
        for side, tensor in zip(sides, pair, strict=True)
    }


def config(folder: Path, **changes: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**PEFT_CONFIG, **changes}, indent=2))


def peft(folder: Path, pairs: Pairs, model: Any) -> Trained:
    config(folder / "my-peft")
    save_file(named(pairs, "base_model.model."), folder / "my-peft" / "adapter_model.safetensors", {"format": "pt"})
    (folder / "my-peft" / "README.md").write_text("---\nlibrary_name: peft\n---\n")
    return Trained(folder / "my-peft", 3.0, "my-peft")


def ludwig(folder: Path, pairs: Pairs, model: Any) -> Trained:
    """results/experiment_run/model: hyperparameters and metadata beside a folder model_weights."""
    top = folder / "api_experiment_run" / "model"
    config(top / "model_weights", lora_alpha=8)
    save_file(named(pairs, "base_model.model."), top / "model_weights" / "adapter_model.safetensors", {"format": "pt"})
    for name in ("model_hyperparameters.json", "training_set_metadata.json", "training_progress.json"):
        (top / name).write_text("{}")
    return Trained(folder / "api_experiment_run", 2.0, "api_experiment_run")


def unsloth(folder: Path, pairs: Pairs, model: Any) -> Trained:
    """bfloat16, a regular expression for targets, a base that is quantized, tokenizer files."""
    place = folder / "lora_model"
    config(
        place,
        base_model_name_or_path="unsloth/llama-3.2-1b-bnb-4bit",
        target_modules="(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|v_proj|up_proj).*?)|(?:\\bmodel\\.layers\\.[\\d]{1,}\\.self_attn)",
        unsloth_fixed=True,
        lora_alpha=16,
        auto_mapping={"base_model_class": "LlamaForCausalLM", "parent_library": "transformers", "unsloth_fixed": True},
    )
    tensors = {name: tensor.bfloat16() for name, tensor in named(pairs, "base_model.model.").items()}
    save_file(tensors, place / "adapter_model.safetensors", {"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (place / name).write_text("{}")
    return Trained(place, 4.0, "lora_model")


def axolotl(folder: Path, pairs: Pairs, model: Any) -> Trained:
    """A pickled file of a sharded run, with what compiling and sharding leave in names, and checkpoints below."""
    place = folder / "outputs" / "qlora-out"
    config(place, lora_alpha=32, use_rslora=True)
    wrapped = {
        name.replace("model.layers", "model._fsdp_wrapped_module.layers").replace(
            "self_attn", "_orig_mod.self_attn"
        ): tensor
        for name, tensor in named(pairs, "base_model.model.").items()
    }
    torch.save(wrapped, place / "adapter_model.bin")
    config(place / "checkpoint-20", lora_alpha=1)
    torch.save(wrapped, place / "checkpoint-20" / "adapter_model.bin")
    torch.save({"state": {}}, place / "checkpoint-20" / "optimizer.pt")
    return Trained(place, 16.0, "qlora-out")


def llama_factory(folder: Path, pairs: Pairs, model: Any) -> Trained:
    place = folder / "saves" / "Llama-3.2-1B" / "lora" / "train_2025-01-01-10-00-00"
    config(place, lora_alpha=6, modules_to_save=None, eva_config=None, exclude_modules=None, use_qalora=False)
    save_file(named(pairs, "base_model.model."), place / "adapter_model.safetensors", {"format": "pt"})
    for name in ("all_results.json", "trainer_state.json", "train_results.json"):
        (place / name).write_text("{}")
    torch.save({"lr": 1}, place / "training_args.bin")
    (place / "trainer_log.jsonl").write_text("{}\n")
    return Trained(place, 1.5, "train_2025-01-01-10-00-00")


def mlx(folder: Path, pairs: Pairs, model: Any) -> Trained:
    """lora_a (in, rank), lora_b (rank, out), the whole scale in the config, checkpoints beside."""
    place = folder / "mlx-run" / "adapters"
    place.mkdir(parents=True)
    turned = {name: (a.T, b.T) for name, (a, b) in pairs.items()}
    save_file(named(turned, "", ("lora_a", "lora_b")), place / "adapters.safetensors", {"format": "mlx"})
    save_file(named(turned, "", ("lora_a", "lora_b")), place / "0000100_adapters.safetensors", {"format": "mlx"})
    parameters = {
        "adapter_path": "adapters", "batch_size": 4, "fine_tune_type": "lora", "iters": 1000, "learning_rate": 1e-05,
        "lora_parameters": {"rank": 4, "dropout": 0.0, "scale": 2.5}, "model": "mlx-community/Llama-3.2-1B-4bit", "num_layers": 2, "seed": 0,
    }  # fmt: skip
    (place / "adapter_config.json").write_text(json.dumps(parameters))
    return Trained(place, 2.5, "mlx-run")


def mlx_dora(folder: Path, pairs: Pairs, model: Any) -> Trained:
    place = folder / "dora run"
    place.mkdir(parents=True)
    turned = {name: (a.T, b.T) for name, (a, b) in pairs.items()}
    magnitudes = {
        name: model.get_submodule(name).weight.detach().norm(dim=1) * (1 + 0.1 * torch.randn(pairs[name][1].shape[0]))
        for name in pairs
    }
    tensors = named(turned, "", ("lora_a", "lora_b")) | {f"{name}.m": m for name, m in magnitudes.items()}
    save_file(tensors, place / "adapters.safetensors", {"format": "mlx"})
    (place / "adapter_config.json").write_text(
        json.dumps({"fine_tune_type": "dora", "lora_parameters": {"rank": 4, "scale": 1.25}, "num_layers": -1})
    )
    return Trained(place, 1.25, "dora run", magnitudes=magnitudes)


def llama_cpp(folder: Path, pairs: Pairs, model: Any) -> Trained:
    """As convert_lora_to_gguf.py writes it, with llama's query rows in llama.cpp's order (its own formula)."""
    import gguf

    names = {"self_attn.q_proj": "attn_q", "self_attn.v_proj": "attn_v", "mlp.up_proj": "ffn_up"}
    path = folder / "finetune-f16.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 10.0)
    for name, (a, b) in pairs.items():
        layer, _, tail = name.removeprefix("model.layers.").partition(".")
        if tail == "self_attn.q_proj":
            b = b.reshape(4, 2, 4, 4).swapaxes(1, 2).reshape(b.shape)
        writer.add_tensor(f"blk.{layer}.{names[tail]}.weight.lora_a", a.half().numpy())
        writer.add_tensor(f"blk.{layer}.{names[tail]}.weight.lora_b", b.contiguous().half().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Trained(path, 2.5, "finetune-f16")


def lone_file(folder: Path, pairs: Pairs, model: Any) -> Trained:
    """Nothing but tensors, with an adapter's name inside; alpha comes from a person."""
    path = folder / "character v2.safetensors"
    save_file(named(pairs, "base_model.model.", ("lora_A.default.weight", "lora_B.default.weight")), path)
    return Trained(path, 5.0, "character v2", alpha=20.0)


def lone_pickle(folder: Path, pairs: Pairs, model: Any) -> Trained:
    path = folder / "old.pt"
    torch.save({name: torch.nn.Parameter(t) for name, t in named(pairs, "").items()}, path)
    return Trained(path, 2.0, "old", alpha=8.0)


def up_and_down(folder: Path, pairs: Pairs, model: Any) -> Trained:
    """lora_up, lora_down and an alpha beside them, as scripts for LyCORIS and kohya name them."""
    path = folder / "updown.safetensors"
    tensors = named(pairs, "", ("lora_down.weight", "lora_up.weight"))
    save_file(tensors | {f"{name}.alpha": torch.tensor(14.0).half() for name in pairs}, path)
    return Trained(path, 3.5, "updown")


def zipped(folder: Path, pairs: Pairs, model: Any) -> Trained:
    import shutil

    trained = peft(folder / "inner", pairs, model)
    return Trained(Path(shutil.make_archive(str(folder / "gift"), "zip", trained.give.parent)), 3.0, "my-peft")


PROGRAMS: list[Callable[[Path, Pairs, Any], Trained]] = [
    peft, ludwig, unsloth, axolotl, llama_factory, mlx, mlx_dora, llama_cpp, lone_file, lone_pickle, up_and_down, zipped,
]  # fmt: skip


def reference(model: Any, pairs: Pairs, trained: Trained, weight: float) -> Any:
    merged = copy.deepcopy(model).double()
    with torch.no_grad():
        for name, (a, b) in pairs.items():
            base = merged.get_submodule(name).weight
            after = base + trained.scale * b.double() @ a.double()
            if name in trained.magnitudes:
                after *= (trained.magnitudes[name].double() / after.norm(dim=1))[:, None]
            base += weight * (after - base)
    return merged


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_what_each_program_leaves_is_brought_in_and_used_live(tmp_path: Path, program: Any, seed: int) -> None:
    model = random_model("llama", seed)
    torch.manual_seed(seed + 1)
    pairs = random_pairs({"unsloth": torch.bfloat16, "llama_cpp": torch.float16}.get(program.__name__, torch.float32))
    (tmp_path / "given").mkdir()
    trained = program(tmp_path / "given", pairs, model)
    options = ImportOptions(folder=str(tmp_path / "loras"))
    (result,) = import_adapters([trained.give], options)
    if trained.alpha is not None:
        assert result.outcome is Outcome.NEEDS_ALPHA and result.rank == 4
        again = ImportOptions(folder=str(tmp_path / "loras"), alphas={result.source: trained.alpha})
        (result,) = import_adapters([trained.give], again)
    assert result.outcome is Outcome.ADDED, result.error
    entry = result.entry
    assert entry is not None and not entry.problem and not entry.needs_alpha
    assert entry.name == trained.name and entry.rank == 4
    assert sorted(t.removeprefix("blk.0.") for t in entry.targets) in (
        ["q_proj", "up_proj", "v_proj"],
        ["attn_q", "attn_v", "ffn_up"],
    )
    assert entry.kind == ("DoRA" if trained.magnitudes else "rsLoRA" if program is axolotl else "LoRA")
    ids = tokens(seed)
    live = ModelStack(model)
    for weight in (1.0, -0.6):
        stack = AdapterStack(adapters=(StackedAdapter(path=entry.path, weight=weight),))
        assert live.set(stack, lambda *_: None) == (True, [])
        assert close(logits(model, ids), reference(random_model("llama", seed), pairs, trained, weight), ids)


def test_mlx_s_embeddings_and_heads_have_their_places(tmp_path: Path, seed: int) -> None:
    model = random_model("llama", seed, tie_word_embeddings=False)
    torch.manual_seed(seed)
    pairs = {"model.embed_tokens": (torch.randn(96, 3) * 0.2, torch.randn(3, 32) * 0.2), "lm_head": (torch.randn(32, 3) * 0.2, torch.randn(3, 96) * 0.2)}  # fmt: skip
    save_file(named(pairs, "", ("lora_a", "lora_b")), tmp_path / "adapters.safetensors")
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"fine_tune_type": "lora", "lora_parameters": {"rank": 3, "scale": 2.0}})
    )
    expected = copy.deepcopy(model).double()
    with torch.no_grad():
        a, b = pairs["model.embed_tokens"]
        expected.model.embed_tokens.weight += 2.0 * a @ b
        a, b = pairs["lm_head"]
        expected.lm_head.weight += 2.0 * (a @ b).T
    live = ModelStack(model)
    live.set(AdapterStack(adapters=(StackedAdapter(path=str(tmp_path)),)), lambda *_: None)
    ids = tokens(seed)
    assert close(logits(model, ids), expected, ids)


@pytest.mark.parametrize("flat", [False, True])
def test_mlx_s_experts_are_taken_apart(tmp_path: Path, flat: bool, seed: int) -> None:
    """lora_a (experts, rank, in), in older versions (experts·rank, in); lora_b (experts, out, rank)."""
    model = random_model("mixtral", seed)
    torch.manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    expected = copy.deepcopy(model).double()
    expected.config._experts_implementation = "eager"
    for layer in range(2):
        for name, out, inputs, rows in (("gate_proj", 48, 32, slice(0, 48)), ("up_proj", 48, 32, slice(48, 96)), ("down_proj", 32, 48, slice(0, 32))):  # fmt: skip
            a, b = torch.randn(3, 2, inputs) * 0.3, torch.randn(3, out, 2) * 0.3
            start = f"model.layers.{layer}.block_sparse_moe.switch_mlp.{name}"
            tensors[f"{start}.lora_a"], tensors[f"{start}.lora_b"] = a.reshape(6, inputs) if flat else a, b
            experts = expected.model.layers[layer].mlp.experts
            whole = experts.down_proj if name == "down_proj" else experts.gate_up_proj
            with torch.no_grad():
                whole[:, rows] += 0.5 * 3.0 * b.double() @ a.double()
    save_file(tensors, tmp_path / "adapters.safetensors")
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 3.0}})
    )
    live = ModelStack(model)
    live.set(AdapterStack(adapters=(StackedAdapter(path=str(tmp_path), weight=0.5),)), lambda *_: None)
    ids = tokens(seed)
    assert close(logits(model, ids), expected, ids)


def test_mlx_s_embedding_stays_tied_to_the_head(tmp_path: Path, seed: int) -> None:
    model = random_model("llama", seed, tie_word_embeddings=True)
    torch.manual_seed(seed)
    a, b = torch.randn(96, 3) * 0.2, torch.randn(3, 32) * 0.2
    save_file({"model.embed_tokens.lora_a": a, "model.embed_tokens.lora_b": b}, tmp_path / "adapters.safetensors")
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"fine_tune_type": "lora", "lora_parameters": {"rank": 3, "scale": 2.0}})
    )
    expected = copy.deepcopy(model).double()
    with torch.no_grad():
        expected.model.embed_tokens.weight += 2.0 * a @ b  # the head is the same matrix
    live = ModelStack(model)
    live.set(AdapterStack(adapters=(StackedAdapter(path=str(tmp_path)),)), lambda *_: None)
    ids = tokens(seed)
    assert close(logits(model, ids), expected, ids)
