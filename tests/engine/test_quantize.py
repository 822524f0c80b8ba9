"""GPTQ and AWQ folders: calibrated on a text, they answer like the 16-bit model, and better than plain rounding."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # as app/tasks/quantize.py has it in a child of its own
import torch
import transformers

from app.adapters.merge_staging import Staging
from app.core.errors import ErrorKind, WeftError
from app.core.quantize_plan import QuantizePlan, QuantizeResult
from app.core.stack import AdapterStack, StackedAdapter
from app.tasks.quantize import run
from tests.engine import tiny_models
from tests.engine.adapter_kit import merged, random_adapter
from tests.engine.merge_kit import Report, fresh_seed

GROUP = 32
LENGTH = 96
# What GPTQModel leaves behind: pools of threads, and temporary folders when it loads.
pytestmark = [
    pytest.mark.leaves_behind("GPTQModel keeps its threads until the process ends"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTQMODEL_DISABLE_PACK_EXT", "1")  # it would be compiled for half a minute
    pytest.importorskip(
        "gptqmodel", reason="gptqmodel is not installed in this interpreter (environments install gptq)"
    )


@pytest.fixture
def seed() -> int:
    return fresh_seed()


@pytest.fixture
def text(tmp_path: Path, seed: int) -> Path:
    """About 8,000 tokens: the corpus's words in a random order."""
    words = " ".join(tiny_models.CORPUS).split()
    chosen = random.Random(seed).choices(words, k=2500)
    path = tmp_path / "calibration.txt"
    path.write_text("\n".join(" ".join(chosen[i : i + 12]) for i in range(0, len(chosen), 12)), "utf-8")
    return path


def make(folder: Path, seed: int, **changes: Any) -> Any:
    settings = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "initializer_range": 0.1,
        **changes,
    }
    return tiny_models.make(folder, "llama", seed=seed, dtype=torch.bfloat16, **settings)


def plan(model: Path, target: Path, text: Path, **more: Any) -> QuantizePlan:
    settings: dict[str, Any] = {"group_size": GROUP, "samples": 48, "length": LENGTH, "device": "cpu", **more}
    return QuantizePlan(model=str(model), target=str(target), calibration=str(text), **settings)


def load(folder: Path, **more: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more).eval()


def tokens(folder: Path, text: Path) -> torch.Tensor:
    ids = transformers.AutoTokenizer.from_pretrained(folder)(text.read_text("utf-8"), verbose=False)["input_ids"]
    return torch.tensor(ids[: 16 * LENGTH]).reshape(16, LENGTH)


def log_probabilities(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=ids).logits.float().log_softmax(-1)


