"""Every initialisation, variant and optimizer trains a small model for real, and its adapter holds in plain PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from app.core.library import ModelEntry
from app.training import methods_torch, optimizers_torch, run_torch
from app.training.run_model_torch import undo_bf16_packing
from tests import seeds
from tests.engine import tiny_models, training_kit
from tests.engine.training_kit import Captured, config, forward, in_plain_peft, train

SEED = seeds.of(__name__, 10**6)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelEntry:
    print(f"seed {SEED}")
    return tiny_models.make(tmp_path_factory.mktemp("model"), "llama", seed=SEED)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training_kit.examples(tmp_path_factory.mktemp("data") / "examples.jsonl", SEED)


def some(names: Any, quick: set[str]) -> list[Any]:
    """All of them, those outside `quick` in the slow tier."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


METHODS: dict[str, dict[str, Any]] = {
    "default": {},
    "gaussian": {"init": "gaussian"},
    "off": {"init": "off"},
    "pissa": {"init": "pissa"},
    "pissa_niter": {"init": "pissa", "pissa_niter": 4},
    "corda_ipm": {"init": "corda", "calibration_samples": 12},
    "corda_kpm": {"init": "corda", "corda_mode": "kpm", "calibration_samples": 12},
    "olora": {"init": "olora"},
    "eva": {"init": "eva", "calibration_samples": 12},
    "eva_late": {"init": "eva", "calibration_samples": 12, "low_memory_init": True, "eva_rho": 1},
    "orthogonal": {"init": "orthogonal"},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "dora_dropout": {"dora": True, "dropout": 0.1, "dora_offload": True},
    "pissa_rslora": {"init": "pissa", "rslora": True},
    "pissa_dora": {"init": "pissa", "dora": True},
    "pissa_patterns": {
        "init": "pissa",
        "rank_pattern": {"q_proj": 6, "layers.1.mlp.up_proj": 2},
        "alpha_pattern": {"q_proj": 5},
    },
    "olora_patterns_rslora": {
        "init": "olora",
        "rslora": True,
        "rank_pattern": {"v_proj": 3},
        "alpha_pattern": {"o_proj": 3},
    },
    "targets": {"targets": ["q_proj", "v_proj"]},
    "regex": {"target_regex": r".*layers\.[01]\.self_attn\.(q|o)_proj"},
    "layers": {"layers": "0, 2"},
    "layers_pattern": {"layers": "1", "layers_pattern": "layers"},
    "exclude": {"exclude": ["down_proj"]},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "patterns": {"rank_pattern": {"k_proj": 8}, "alpha_pattern": {"k_proj": 2.5}},
    "embedding": {"targets": ["embed_tokens", "q_proj"]},
    "lora_bias": {"lora_bias": True},
    "replication": {"layer_replication": [[0, 2], [1, 3]]},
    "tokens": {"trainable_tokens": "5 9 <|im_end|>"},
}


