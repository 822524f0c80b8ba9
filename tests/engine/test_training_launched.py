"""Runs outside the engine: two processes by accelerate (DDP, FSDP), and an exported folder. They learn what one process learns."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from app.core.errors import WeftError
from app.core.library import ModelEntry
from app.training.distribution import check_configuration
from app.training.run_config import TrainParameters
from app.training.run_export import export
from tests import seeds
from tests.engine import tiny_models, training_kit
from tests.engine.launch_kit import DDP, FSDP, environment, launched
from tests.engine.training_kit import config, in_plain_peft, train

pytestmark = pytest.mark.slow
SEED = seeds.of(__name__, 10**6)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelEntry:
    print(f"seed {SEED}")
    return tiny_models.make(tmp_path_factory.mktemp("model"), "llama", seed=SEED)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training_kit.examples(tmp_path_factory.mktemp("data") / "examples.jsonl", SEED)


def same_adapter(one: Path, other: Path) -> None:
    """Equal up to what another order of additions does to an optimizer that divides by the gradient's size."""
    ours, theirs = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.linalg.norm(tensor - theirs[name]) < 0.02 * torch.linalg.norm(tensor) + 1e-6, name


WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": (DDP, {}),
    "ddp_paged": (DDP, {"train": {"optimizer": "paged_adamw"}}),
    "ddp_preferences": (DDP, {"train": {"objective": "dpo"}}),
    "fsdp": (FSDP, {"train": {"samples": "What is a loom?", "sample_tokens": 4, "keep_best": True}}),
    "fsdp_dora": (
        FSDP,
        {"method": {"dora": True}, "train": {"optimizer": "lora_plus", "gradient_checkpointing": True}},
    ),
    "fsdp_pissa": (FSDP, {"method": {"init": "pissa", "pissa_niter": 4}, "train": {"chunked_loss": False}}),
    "fsdp_eva": (FSDP, {"method": {"init": "eva", "calibration_samples": 6, "targets": "q_proj, lm_head"}}),
    "fsdp_preferences": (FSDP, {"train": {"objective": "dpo"}, "method": {"init": "olora"}}),
    "fsdp_bf16": (FSDP, {"train": {"precision": "bf16"}}),
    "fsdp_gemma2": (FSDP, {"family": "gemma2"}),  # tied embeddings, logits that are capped
    "fsdp_mixtral": (FSDP, {"family": "mixtral"}),
}


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_learn_what_one_learns(way: str, model: ModelEntry, data: Path, tmp_path: Path) -> None:
    how, sections = WAYS[way]
    if "family" in sections:
        model = tiny_models.make(tmp_path / "model", sections["family"], seed=SEED)
    train_section = {"max_steps": 6, "learning_rate": 3e-3, "evaluate_every": 3, **sections.get("train", {})}
    if train_section.get("objective") == "dpo":
        data = training_kit.preferences(tmp_path / "pairs.jsonl", SEED)
    rest = {"method": sections.get("method", {}), "train": train_section, "model": {"device": "cpu"}}
    one = train(config(tmp_path / "one", model, data, **rest), model)
    events = launched(config(tmp_path / "two", model, data, **rest), model, tmp_path / "two", how)
    assert events[0]["kind"] == "started" and events[0]["processes"] == 2
    assert (events[0]["distribution"] == "FSDP") == (how is FSDP)
    assert events[-1]["kind"] == "done", events[-1]
    loose = 10 if way == "fsdp_bf16" else 1
    two = events[-1]["result"]
    assert two["losses"] == pytest.approx(one.losses, rel=1e-3 * loose)
    assert [loss for _, loss in two["held_out_losses"]] == pytest.approx(
        [loss for _, loss in one.held_out_losses], rel=1e-3 * loose
    )
    if loose == 1:
        same_adapter(tmp_path / "one", tmp_path / "two")
    in_plain_peft(Path(model.path), tmp_path / "two" / "adapter")
    news = [json.loads(event["json"])["kind"] for event in events if event["kind"] == "news"]
    assert ("samples" in news) == (way == "fsdp")


@pytest.mark.parametrize("goes_on", ["fsdp", "one"])
def test_a_shared_out_run_that_was_killed_goes_on(goes_on: str, model: ModelEntry, data: Path, tmp_path: Path) -> None:
    """In as many processes, or in one: a checkpoint holds whole tensors."""
    settings = {"max_steps": 8, "learning_rate": 3e-3, "checkpoint_every": 2, "evaluate_every": 4}
    given: dict[str, Any] = {"train": settings, "model": {"device": "cpu"}}
    whole = train(config(tmp_path / "one", model, data, **given), model)
    broken = config(tmp_path / "two", model, data, **given)
    events = launched(broken, model, tmp_path / "two", FSDP, kill_at=4)
    assert events[-1]["kind"] != "done"
    if goes_on == "one":
        again = train(broken, model, resume="yes")
        losses, held = again.losses, again.held_out_loss
    else:
        events = launched(broken, model, tmp_path / "two", FSDP, resume="yes")
        losses, held = events[-1]["result"]["losses"], events[-1]["result"]["held_out_loss"]
        steps = [event["step"] for event in events if event["kind"] == "metric" and "loss" in event["values"]]
        assert steps == [5, 6, 7, 8]
    assert losses == pytest.approx(whole.losses, rel=1e-3)
    assert held == pytest.approx(whole.held_out_loss, rel=1e-3)
    same_adapter(tmp_path / "one", tmp_path / "two")


def test_one_process_where_two_were_asked_for_says_so(model: ModelEntry, data: Path, tmp_path: Path) -> None:
    made = config(tmp_path / "run", model, data, model={"device": "cpu"})
    events = launched(made, model, tmp_path / "run", DDP.replace("MULTI_GPU", "MULTI_CPU"), fails=True)
    assert events[-1]["kind"] == "failed" and "use_cpu: true" in events[-1]["hint"]
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.slow
def test_an_exported_run_trains_from_its_folder_alone(model: ModelEntry, data: Path, tmp_path: Path) -> None:
    made = config(
        tmp_path / "never",
        model,
        data,
        train={"max_steps": 3},
        method={"init": "eva", "calibration": str(data), "calibration_samples": 4},
    )
    parameters = TrainParameters(config=made, model=model)
    steps = export(parameters, tmp_path / "away", "torch\n", "# run\n")
    assert any("start.sh" in each for each in steps)
    with pytest.raises(WeftError, match="there already"):
        export(parameters, tmp_path / "away", "", "")
    away = tmp_path / "elsewhere"
    (tmp_path / "away").rename(away)
    for name in ("accelerate.yaml", "accelerate-fsdp.yaml"):
        check_configuration((away / name).read_text())
    text = (away / "run.json").read_text()
    assert str(tmp_path) not in text and not (tmp_path / "never").exists()
    ran = subprocess.run(
        [sys.executable, "-m", "app.training.run_launched", "run.json"],
        cwd=away,
        env=environment(away),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert ran.returncode == 0, ran.stderr[-3000:] + ran.stdout[-2000:]
    in_plain_peft(away / "model" / Path(model.path).name, away / "adapter")
