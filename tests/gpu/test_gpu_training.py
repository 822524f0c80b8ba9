"""Training on an NVIDIA card: what only runs there, and the same runs on the processor. `python3 run.py test --gpu`; see docs/gpu.md."""

# ruff: noqa: E402 (imports that need torch come after the check that it is there)
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed in this interpreter")
if not torch.cuda.is_available():
    pytest.skip("PyTorch finds no NVIDIA card here (torch.cuda.is_available() is false)", allow_module_level=True)
pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed in this interpreter")

from app.core.errors import WeftError
from app.core.library import ModelEntry
from app.training import run_torch
from app.training.optimizers_torch import make_optimizer
from app.training.run_config import TrainResult
from tests import seeds
from tests.engine import tiny_models, training_kit
from tests.engine.launch_kit import FSDP, launched
from tests.engine.training_kit import Remembering, config, in_plain_peft, train

pytestmark = pytest.mark.gpu
SEED = seeds.of(__name__, 10**6)
ALL = {"batch_size": 8, "gradient_accumulation": 1, "packing": False, "max_steps": 6, "evaluate_every": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelEntry:
    print(f"seed {SEED}")
    return tiny_models.make(tmp_path_factory.mktemp("model"), "llama", seed=SEED)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> ModelEntry:
    """Large enough that its activations are most of what a step takes."""
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 8}
    return tiny_models.make(tmp_path_factory.mktemp("wide"), "llama", seed=SEED, num_hidden_layers=8, **shape)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training_kit.examples(tmp_path_factory.mktemp("data") / "examples.jsonl", SEED)


def learnt(result: TrainResult, model: ModelEntry) -> None:
    print(f"\nheld out {result.base_held_out_loss} -> {result.held_out_loss} in {result.seconds:.1f} s")
    assert result.base_held_out_loss is not None and result.held_out_loss is not None
    assert result.held_out_loss < result.base_held_out_loss - 0.2
    in_plain_peft(Path(model.path), Path(result.adapter))


def test_32_bits_on_the_card_learn_what_the_processor_learns(model: ModelEntry, data: Path, tmp_path: Path) -> None:
    losses = []
    for device in ("cpu", "cuda"):
        given: dict[str, Any] = {"model": {"device": device}, "train": {**ALL, "precision": "fp32"}}
        losses.append(train(config(tmp_path / device, model, data, **given), model).losses)
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)  # matrices may go through TF32


@pytest.mark.parametrize("precision", ["auto", "bf16", "fp16", "fp32"])
def test_a_precision_learns(precision: str, model: ModelEntry, data: Path, tmp_path: Path) -> None:
    learnt(train(config(tmp_path, model, data, train={"precision": precision}), model), model)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "lora_plus_8bit"])
