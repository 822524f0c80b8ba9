"""What a run leaves behind, GGUF bases, module names, several processes, an exported folder, losses equal to TRL's."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from types import SimpleNamespace

import msgspec
import peft
import pytest
import torch
import transformers

import app
from app.core.adapter_note import read_note
from app.core.errors import ErrorKind, WeftError
from app.core.library import ModelEntry, ModelFormat
from app.core.recognise import recognise_adapter
from app.tasks import train_modules
from app.training import schedule
from app.training.card import read_record
from app.training.run_config import TrainConfig
from app.training.trainer_loss_torch import dpo_losses, orpo_losses
from tests import seeds
from tests.engine import tiny_models, training_kit
from tests.engine.training_kit import Remembering, config, forward, in_plain_peft, train

SEED = seeds.of(__name__, 10**6)
ROOT = Path(app.__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelEntry:
    print(f"seed {SEED}")
    return tiny_models.make(tmp_path_factory.mktemp("model"), "llama", seed=SEED)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training_kit.examples(tmp_path_factory.mktemp("data") / "examples.jsonl", SEED)


def test_the_folder_holds_adapter_card_and_record(model: ModelEntry, data: Path, tmp_path: Path) -> None:
    report = Remembering()
    made = config(tmp_path, model, data, train={"samples": "What is a loom?", "evaluate_every": 10})
    result = train(made, model, report)
    folder = Path(result.adapter)
    assert {p.name for p in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "weft_run.json",
        "weft_adapter.json",
    }
    entry = recognise_adapter(folder)
    assert entry is not None and entry.run == "adapter" and data.name in read_note(folder).title
    assert {p.name for p in tmp_path.iterdir()} == {"adapter"}
    record = read_record(folder)
    assert record is not None and record.config == made
    assert record.losses == result.losses and len(result.losses) == result.steps
    weights = Path(model.path) / "model.safetensors"
    assert [f.sha256 for f in record.base_files] == [hashlib.sha256(weights.read_bytes()).hexdigest()]
    assert [f.sha256 for f in record.data_files] == [hashlib.sha256(data.read_bytes()).hexdigest()]
    assert record.versions["torch"] == torch.__version__
    words = (folder / "README.md").read_text()
    assert record.base_files[0].sha256 in words and f"{result.held_out_loss:.4f}" in words
    steps = [step for step, values in report.metrics if "loss" in values]
    assert steps == list(range(1, result.steps + 1))
    assert {"loss", "learning_rate", "grad_norm", "tokens_per_second", "tokens", "epoch", "seconds_left"} <= set(
        next(values for _, values in report.metrics if "loss" in values)
    )
    kinds = [news["kind"] for news in report.heard]
    assert {"data", "estimate", "samples", "state"} <= set(kinds)
    memory, time = (news for news in report.heard if news["kind"] == "estimate")
    assert memory["values"]["weights"] > 0 and "of memory" in memory["text"]
    assert 0 < time["values"]["seconds"] < 600 and "Training will take about" in time["text"]
    first = next(news for news in report.heard if news["kind"] == "samples")
    assert first["step"] == 0 and first["samples"][0][0] == "What is a loom?"


def test_a_place_that_is_taken_is_left_alone(model: ModelEntry, data: Path, tmp_path: Path) -> None:
    made = config(tmp_path, model, data, train={"max_steps": 2})
    train(made, model)
    before = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(WeftError, match="there already"):
        train(made, model)
    again = config(tmp_path, model, data, train={"max_steps": 3}, output={"overwrite": True})
    train(again, model)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() != before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(WeftError, match="no adapter"):
        train(config(tmp_path, model, data, output={"dir": str(tmp_path / "mine"), "overwrite": True}), model)
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"
    with pytest.raises(WeftError) as caught:
        train(config(tmp_path / "x", model, data), model, resume="yes")
    assert caught.value.kind is ErrorKind.NOT_FOUND


def test_a_run_that_cannot_begin_leaves_nothing_behind(model: ModelEntry, data: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    for made in (
        config(tmp_path, model, empty),
        config(tmp_path, model, data, method={"targets": "nothing"}),
        config(tmp_path, model, data, train={"objective": "dpo"}),
    ):
        with pytest.raises(WeftError):
            train(made, model)
        assert {path.name for path in tmp_path.iterdir()} == {"empty.jsonl"}


def test_modules_that_do_not_exist_are_named_with_those_that_do(model: ModelEntry, data: Path, tmp_path: Path) -> None:
    with pytest.raises(WeftError, match="query") as caught:
        train(config(tmp_path, model, data, method={"targets": "query"}), model)
    assert "q_proj" in caught.value.hint


def test_the_starter_learns_from_its_gguf_what_it_learns_from_safetensors(data: Path, tmp_path: Path) -> None:
    starter = ROOT / "resources" / "starter"
    folder = tiny_models.entry(starter / "model", transformers.AutoModelForCausalLM.from_pretrained(starter / "model"))
    path = starter / "weft-starter-f16.gguf"
    file = msgspec.structs.replace(folder, path=str(path), id=str(path), format=ModelFormat.GGUF, files=(str(path),))
    settings = {"max_steps": 4, "learning_rate": 1e-3}
    one = train(config(tmp_path / "a", folder, data, train=settings), folder)
    other = train(config(tmp_path / "b", file, data, train=settings), file)
    # The tokenizer that transformers rebuilds from a GGUF may cut some words otherwise: near, not equal.
    assert other.losses == pytest.approx(one.losses, rel=0.2)
    base = tmp_path / "base"
    import shutil

    shutil.copytree(starter / "model", base)
    ids = torch.randint(5, 300, (1, 16), generator=torch.Generator().manual_seed(SEED))
    plain = in_plain_peft(base, Path(other.adapter))
    with_adapter = forward(plain, ids)
    with plain.disable_adapter():
        assert (with_adapter - forward(plain, ids)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("family", "linear", "pattern"),
    [("llama", "q_proj", "layers"), ("gpt2", "c_attn", "h"), ("mixtral", "q_proj", "layers")],
)
def test_the_modules_of_a_model_are_read_from_it(family: str, linear: str, pattern: str, tmp_path: Path) -> None:
    entry = tiny_models.make(tmp_path / "model", family, seed=SEED)
    found = train_modules.run(train_modules.Parameters(model=entry), Remembering())  # type: ignore[arg-type]
    assert found.linear[linear] == 3 and "lm_head" not in found.linear
    assert (found.layers, found.pattern) == (3, pattern)
    assert "lm_head" in found.embeddings
    assert bool(found.experts) == (family == "mixtral")
    assert found.flops > 1e7


def test_a_batch_may_be_computed_in_other_ways_and_teaches_the_same(
    model: ModelEntry, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accumulated, checkpointed, with the loss in one piece: as the same examples at once."""
    layer = transformers.models.llama.modeling_llama.LlamaMLP
    original, passes = layer.forward, [0]

    def counted(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        passes[0] += torch.is_grad_enabled()
        return original(self, x)

    monkeypatch.setattr(layer, "forward", counted)
    ways: dict[str, dict[str, object]] = {
        "at once": {"batch_size": 4, "gradient_accumulation": 1},
        "checkpointed": {"batch_size": 4, "gradient_accumulation": 1, "gradient_checkpointing": True},
        "accumulated": {"batch_size": 1, "gradient_accumulation": 4},
        "in one piece": {"batch_size": 2, "gradient_accumulation": 2, "chunked_loss": False},
    }
    losses, counts = {}, {}
    for name, settings in ways.items():
        passes[0] = 0
        made = config(tmp_path / name, model, data, data={"held_out": 0}, train={"max_steps": 4, **settings})
        losses[name], counts[name] = train(made, model).losses, passes[0]
    assert losses["at once"][0] != losses["at once"][-1]
    for name in ways:
        assert losses[name] == pytest.approx(losses["at once"], rel=1e-3), name
    assert counts["checkpointed"] > 1.5 * counts["at once"]  # computed again for the backward pass


def test_learning_rates_follow_transformers() -> None:
    total, warm = 50, 5
    parameter = torch.nn.Parameter(torch.zeros(1))
    for name, kind in (("linear", "linear"), ("cosine", "cosine")):
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        theirs = transformers.get_scheduler(kind, optimizer, warm, total)
        made = TrainConfig(scheduler=name, warmup=warm)  # type: ignore[arg-type]
        for step in range(total):
            if step >= warm:  # warm-up: ours begins above zero
                assert schedule.factor(made, step, total) == pytest.approx(theirs.get_last_lr()[0], abs=1e-6)
            optimizer.step()
            theirs.step()
    for name in ("cosine_with_min_lr", "polynomial", "inverse_sqrt", "warmup_stable_decay", "constant"):
        made = TrainConfig(scheduler=name, warmup=0.1)  # type: ignore[arg-type]
        values = [schedule.factor(made, step, total) for step in range(total)]
        assert all(0 < value <= 1 for value in values) and values[5] == pytest.approx(1)
        assert values[5:] == sorted(values[5:], reverse=True)


# Preferences against TRL ------------------------------------------------------------------------------


def test_orpo_equals_trl() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        orpo = pytest.importorskip("trl.experimental.orpo.orpo_trainer", reason="TRL is not installed")
    generator = torch.Generator().manual_seed(SEED)
    chosen, rejected = (-torch.rand(6, generator=generator) * 40 - 0.5 for _ in range(2))
    counts = torch.randint(3, 20, (2, 6), generator=generator)
    ours, _ = orpo_losses(chosen, rejected, counts[0], counts[1], 0.3)
    fake = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"), use_logits_to_keep=False)
    good, bad = chosen / counts[0], rejected / counts[1]
    theirs = -good - orpo.ORPOTrainer.odds_ratio_loss(fake, good, bad)[0]
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_dpo_equals_trl(model: ModelEntry, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trl = pytest.importorskip("trl", reason="TRL is not installed")
        datasets = pytest.importorskip("datasets", reason="datasets is not installed")
        trainer_class, settings_class = trl.DPOTrainer, trl.DPOConfig
        torch.manual_seed(SEED)
        base = transformers.AutoModelForCausalLM.from_pretrained(model.path)
        wrapped = peft.get_peft_model(
            base, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(model.path)
        tokenizer.pad_token = tokenizer.eos_token
        pairs = [
            {
                "prompt": f"What is a loom {n}?",
                "chosen": f" A loom is {n} fine.",
                "rejected": f" No idea about {n} of it!",
            }
            for n in range(4)
        ]
        arguments = settings_class(
            output_dir=str(tmp_path), beta=0.2, use_cpu=True, report_to=[], per_device_train_batch_size=4, bf16=False,
            disable_tqdm=True, gradient_checkpointing=False,
        )  # fmt: skip
        trainer = trainer_class(
            model=wrapped, args=arguments, train_dataset=datasets.Dataset.from_list(pairs), processing_class=tokenizer
        )
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        trainer.model.eval()
        with torch.no_grad():  # away from where it began, which is what TRL compares with
            for name, parameter in trainer.model.named_parameters():
                if ".default." in name:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
            theirs = float(trainer.compute_loss(trainer.model, batch))
    ids, mask = batch["input_ids"], batch["completion_mask"].bool()
    labels = ids.masked_fill(~mask, -100)
    tensors = {"input_ids": ids, "attention_mask": batch["attention_mask"], "labels": labels}
    from app.training.trainer_loss_torch import sequence_logps

    with torch.no_grad():
        logps, _ = sequence_logps(trainer.model, tensors)
        trainer.model.set_adapter("ref")
        known, _ = sequence_logps(trainer.model, tensors)
    half = len(ids) // 2
    ours, _ = dpo_losses(logps[:half], logps[half:], known[:half], known[half:], 0.2, 0.0)
    assert (logps - known).abs().min() > 1e-3, "away from where it began"
    assert float(ours.mean()) == pytest.approx(theirs, rel=1e-3)
