"""What an optimizer is said to take is what it takes, to the byte."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import peft
import pytest
import torch
import transformers

from app.training.dry_step_torch import room_for_state
from app.training.estimate import adapter_tensors, estimate
from app.training.optimizer_state import state_size
from app.training.optimizers_torch import make_optimizer
from app.training.run_file import from_table
from app.training.train_config import TrainConfig
from tests import seeds
from tests.engine import tiny_models

SEED = seeds.of(__name__, 10**6)


def optimizers() -> list[str]:
    """Every optimizer that a run can have."""
    kind = get_type_hints(TrainConfig)["optimizer"]
    return [name for name in get_args(kind) if isinstance(name, str)]


class Net(torch.nn.Module):
    """Linear modules whose A and B are on either side of what 8 bits begin at."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.wide = torch.nn.Linear(rng.randint(600, 800), rng.randint(20, 60))
        self.narrow = torch.nn.Linear(self.wide.out_features, rng.randint(500, 700))
        self.head = torch.nn.Linear(self.narrow.out_features, 9, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.narrow(self.wide(x)))


def bytes_of(optimizer: Any) -> int:
    """All distinct tensors of its state."""
    found = {
        value.data_ptr(): value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    }
    return sum(found.values())


@pytest.mark.parametrize("name", optimizers())
def test_the_state_after_a_step_is_as_large_as_was_said(name: str, tmp_path: Path) -> None:
    if name.endswith("8bit"):
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed in this interpreter")
    print(f"seed {SEED}")
    torch.manual_seed(SEED)
    lora = peft.LoraConfig(r=8, target_modules=["wide", "narrow"], modules_to_save=["head"])
    model = peft.get_peft_model(Net(random.Random(SEED)), lora)  # type: ignore[arg-type]
    settings = TrainConfig(optimizer=name)  # type: ignore[arg-type]
    optimizer = make_optimizer(settings, model, [tmp_path])
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert not (name == "lora_fa" and any(".lora_A." in key for key in trained))
    trainer: Any = SimpleNamespace(train_config=settings, trained=trained, optimizer=optimizer)
    room = room_for_state(trainer).numel()

    model(torch.randn(3, model.base_model.model.wide.in_features)).square().sum().backward()  # type: ignore[union-attr,arg-type]
    optimizer.step()
    told = state_size(name, [p.numel() for p in trained.values()])
    assert told.total == bytes_of(optimizer)
    assert room == (told.rest if name.startswith("paged") else told.total)
    assert room_for_state(trainer).numel() == 0  # it is there


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "lora_fa", "paged_adamw_8bit"])
def test_the_header_foretells_the_trained_tensors(name: str, tmp_path: Path) -> None:
    entry = tiny_models.make(tmp_path / "model", "llama", seed=SEED)
    table = {"model": {"path": entry.path}, "method": {"r": 12}, "train": {"optimizer": name}, "output": {"dir": "y"}}
    made = from_table(table)
    base = transformers.AutoModelForCausalLM.from_pretrained(entry.path, dtype=torch.float32)
    model = peft.get_peft_model(base, peft.LoraConfig(r=12, target_modules="all-linear"))
    make_optimizer(made.train, model, [tmp_path])
    real = [p.numel() for p in model.parameters() if p.requires_grad]
    frozen = sum(p.numel() for key, p in model.named_parameters() if "lora_" in key and not p.requires_grad)
    tensors, others = adapter_tensors(made, entry)
    assert sorted(tensors) == sorted(real) and others == frozen
    assert estimate(made, entry) == estimate(made, entry, tensors=real)
