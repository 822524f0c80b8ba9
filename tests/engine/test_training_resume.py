"""A killed run goes on to the same bits: killed between steps, inside checkpoint writes, by SIGKILL, with every kind of state."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.amp import GradScaler

from app.core.errors import ErrorKind, WeftError
from app.core.library import ModelEntry
from app.training import checkpoint_torch, run_torch
from app.training.run_config import RunConfig, TrainResult
from tests import seeds
from tests.engine import tiny_models, training_kit
from tests.engine.training_kit import Remembering, config, train

pytestmark = [pytest.mark.fault, pytest.mark.skipif(os.name == "nt", reason="forks and kills with SIGKILL")]
SEED = seeds.of(__name__, 10**6)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelEntry:
    print(f"seed {SEED}")
    return tiny_models.make(tmp_path_factory.mktemp("model"), "llama", seed=SEED)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training_kit.examples(tmp_path_factory.mktemp("data") / "examples.jsonl", SEED)


def run_file(folder: Path, entry: ModelEntry, file: Path, /, **changes: dict[str, Any]) -> RunConfig:
    train = {"epochs": 2, "checkpoint_every": 3, "evaluate_every": 4, "samples": "What is a loom?", "sample_tokens": 4}
    method = {"dropout": 0.1, **changes.pop("method", {})}
    return config(folder, entry, file, train={**train, **changes.pop("train", {})}, method=method, **changes)


def killed(work: Callable[[], object]) -> None:
    """Run `work` in a fork that is to be killed by SIGKILL."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(7)  # it was not killed
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def same(one: TrainResult, other: TrainResult) -> None:
    assert one.losses == other.losses
    assert one.held_out_losses == other.held_out_losses
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (Path(one.adapter) / name).read_bytes() == (Path(other.adapter) / name).read_bytes(), name


KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "packed": {},
    "pissa_niter": {"method": {"init": "pissa", "pissa_niter": 2}},
    "eva_lora_fa": {
        # Of so few ranks EVA takes all from some modules: they are left out, then and after a resume.
        "method": {"init": "eva", "calibration_samples": 6, "r": 1, "eva_rho": 3.0},
        "train": {"optimizer": "lora_fa", "packing": False},
    },
    "dora_8bit": {"method": {"dora": True, "r": 64}, "train": {"optimizer": "adamw_8bit"}},
    "olora_plus_bf16": {
        "method": {"init": "olora"},
        "train": {"optimizer": "lora_plus", "learning_rate": 1e-3, "precision": "bf16", "gradient_checkpointing": True},
    },
    "loftq_tokens": {"method": {"init": "loftq", "trainable_tokens": "5 7"}},
    "paged_8bit_nf4": {
        "method": {"dora": True, "r": 64},
        "model": {"quantization": "nf4"},
        "train": {"optimizer": "paged_adamw_8bit"},
    },
    "paged_corda": {"method": {"init": "corda", "calibration_samples": 6}, "train": {"optimizer": "paged_adamw"}},
    "replication_head": {"method": {"layer_replication": [[0, 2], [1, 3]], "modules_to_save": ["lm_head"]}},
    "dpo_pissa": {"method": {"init": "pissa"}, "train": {"objective": "dpo", "learning_rate": 1e-3, "samples": ""}},
    "orpo_int8": {
        "model": {"quantization": "int8"},
        "train": {"objective": "orpo", "learning_rate": 1e-3, "samples": "", "optimizer": "sgd"},
    },
}


@pytest.mark.parametrize(
    "kind",
    [kind if kind in ("pissa_niter", "eva_lora_fa") else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS],
)
def test_a_run_killed_between_steps_ends_in_the_same_bits(
    kind: str, model: ModelEntry, data: Path, tmp_path: Path
) -> None:
    if KINDS[kind].get("train", {}).get("objective", "sft") != "sft":
        data = training_kit.preferences(tmp_path / "pairs.jsonl", SEED)
    whole = train(run_file(tmp_path / "a", model, data, **{k: dict(v) for k, v in KINDS[kind].items()}), model)
    broken = run_file(tmp_path / "b", model, data, **{k: dict(v) for k, v in KINDS[kind].items()})
    rng = random.Random(f"{SEED} {kind}")
    first = rng.randint(1, whole.steps - 1)
    second = rng.randint(first, whole.steps)
    for step in (first, second):
        report = Remembering()
        report.at_step = lambda now, step=step: die() if now >= step else None
        killed(lambda report=report: train(broken, model, report, resume="if_there"))
    print(f"killed after steps {first} and {second} of {whole.steps}")
    torch.rand(17)  # whatever this process drew meanwhile does not matter
    same(whole, train(broken, model, resume="if_there"))
    assert not (tmp_path / "b" / "adapter.training").exists()