def test_an_optimizer_learns(
    optimizer: str, model: ModelEntry, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rate = 2e-3 if optimizer.startswith("lora_plus") else 1e-2
    settings = {"optimizer": optimizer, "learning_rate": rate}
    made: list[Any] = []
    monkeypatch.setattr(run_torch, "make_optimizer", lambda *given: made.append(make_optimizer(*given)) or made[-1])
    learnt(train(config(tmp_path, model, data, train=settings, method={"r": 64}), model), model)
    kept = {t.dtype for state in made[0].state.values() for t in state.values() if isinstance(t, torch.Tensor)}
    assert (torch.uint8 in kept) == optimizer.endswith("8bit"), kept
    assert bool(getattr(made[0], "is_paged", False)) == optimizer.startswith("paged")


def paged(optimizer: Any) -> list[bool]:
    """Of each moment that is large enough for bitsandbytes, whether it lies in CUDA's managed memory."""
    large = [p for p in optimizer.state if p.numel() >= 1e5]
    return [bool(getattr(optimizer.state[p][name], "is_paged", False)) for p in large for name in ("state1", "state2")]


@pytest.mark.parametrize("optimizer", ["paged_adamw", "paged_adamw_8bit"])
def test_a_paged_state_is_paged_also_after_a_resume(
    optimizer: str, wide: ModelEntry, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    monkeypatch.setattr(run_torch, "make_optimizer", lambda *given: made.append(make_optimizer(*given)) or made[-1])
    settings = {**ALL, "optimizer": optimizer, "precision": "bf16"}
    whole = train(config(tmp_path / "a", wide, data, train=settings, method={"r": 64}), wide)
    broken = config(tmp_path / "b", wide, data, train=settings, method={"r": 64})
    report = Remembering()
    report.at_step = lambda now: report.cancel() if now == 3 else None
    with pytest.raises(WeftError):
        train(broken, wide, report)
    assert train(broken, wide, resume="yes").losses == pytest.approx(whole.losses, rel=0.03)
    assert len(made) == 3 and all(paged(each) and all(paged(each)) for each in made)


@pytest.mark.parametrize("optimizer", ["adamw", "paged_adamw", "paged_adamw_8bit"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_cancelled_run_goes_on(optimizer: str, precision: str, model: ModelEntry, data: Path, tmp_path: Path) -> None:
    """State of optimizer and loss scaler come back from the checkpoint."""
    settings = {**ALL, "optimizer": optimizer, "precision": precision}
    whole = train(config(tmp_path / "a", model, data, train=settings), model)
    broken = config(tmp_path / "b", model, data, train=settings)
    report = Remembering()
    report.at_step = lambda now: report.cancel() if now == 3 else None
    with pytest.raises(WeftError):
        train(broken, model, report)
    assert train(broken, model, resume="yes").losses == pytest.approx(whole.losses, rel=0.03)


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_qlora_learns(quantization: str, model: ModelEntry, data: Path, tmp_path: Path) -> None:
    result = train(config(tmp_path, model, data, model={"quantization": quantization}), model)
    assert result.base_held_out_loss is not None and result.held_out_loss is not None
    assert result.held_out_loss < result.base_held_out_loss - 0.2


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_dora_with_offload_learns_the_same(device: str, model: ModelEntry, data: Path, tmp_path: Path) -> None:
    """A model in main memory has the card compute its first magnitudes; one on the card has nothing to bring there."""
    losses, used = [], []
    for offload in (False, True):
        method = {"dora": True, "dora_offload": offload}
        given: dict[str, Any] = {"model": {"device": device}, "train": {**ALL, "precision": "fp32"}}
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        losses.append(train(config(tmp_path / str(offload), model, data, method=method, **given), model).losses)
        used.append(torch.cuda.max_memory_allocated() > before)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert used == ([False, True] if device == "cpu" else [True, True])


@pytest.mark.parametrize("init", ["pissa", "olora", "corda", "eva", "loftq"])
def test_an_initialisation_learns(init: str, model: ModelEntry, data: Path, tmp_path: Path) -> None:
    method = {"init": init, "calibration_samples": 8}
    learnt(train(config(tmp_path, model, data, method=method, train={"precision": "fp32"}), model), model)


def test_a_card_that_is_full_halves_the_batch(wide: ModelEntry, tmp_path: Path) -> None:
    """The allocator itself refuses: it is held to less than the whole batch takes, and more than half of it."""
    words = " ".join(training_kit.WORDS)
    rows = "\n".join(f'{{"text": "{index} {words} {words} {words} {words}"}}' for index in range(160))
    data = tmp_path / "rows.jsonl"
    data.write_text(rows)
    settings = {**ALL, "batch_size": 64, "max_length": 256, "max_steps": 2, "precision": "fp32", "chunked_loss": False}
    peaks: list[int] = []
    losses: tuple[float, ...] = ()
    for size in (64, 32):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        made = config(tmp_path / str(size), wide, data, train={**settings, "batch_size": size})
        found = train(made, wide)
        losses = losses or found.losses
        peaks.append(torch.cuda.max_memory_allocated())
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    report = Remembering()
    torch.cuda.set_per_process_memory_fraction((peaks[0] * 0.4 + peaks[1] * 0.6) / total)
    try:
        found = train(config(tmp_path / "small", wide, data, train=settings), wide, report)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert any(news["kind"] == "split" for news in report.heard), (peaks, report.logs)
    assert found.losses == pytest.approx(losses, rel=1e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="FSDP over cards needs two of them")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_cards_share_a_model(precision: str, model: ModelEntry, data: Path, tmp_path: Path) -> None:
    settings = {**ALL, "precision": precision, "checkpoint_every": 2, "samples": "What is a loom?", "sample_tokens": 4}
    one = train(config(tmp_path / "one", model, data, train=settings), model)
    made = config(tmp_path / "two", model, data, train=settings)
    events = launched(made, model, tmp_path / "two", FSDP.replace("use_cpu: true\n", ""), cards=True)
    assert events[0]["processes"] == 2 and events[0]["distribution"] == "FSDP"
    assert events[-1]["result"]["losses"] == pytest.approx(one.losses, rel=1e-2 if precision == "fp32" else 5e-2)
