"""QLoRA on folders that GPTQ, AWQ or HQQ has packed: every tensor learns, and the adapter holds in plain PEFT on the same numbers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from app.core.errors import ErrorKind, WeftError
from app.core.library import ModelFormat
from app.tasks import train_modules
from app.training import dry_step_torch
from app.training.module_names import ModulesParameters
from tests.engine import packed_kit, training_kit
from tests.engine.launch_kit import DDP, FSDP, launched
from tests.engine.training_kit import Captured, Remembering, config, forward, train

SEED = random.randrange(10**6)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    print(f"seed {SEED}")
    return packed_kit.make(tmp_path_factory.mktemp("packed") / "base", SEED)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training_kit.examples(tmp_path_factory.mktemp("data") / "examples.jsonl", SEED)


KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gptq": ("gptq", {"act_order": True}, {}),
    "awq": ("awq", {}, {}),
    "hqq": ("hqq", {}, {}),
    "gptq_3_dora": ("gptq", {"bits": 3}, {"method": {"dora": True}}),
    "gptq_lone": ("gptq", {"name": "gptq_model-4bit-32g.safetensors"}, {"train": {"gradient_checkpointing": True}}),
    "hqq_8_eva": ("hqq", {"bits": 8}, {"method": {"init": "eva", "calibration_samples": 6}}),
    "awq_bf16": ("awq", {}, {"train": {"precision": "bf16"}}),
}


@pytest.mark.parametrize("kind", [k if k == "gptq" else pytest.param(k, marks=pytest.mark.slow) for k in KINDS])
def test_qlora_learns_on_a_packed_base(
    kind: str, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, packing, sections = KINDS[kind]
    packed = packed_kit.pack(base, tmp_path / kind, method, seed=SEED, **packing)
    given: dict[str, torch.Tensor] = {}
    check = dry_step_torch.check_gradients

    def checked(trained: dict[str, torch.nn.Parameter]) -> list[str]:
        given.update({name: p.grad.clone() for name, p in trained.items() if p.grad is not None})
        assert given.keys() == trained.keys()
        return check(trained)

    monkeypatch.setattr(dry_step_torch, "check_gradients", checked)
    ids = torch.randint(5, 300, (2, 24), generator=torch.Generator().manual_seed(SEED))
    captured = Captured(monkeypatch, ids)
    sections = {**sections, "train": {"epochs": 2, **sections.get("train", {})}}
    made = config(tmp_path, packed.entry, data, **sections)
    result = train(made, packed.entry)
    assert len(given) >= 2 * 2 * 7 or "eva" in kind  # A and B of seven modules in two layers; EVA may leave some out
    assert all(bool(torch.isfinite(each).all()) for each in given.values())
    assert all(bool(each.any()) for name, each in given.items() if "lora_B" in name)
    assert result.base_held_out_loss is not None and result.held_out_loss is not None
    assert result.held_out_loss < result.base_held_out_loss - 0.2
    plain = peft.PeftModel.from_pretrained(packed.reference, result.adapter).eval()
    found = forward(plain, ids)
    assert captured.logits is not None
    near = 0.05 if kind == "awq_bf16" else 2e-3
    assert (found - captured.logits).abs().max() < near * captured.logits.abs().max()
    with plain.disable_adapter():
        assert (forward(plain, ids) - found).abs().max() > 1e-2  # it is the adapter that made the difference


@pytest.mark.slow
def test_two_processes_learn_the_same_on_a_packed_base(base: Path, data: Path, tmp_path: Path) -> None:
    packed = packed_kit.pack(base, tmp_path / "packed", "gptq", seed=SEED)
    given: dict[str, Any] = {"train": {"max_steps": 4, "learning_rate": 3e-3}, "model": {"device": "cpu"}}
    one = train(config(tmp_path / "one", packed.entry, data, **given), packed.entry)
    made = config(tmp_path / "two", packed.entry, data, **given)
    events = launched(made, packed.entry, tmp_path / "two", DDP)
    assert events[0]["processes"] == 2
    assert events[-1]["result"]["losses"] == pytest.approx(one.losses, rel=1e-3)
    refused = launched(
        config(tmp_path / "three", packed.entry, data, **given), packed.entry, tmp_path / "three", FSDP, fails=True
    )
    assert refused[-1]["kind"] == "failed" and "Packed weights" in refused[-1]["message"]


def test_what_a_packed_base_cannot_do_is_said(base: Path, data: Path, tmp_path: Path) -> None:
    packed = packed_kit.pack(base, tmp_path / "packed", "awq", seed=SEED)
    assert packed.entry.format is ModelFormat.AWQ
    with pytest.raises(WeftError, match="quantized") as caught:
        train(config(tmp_path, packed.entry, data, method={"init": "pissa"}), packed.entry)
    assert caught.value.kind is ErrorKind.UNSUPPORTED and "16-bit" in caught.value.hint
    assert not (tmp_path / "adapter.training").exists()
    found = train_modules.run(ModulesParameters(model=packed.entry), Remembering())
    assert found.linear["q_proj"] == 2 and found.layers == 2