def divergence(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """Mean KL(wanted‖found) in nats."""
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def rounded(model: Any, bits: int) -> Any:
    """Every matrix of the layers rounded to the nearest of a symmetric grid, group by group."""
    most = 2 ** (bits - 1) - 1
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and ".layers." in f".{name}":
                weight = module.weight.reshape(module.out_features, -1, GROUP)
                scale = weight.abs().amax(-1, keepdim=True).clamp(min=1e-9) / most
                module.weight.copy_(
                    ((weight / scale).round().clamp(-most - 1, most) * scale).reshape(module.weight.shape)
                )
    return model


def reloaded(folder: Path) -> Any:
    """As somebody else would: by transformers, which takes GPTQModel's kernels. No weight may be missing."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", output_loading_info=True)
    assert not info["missing_keys"], info
    return model.eval()


# KL in nats that models of these sizes stay well under; the model against a random one is above 1.
@pytest.mark.parametrize(
    ("method", "bits", "bound", "more"),
    [("gptq", 4, 0.2, {}), ("gptq", 8, 0.005, {}), ("gptq", 4, 0.2, {"desc_act": True}), ("awq", 4, 0.2, {})],
    ids=["gptq4", "gptq8", "gptq4 desc_act", "awq4"],
)
def test_a_quantized_model_answers_like_the_16_bit_one(
    tmp_path: Path, library: None, text: Path, seed: int, method: str, bits: int, bound: float, more: dict[str, Any]
) -> None:
    make(tmp_path / "model", seed)
    report, here = Report(), sorted(Path().iterdir())
    made = run(plan(tmp_path / "model", tmp_path / "made", text, method=method, bits=bits, **more), report)
    assert isinstance(made, QuantizeResult) and made.matrices == 14 and made.samples == 48
    assert ("Quantizing by " + method.upper()) in {phase for phase, *_ in report.phases}
    assert sorted(Path().iterdir()) == here  # the library's own logs do not lie about
    check_folder(tmp_path, method, bits)
    ids = tokens(tmp_path / "model", text)
    wanted = log_probabilities(load(tmp_path / "model"), ids)
    found = divergence(wanted, log_probabilities(reloaded(tmp_path / "made"), ids))
    plain = divergence(wanted, log_probabilities(rounded(load(tmp_path / "model"), bits), ids))
    print(f"{method} {bits} bits: KL {found:.5f}, rounded to nearest {plain:.5f}")
    assert 0 < found < bound
    if bits == 4:  # at 8 bits the kernels' own 16-bit sums are of the size of what is lost
        assert found < 0.8 * plain


def check_folder(tmp_path: Path, method: str, bits: int) -> None:
    folder = tmp_path / "made"
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert config["quantization_config"]["quant_method"] == method and config["quantization_config"]["bits"] == bits
    original = json.loads((tmp_path / "model" / "config.json").read_text("utf-8"))
    assert config.get("pad_token_id") == original.get("pad_token_id")
    assert (folder / "tokenizer.json").read_bytes() == (tmp_path / "model" / "tokenizer.json").read_bytes()
    for file in folder.iterdir():
        if file.suffix in (".json", ".md"):
            assert str(tmp_path.parent) not in file.read_text("utf-8") and "/tmp" not in file.read_text("utf-8"), file
    assert "quantized to" in (folder / "README.md").read_text("utf-8")
    assert not list(tmp_path.glob(".weft-*"))


def test_adapters_are_merged_in_before(tmp_path: Path, library: None, text: Path, seed: int) -> None:
    make(tmp_path / "model", seed)
    base = load(tmp_path / "model")
    lora = random_adapter(tmp_path / "lora", "llama", base, seed, r=8)
    stack = AdapterStack(adapters=(StackedAdapter(path=str(lora), weight=0.7),))
    with Staging(tmp_path / "made") as killed:  # what a run that was killed has left
        for name in ("aside", "merged", "model"):
            (killed.root / name).mkdir()
            (killed.root / name / "config.json").write_text("{", "utf-8")
    run(plan(tmp_path / "model", tmp_path / "made", text, bits=8, stack=stack), Report())
    ids = tokens(tmp_path / "model", text)
    plain = log_probabilities(base, ids)
    wanted = log_probabilities(merged(base, [(lora, 0.7)]), ids)
    found = log_probabilities(reloaded(tmp_path / "made"), ids)
    assert divergence(wanted, found) < 0.05 * divergence(wanted, plain)
    assert "lora 0.7" in (tmp_path / "made" / "README.md").read_text("utf-8")


def test_a_cancel_leaves_nothing(tmp_path: Path, library: None, text: Path, seed: int) -> None:
    make(tmp_path / "model", seed)

    class Cancelling(Report):
        def progress(self, phase: str, done: float = 0, total: float = 0, unit: str = "") -> None:
            super().progress(phase, done, total, unit)
            self.cancelled = self.cancelled or (phase.startswith("Quantizing") and len(self.phases) > 4)

    report = Cancelling()
    with pytest.raises(WeftError) as stopped:
        run(plan(tmp_path / "model", tmp_path / "made", text), report)
    assert stopped.value.kind is ErrorKind.CANCELLED
    assert "Writing" not in {phase for phase, *_ in report.phases}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calibration.txt", "model"]


@pytest.mark.parametrize(
    ("changes", "more", "kind", "said"),
    [
        ({"intermediate_size": 224}, {"group_size": 64}, ErrorKind.BAD_INPUT, "group size of 32"),
        ({"intermediate_size": 200}, {"group_size": 32}, ErrorKind.UNSUPPORTED, "weft export"),
        ({"num_key_value_heads": 1, "num_attention_heads": 8}, {}, ErrorKind.UNSUPPORTED, "packs them by 32"),
        ({}, {"length": 16, "text": "too short"}, ErrorKind.BAD_INPUT, "too short"),
        ({}, {"text": None}, ErrorKind.NOT_FOUND, "There is no text"),
    ],
    ids=["group", "odd inputs", "odd outputs", "short text", "no text"],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    tmp_path: Path, library: None, text: Path, seed: int, changes: dict, more: dict, kind: ErrorKind, said: str
) -> None:
    make(tmp_path / "model", seed, **changes)
    more = dict(more)
    words = more.pop("text", ...)
    if words is None:
        text.unlink()
    elif words is not ...:
        text.write_text(words, "utf-8")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(WeftError) as refused:
        run(plan(tmp_path / "model", tmp_path / "made", text, **more), Report())
    assert refused.value.kind is kind and said in f"{refused.value.message} {refused.value.hint}"
    assert sorted(tmp_path.iterdir()) == before


def test_an_unknown_architecture_is_refused_in_words(tmp_path: Path, library: None, text: Path, seed: int) -> None:
    tiny_models.make(tmp_path / "model", "mamba", seed=seed)
    with pytest.raises(WeftError, match="does not know the architecture mamba") as refused:
        run(plan(tmp_path / "model", tmp_path / "made", text), Report())
    assert refused.value.kind is ErrorKind.UNSUPPORTED


@pytest.mark.parametrize(
    "more",
    [
        {"method": "awq", "bits": 3},
        {"bits": 5},
        {"group_size": 48},
        {"method": "rtn"},
        {"samples": 0},
        {"method": "awq", "desc_act": True},
    ],
    ids=str,
)
def test_numbers_that_there_are_not_are_refused(tmp_path: Path, text: Path, more: dict) -> None:
    with pytest.raises(WeftError) as refused:
        run(plan(tmp_path / "none", tmp_path / "made", text, **more), Report())
    assert refused.value.kind is ErrorKind.BAD_INPUT and refused.value.hint