def test_a_run_killed_inside_checkpoint_writes_ends_in_the_same_bits(
    model: ModelEntry, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(run_file(tmp_path / "a", model, data, train={"checkpoint_every": 1}), model)
    broken = run_file(tmp_path / "b", model, data, train={"checkpoint_every": 1})
    rng = random.Random(SEED)
    # Every place where a checkpoint touches the disk, in turn, counted over the whole run.
    places = [
        (checkpoint_torch, "save_file"),
        (checkpoint_torch.torch, "save"),
        (checkpoint_torch, "sync_tree"),
        (checkpoint_torch, "sync_folder"),
        (checkpoint_torch.shutil, "rmtree"),
    ]
    for module, name in places:
        before = rng.random() < 0.5
        turn = rng.randint(2, 4)
        print(f"killed {'before' if before else 'after'} call {turn} of {name}")
        with monkeypatch.context() as patch:
            _arm(patch, module, name, turn, before)
            killed(lambda: train(broken, model, resume="if_there"))
    same(whole, train(broken, model, resume="if_there"))


def _arm(patch: pytest.MonkeyPatch, module: Any, name: str, turn: int, before: bool) -> None:
    original, calls = getattr(module, name), [0]

    def deadly(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == turn and before:
            die()
        found = original(*args, **kwargs)
        if calls[0] == turn:
            if name in ("save_file", "save"):  # half of it reached the disk
                place = Path(args[1])
                with place.open("rb+") as file:
                    file.truncate(place.stat().st_size // 2)
            die()
        return found

    patch.setattr(module, name, deadly)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(model: ModelEntry, data: Path, tmp_path: Path) -> None:
    whole = train(run_file(tmp_path / "a", model, data), model)
    broken = run_file(tmp_path / "b", model, data)
    report = Remembering()
    report.at_step = lambda now: die() if now >= 8 else None
    killed(lambda: train(broken, model, report))
    last = sorted((tmp_path / "b" / "adapter.training" / "checkpoints").iterdir())[-1]
    (last / "optimizer.pt").write_bytes(b"nothing")
    heard = Remembering()
    same(whole, train(broken, model, heard, resume="yes"))
    assert any("cannot be used" in line for line in heard.logs)


def test_cancel_in_the_middle_of_a_step_keeps_the_last_whole_one(model: ModelEntry, data: Path, tmp_path: Path) -> None:
    whole = train(run_file(tmp_path / "a", model, data), model)
    broken = run_file(tmp_path / "b", model, data)
    report = Remembering()
    report.at_step = lambda now: report.cancel() if now == 5 else None
    with pytest.raises(WeftError) as caught:
        train(broken, model, report)
    assert caught.value.kind is ErrorKind.CANCELLED
    assert not Path(broken.output.dir).exists()
    same(whole, train(broken, model, resume="yes"))


@pytest.mark.slow
def test_fp16_learns_on_the_processor_and_goes_on_with_its_loss_scaler(
    model: ModelEntry, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scale doubles so often here that gradients overflow: which steps are left out then depends on the scaler's state."""
    scalers: list[torch.amp.GradScaler] = []

    def eager(device: str) -> torch.amp.GradScaler:
        scalers.append(GradScaler(device, init_scale=2.0**14, growth_factor=4.0, growth_interval=2))
        return scalers[-1]

    monkeypatch.setattr(run_torch.torch.amp, "GradScaler", eager)
    settings = {"precision": "fp16", "max_steps": 18, "epochs": 3}
    whole = train(run_file(tmp_path / "a", model, data, train=settings), model)
    broken = run_file(tmp_path / "b", model, data, train=settings)
    for step in (5, 11):
        report = Remembering()
        report.at_step = lambda now, step=step: die() if now == step else None
        killed(lambda report=report: train(broken, model, report, resume="if_there"))
    kept = checkpoint_torch.newest(Path(f"{broken.output.dir}.training"))
    assert kept is not None and kept[0].step == 9 and kept[0].scaler["scale"] != 2.0**14
    same(whole, train(broken, model, resume="yes"))
    assert len(scalers) == 2 and scalers[0].state_dict() == scalers[1].state_dict()
    assert whole.held_out_loss is not None and whole.base_held_out_loss is not None
    assert whole.held_out_loss < whole.base_held_out_loss - 0.2


def test_pause_and_go_on_changes_nothing(model: ModelEntry, data: Path, tmp_path: Path) -> None:
    import threading

    whole = train(run_file(tmp_path / "a", model, data), model)
    report = Remembering()

    def at_step(now: int) -> None:
        if now == 4:
            report.adjust("pause")
            threading.Timer(0.3, report.adjust, ("resume",)).start()

    report.at_step = at_step
    same(whole, train(run_file(tmp_path / "b", model, data), model, report))
    states = [news["text"] for news in report.heard if news["kind"] == "state"]
    assert states == ["running", "paused", "running"]


def test_stop_keeps_the_adapter_as_it_is(model: ModelEntry, data: Path, tmp_path: Path) -> None:
    report = Remembering()
    report.at_step = lambda now: report.adjust("stop") if now == 5 else None
    result = train(run_file(tmp_path, model, data), model, report)
    assert (result.ended, result.steps) == ("stopped", 5)
    assert result.held_out_loss is not None and result.held_out_losses[-1][0] == 5
    record = json.loads((Path(result.adapter) / "weft_run.json").read_text())
    assert record["ended"] == "stopped" and record["steps"] == 5


def test_a_changed_run_is_not_resumed(model: ModelEntry, data: Path, tmp_path: Path) -> None:
    made = run_file(tmp_path, model, data)
    report = Remembering()
    report.at_step = lambda now: report.cancel() if now == 4 else None
    with pytest.raises(WeftError):
        train(made, model, report)
    other = run_file(tmp_path, model, data, train={"learning_rate": 2e-3})
    with pytest.raises(WeftError, match=r"\[train\] learning_rate"):
        train(other, model, resume="yes")
    with pytest.raises(WeftError, match="unfinished run"):
        train(made, model)
    changed = training_kit.examples(tmp_path / "other.jsonl", SEED + 1)
    with pytest.raises(WeftError, match="the data"):
        train(run_file(tmp_path, model, changed), model, resume="yes")


@pytest.mark.slow
def test_two_runs_in_one_place_are_refused(model: ModelEntry, data: Path, tmp_path: Path) -> None:
    made = run_file(tmp_path, model, data)
    report = Remembering()
    seen: list[str] = []

    def at_step(now: int) -> None:
        if now == 4:
            with pytest.raises(WeftError) as caught:
                train(made, model, resume="if_there")
            seen.append(caught.value.kind)

    report.at_step = at_step
    train(made, model, report)
    assert seen == [ErrorKind.BUSY]


def test_nan_ends_the_run_and_keeps_the_last_good_checkpoint(
    model: ModelEntry, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = run_torch.Trainer.backward

    def poisoned(self: Any, group: Any, *, dry: bool = False) -> Any:
        found = original(self, group, dry=dry)
        return (float("nan"), *found[1:]) if self.counters.step == 7 else found

    monkeypatch.setattr(run_torch.Trainer, "backward", poisoned)
    result = train(run_file(tmp_path, model, data), model)
    assert result.ended == "nan" and len(result.losses) == 7
    from safetensors.torch import load_file

    kept = load_file(Path(result.adapter) / "adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in kept.values())
    monkeypatch.undo()
    again = train(
        run_file(tmp_path / "again", model, data, train={"max_steps": 6, "warmup": 0, "scheduler": "constant"}), model
    )
    assert again.steps == 6
    assert any("step 6" in note for note in result.notes)


@pytest.mark.slow
def test_early_stopping_keeps_the_best(model: ModelEntry, data: Path, tmp_path: Path) -> None:
    made = run_file(
        tmp_path,
        model,
        data,
        train={"epochs": 60, "evaluate_every": 3, "early_stopping": 2, "learning_rate": 3e-2, "scheduler": "constant"},
    )
    result = train(made, model)
    assert result.ended == "early"
    best = min(loss for step, loss in result.held_out_losses if step)
    assert result.held_out_loss == best
    assert result.held_out_losses[-1][1] > best


def test_memory_that_runs_out_halves_the_batch_and_changes_nothing(
    model: ModelEntry, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"batch_size": 4, "gradient_accumulation": 1, "packing": False}
    whole = train(run_file(tmp_path / "a", model, data, train=settings, method={"dropout": 0}), model)
    from app.training.trainer_data_torch import SftData

    original = SftData.loss

    def small(self: Any, model: Any, batch: Any) -> Any:
        if len(batch) > 2 and torch.is_grad_enabled():
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")
        return original(self, model, batch)

    monkeypatch.setattr(SftData, "loss", small)
    report = Remembering()
    other = train(run_file(tmp_path / "b", model, data, train=settings, method={"dropout": 0}), model, report)
    assert any(news["kind"] == "split" and "2 instead of 4" in news["text"] for news in report.heard)
    assert other.losses == pytest.approx(whole.losses, rel=1e-4)

    def none(self: Any, model: Any, batch: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("out of memory")
        return original(self, model, batch)

    monkeypatch.setattr(SftData, "loss", none)
    with pytest.raises(WeftError) as caught:
        train(run_file(tmp_path / "c", model, data, train={"packing": False, "max_steps": 2}), model)
    assert caught.value.kind is ErrorKind.OUT_OF_MEMORY and "max_length" in caught.value.hint


def test_a_full_disk_costs_checkpoints_and_not_the_run(
    model: ModelEntry, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    whole = train(run_file(tmp_path / "a", model, data), model)
    original, calls = checkpoint_torch.torch.save, [0]

    def full(*args: Any, **kwargs: Any) -> None:
        calls[0] += 1
        if calls[0] in (1, 2, 3):
            raise OSError(errno.ENOSPC, "No space left on device")
        original(*args, **kwargs)

    monkeypatch.setattr(checkpoint_torch.torch, "save", full)
    report = Remembering()
    same(whole, train(run_file(tmp_path / "b", model, data), model, report))
    assert any("disk is full" in line for line in report.logs)