@pytest.mark.parametrize("name", some(METHODS, {"default", "eva", "pissa_patterns", "dora", "replication", "tokens"}))
def test_a_method_learns_and_its_adapter_holds_in_plain_peft(
    name: str, model: ModelEntry, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.randint(5, 300, (2, 24), generator=torch.Generator().manual_seed(SEED))
    captured = Captured(monkeypatch, ids)
    result = train(config(tmp_path, model, data, method=METHODS[name]), model)
    assert result.ended == "complete"
    assert result.base_held_out_loss is not None and result.held_out_loss is not None
    assert result.held_out_loss < result.base_held_out_loss - 0.2, result
    plain = in_plain_peft(Path(model.path), Path(result.adapter))
    assert captured.logits is not None
    assert (forward(plain, ids) - captured.logits).abs().max() < 2e-3 * captured.logits.abs().max()
    with plain.disable_adapter():
        base = forward(plain, ids)
    assert (base - captured.logits).abs().max() > 1e-2  # it is the adapter that made the difference


@pytest.mark.parametrize("name", some(["pissa", "olora", "corda_kpm", "eva", "orthogonal"], {"corda_kpm"}))
def test_it_begins_as_the_base(name: str, model: ModelEntry, data: Path, tmp_path: Path) -> None:
    """Whatever the initialisation changes, the model's first held-out loss is the base's."""
    plain = train(config(tmp_path / "a", model, data, train={"max_steps": 1}), model)
    other = train(config(tmp_path / "b", model, data, method=METHODS[name], train={"max_steps": 1}), model)
    assert other.base_held_out_loss == pytest.approx(plain.base_held_out_loss, abs=2e-4)


@pytest.mark.parametrize(
    "optimizer",
    some(["adamw", "adamw_8bit", "lora_plus", "lora_plus_8bit", "lora_fa", "sgd"], {"adamw_8bit", "lora_fa"}),
)
def test_an_optimizer_learns(
    optimizer: str, model: ModelEntry, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rate = {"sgd": 0.05, "lora_plus": 2e-3, "lora_plus_8bit": 2e-3}.get(optimizer, 1e-2)
    rank = 64 if optimizer.endswith("8bit") else 4  # smaller tensors keep a state of 32 bits
    made: list[torch.optim.Optimizer] = []

    names: dict[torch.nn.Parameter, str] = {}

    def remember(*given: Any) -> torch.optim.Optimizer:
        names.update({parameter: name for name, parameter in given[1].named_parameters()})
        made.append(optimizers_torch.make_optimizer(*given))
        return made[-1]

    monkeypatch.setattr(run_torch, "make_optimizer", remember)
    ids = torch.randint(5, 300, (2, 24), generator=torch.Generator().manual_seed(SEED))
    captured = Captured(monkeypatch, ids)
    settings = {"optimizer": optimizer, "learning_rate": rate, "lora_plus_ratio": 5}
    result = train(config(tmp_path, model, data, train=settings, method={"r": rank}), model)
    rates = {names[p]: group["full_lr"] / rate for group in made[0].param_groups for p in group["params"]}
    assert all(times == 1 for name, times in rates.items() if ".lora_A." in name)
    faster = 5 if optimizer.startswith("lora_plus") else 1
    assert all(times == pytest.approx(faster) for name, times in rates.items() if ".lora_B." in name)
    kept = {t.dtype for state in made[0].state.values() for t in state.values() if isinstance(t, torch.Tensor)}
    assert (torch.uint8 in kept) == optimizer.endswith("8bit"), kept
    assert result.held_out_loss is not None and result.base_held_out_loss is not None
    assert result.held_out_loss < result.base_held_out_loss - 0.2
    saved = json.loads((Path(result.adapter) / "adapter_config.json").read_text())
    assert saved["r"] == rank
    found = forward(in_plain_peft(Path(model.path), Path(result.adapter)), ids)
    assert captured.logits is not None
    assert (found - captured.logits).abs().max() < 2e-3 * captured.logits.abs().max()


@pytest.mark.parametrize("family", some(["gemma2", "qwen2"], {"gemma2"}))
def test_layers_of_different_kinds_are_repeated(
    family: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose config lists the attention of each layer: PEFT repeats the layers, and not that list."""
    entry = tiny_models.make(tmp_path / "model", family, seed=SEED)
    ids = torch.randint(5, 300, (2, 24), generator=torch.Generator().manual_seed(SEED))
    captured = Captured(monkeypatch, ids)
    result = train(config(tmp_path, entry, data, method={"layer_replication": [[0, 2], [1, 3]]}), entry)
    assert result.held_out_loss is not None and result.base_held_out_loss is not None
    assert result.held_out_loss < result.base_held_out_loss - 0.2
    plain = in_plain_peft(Path(entry.path), Path(result.adapter))
    kinds = plain.config.layer_types
    plain.config.__dict__["layer_types"] = [kinds[layer] for layer in (0, 1, 1, 2)]
    assert captured.logits is not None
    assert (forward(plain, ids) - captured.logits).abs().max() < 2e-3 * captured.logits.abs().max()
    assert any("layer_types" in note for note in result.notes)


@pytest.mark.parametrize("quantization", some(["nf4", "fp4", "int8"], {"nf4"}))
def test_qlora_trains_on_a_quantized_base(
    quantization: str, model: ModelEntry, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.randint(5, 300, (2, 24), generator=torch.Generator().manual_seed(SEED))
    captured = Captured(monkeypatch, ids)
    result = train(config(tmp_path, model, data, model={"quantization": quantization}), model)
    assert result.held_out_loss is not None and result.base_held_out_loss is not None
    assert result.held_out_loss < result.base_held_out_loss - 0.2
    kind = (
        {"load_in_8bit": True}
        if quantization == "int8"
        else {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": quantization,
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.float32,
        }
    )
    found = in_plain_peft(
        Path(model.path), Path(result.adapter), quantization_config=transformers.BitsAndBytesConfig(**kind)
    )
    undo_bf16_packing(found)
    assert captured.logits is not None
    assert (forward(found, ids) - captured.logits).abs().max() < 2e-2 * captured.logits.abs().max()


@pytest.mark.parametrize("name", some(["loftq", "loftq_2", "loftq_8", "loftq_replace"], {"loftq"}))
def test_loftq_learns_and_begins_nearer_to_the_base(
    name: str, model: ModelEntry, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method: dict[str, Any] = {
        "loftq": {"init": "loftq"},
        "loftq_2": {"init": "loftq", "loftq_iterations": 3},
        "loftq_8": {"init": "loftq", "loftq_bits": "8"},
        "loftq_replace": {"init": "loftq_replace"},
    }[name]
    quantized = {"quantization": "nf4", "double_quant": False} if name == "loftq_replace" else {}
    ids = torch.randint(5, 300, (2, 24), generator=torch.Generator().manual_seed(SEED))
    captured = Captured(monkeypatch, ids)
    result = train(config(tmp_path, model, data, method=method, model=quantized), model)
    assert result.held_out_loss is not None and result.base_held_out_loss is not None
    assert result.held_out_loss < result.base_held_out_loss - 0.2
    assert captured.logits is not None
    size = captured.logits.abs().max()
    if name in ("loftq", "loftq_replace"):  # fits the base that bitsandbytes makes of the original
        four = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
        found = in_plain_peft(Path(model.path), Path(result.adapter), quantization_config=four)
        undo_bf16_packing(found)
        assert (forward(found, ids) - captured.logits).abs().max() < 5e-3 * size
    else:  # what was learnt, on the original base: nearer to the trained model than the base is
        found = in_plain_peft(Path(model.path), Path(result.adapter))
        error = (forward(found, ids) - captured.logits).pow(2).mean()
        with found.disable_adapter():
            assert error < 0.7 * (forward(found, ids) - captured.logits).pow(2).mean()


def test_new_tokens_are_trained_and_come_with_the_adapter(
    model: ModelEntry, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.randint(5, 300, (1, 16), generator=torch.Generator().manual_seed(SEED))
    captured = Captured(monkeypatch, ids)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    marked = tmp_path / "marked.jsonl"
    marked.write_text("\n".join(json.dumps({**row, "output": "<|think|>" + row["output"]}) for row in rows))
    result = train(config(tmp_path, model, marked, method={"new_tokens": "<|think|>"}), model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(result.adapter)
    number = tokenizer.convert_tokens_to_ids("<|think|>")
    assert tokenizer.encode("<|think|>", add_special_tokens=False) == [number]
    assert result.held_out_loss is not None and result.base_held_out_loss is not None
    assert result.held_out_loss < result.base_held_out_loss - 0.2
    grown = len(tokenizer) if any("resize_token_embeddings" in note for note in result.notes) else 0
    found = forward(in_plain_peft(Path(model.path), Path(result.adapter), grown=grown), ids)
    assert captured.logits is not None
    width = model.shape.vocabulary or 300
    assert (found - captured.logits)[..., : min(width, number)].abs().max() < 2e-3 * captured.logits.abs().max()


@pytest.mark.parametrize("family", some(["mixtral", "qwen2", "gemma2", "gpt2", "phi", "mistral"], {"gpt2"}))
@pytest.mark.parametrize("init", some(["default", "pissa"], {"pissa"}))
def test_other_architectures(
    family: str, init: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = tiny_models.make(tmp_path / "model", family, seed=SEED)
    ids = torch.randint(5, 300, (2, 24), generator=torch.Generator().manual_seed(SEED))
    captured = Captured(monkeypatch, ids)
    result = train(config(tmp_path, entry, data, method={"init": init}), entry)
    assert result.held_out_loss is not None and result.base_held_out_loss is not None
    assert result.held_out_loss < result.base_held_out_loss - 0.1
    assert captured.logits is not None
    found = forward(in_plain_peft(Path(entry.path), Path(result.adapter)), ids)
    assert (found - captured.logits).abs().max() < 2e-3 * captured.logits.abs().max()


ELSEWHERE: dict[str, tuple[str, dict[str, Any]]] = {
    "experts": ("mixtral", {"target_parameters": "mlp.experts.gate_up_proj, mlp.experts.down_proj"}),
    "experts_alone": ("mixtral", {"targets": "", "target_parameters": "mlp.experts.gate_up_proj"}),
    "biases": ("qwen2", {"bias": "all"}),
    "biases_of_the_trained": ("qwen2", {"bias": "lora_only"}),
    "tied_head": ("gemma2", {"modules_to_save": ["lm_head"]}),
    "tied_tokens": ("gemma2", {"init": "pissa", "trainable_tokens": "5 9"}),
    "dora_of_conv1d": ("gpt2", {"dora": True}),
}


@pytest.mark.parametrize("name", some(ELSEWHERE, {"experts"}))
def test_what_only_other_architectures_have(
    name: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, method = ELSEWHERE[name]
    entry = tiny_models.make(tmp_path / "model", family, seed=SEED)
    ids = torch.randint(5, 300, (2, 24), generator=torch.Generator().manual_seed(SEED))
    captured = Captured(monkeypatch, ids)
    result = train(config(tmp_path, entry, data, method=method), entry)
    assert result.held_out_loss is not None and result.base_held_out_loss is not None
    assert result.held_out_loss < result.base_held_out_loss - 0.2
    found = forward(in_plain_peft(Path(entry.path), Path(result.adapter)), ids)
    assert captured.logits is not None
    assert (found - captured.logits).abs().max() < 2e-3 * captured.logits.abs().max()
    tensors = load_file(Path(result.adapter) / "adapter_model.safetensors")
    word = {"experts": ".experts.", "biases": ".bias", "tied_head": "lm_head", "tied_tokens": "embed_tokens"}
    wanted = next((text for start, text in word.items() if name.startswith(start)), "lora_magnitude_vector")
    assert any(wanted in key for key in tensors), sorted(tensors)


@pytest.mark.parametrize("init", some(["eva", "corda"], {"eva"}))
def test_the_calibration_text_decides_where_it_starts(
    init: str, model: ModelEntry, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Numbers: " + " ".join(str(number * 37) for number in range(400)))
    first: list[dict[str, torch.Tensor]] = []
    original = methods_torch.first_state
    monkeypatch.setattr(methods_torch, "first_state", lambda given: first.append(original(given)) or first[-1])
    for folder, given in (("a", {}), ("b", {}), ("c", {"calibration": str(text)})):
        method = {"init": init, "calibration_samples": 6, "eva_rho": 1, **given}
        held = {"held_out": 0}
        train(config(tmp_path / folder, model, data, data=held, method=method, train={"max_steps": 1}), model)
    names = [name for name in first[0] if name.endswith("lora_A")]
    assert all(torch.equal(first[0][name], first[1][name]) for name in names)
    assert not any(torch.allclose(first[0][name], first[2][name], atol=1e-3) for name in names)


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
@pytest.mark.parametrize("init", some(["default", "pissa"], {"default"}))
def test_preferences_are_learnt(objective: str, init: str, model: ModelEntry, tmp_path: Path) -> None:
    pairs = training_kit.preferences(tmp_path / "pairs.jsonl", SEED)
    report = training_kit.Remembering()
    made = config(tmp_path, model, pairs, method={"init": init}, train={"objective": objective, "learning_rate": 3e-3})
    result = train(made, model, report)
    assert result.held_out_loss is not None and result.base_held_out_loss is not None
    assert result.held_out_loss < result.base_held_out_loss
    steps = [values for _, values in report.metrics if "accuracy" in values]
    last = [values["accuracy"] for values in steps[-5:]]  # of four pairs each: one wrong pair of them all is no fault
    assert sum(last) / len(last) > 0.8
    if objective == "dpo":
        assert result.base_held_out_loss == pytest.approx(0.6931, abs=1e-3)  # ln 2: it begins as the reference
