"""GPTQ and AWQ folders: calibrated on a text, they answer like the 16-bit model, and better than plain rounding."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing

from app.adapters.merge_staging import Staging
from app.adapters.quantized_folder import LayerFiles
from app.core.certify_plan import Certificate, CertifyPlan, CertifySide
from app.core.errors import ErrorKind, WeftError
from app.core.merge_plan import MergePlan
from app.core.quantize_plan import CALIBRATION_TEXT, QuantizePlan, QuantizeResult, packed_like
from app.core.recognise import recognise_model
from app.core.stack import AdapterStack, StackedAdapter
from app.engine import protocol
from app.engine.client import EngineClient, EngineExit
from app.tasks.certify import run as certify
from app.tasks.merge import run as merge
from app.tasks.quantize import _Run, run
from tests.engine import tiny_models
from tests.engine.adapter_kit import merged, random_adapter
from tests.engine.backend_kit import FakeReport
from tests.engine.merge_kit import Report

RESOURCES = Path(__file__).resolve().parents[2] / "resources"
GROUP = 32
NOTHING = AdapterStack()
LENGTH = 96


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
        "dtype": torch.bfloat16,
        **changes,
    }
    return tiny_models.make(folder, "llama", seed=seed, **settings)


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


def unpacked(folder: Path) -> Any:
    """What the packed numbers stand for, as a plain model in float32."""
    target = folder.with_name(f"{folder.name}-unpacked")
    merge(MergePlan(model=str(folder), stack=NOTHING, target=str(target), packed="16bit", dtype="float32"), Report())
    model = load(target)
    shutil.rmtree(target)
    return model


# KL in nats that models of these sizes stay well under; the model against a random one is above 1.
@pytest.mark.parametrize(
    ("method", "bits", "bound", "more"),
    [
        ("gptq", 4, 0.2, {}),
        ("gptq", 8, 0.005, {}),
        ("gptq", 3, 0.6, {}),
        ("gptq", 2, 1.2, {}),
        ("gptq", 4, 0.2, {"desc_act": True}),
        ("awq", 4, 0.2, {}),
        ("hqq", 4, 0.3, {}),
        ("hqq", 3, 0.9, {}),
    ],
    ids=["gptq4", "gptq8", "gptq3", "gptq2", "gptq4 desc_act", "awq4", "hqq4", "hqq3"],
)
def test_a_quantized_model_answers_like_the_16_bit_one(
    tmp_path: Path, text: Path, seed: int, method: str, bits: int, bound: float, more: dict[str, Any]
) -> None:
    make(tmp_path / "model", seed)
    report = Report()
    made = run(plan(tmp_path / "model", tmp_path / "made", text, method=method, bits=bits, **more), report)
    assert isinstance(made, QuantizeResult) and made.matrices == 14
    assert (made.samples, made.tokens) == ((0, 0) if method == "hqq" else (48, 48 * LENGTH))
    assert ("Quantizing by " + method.upper()) in {phase for phase, *_ in report.phases}
    check_folder(tmp_path, method, bits)
    assert any("differ from 16 bits by" in note for note in made.notes), made.notes
    ids = tokens(tmp_path / "model", text)
    wanted = log_probabilities(load(tmp_path / "model"), ids)
    found = divergence(wanted, log_probabilities(unpacked(tmp_path / "made"), ids))
    plain = divergence(wanted, log_probabilities(rounded(load(tmp_path / "model"), bits), ids))
    print(f"{method} {bits} bits: KL {found:.5f}, rounded to nearest {plain:.5f}")
    told = certificate(tmp_path, text)
    assert told.top1_agreement < 1 or told.mean_kl > 0, "something was compared"
    assert told.mean_kl < 2 * bound and (tmp_path / "made" / "certificate.json").is_file()
    assert 0 < found < bound and (found < 0.9 * plain or method == "hqq")


def certificate(tmp_path: Path, text: Path, stack: AdapterStack = NOTHING) -> Certificate:
    """Of what was made against the 16-bit model, as the dialog has it made: through Weft's own reading of the packed weights."""
    made = str(tmp_path / "made")
    side = CertifySide(model=str(tmp_path / "model"), stack=stack)
    return certify(CertifyPlan(a=side, b=CertifySide(model=made), text=str(text), tokens=300, store=made), FakeReport())


def check_folder(tmp_path: Path, method: str, bits: int) -> None:
    folder = tmp_path / "made"
    config = json.loads((folder / "config.json").read_text("utf-8"))
    entry = recognise_model(folder)
    assert entry is not None and not entry.problem, entry
    assert entry.format.value == method and packed_like(entry.quantization) == (bits, GROUP)
    original = json.loads((tmp_path / "model" / "config.json").read_text("utf-8"))
    assert config.get("pad_token_id") == original.get("pad_token_id")
    assert (folder / "tokenizer.json").read_bytes() == (tmp_path / "model" / "tokenizer.json").read_bytes()
    for file in folder.iterdir():
        if file.suffix in (".json", ".md"):
            assert str(tmp_path.parent) not in file.read_text("utf-8") and "/tmp" not in file.read_text("utf-8"), file
    assert "quantized to" in (folder / "README.md").read_text("utf-8")
    assert not list(tmp_path.glob(".weft-*"))


@pytest.mark.parametrize("method", ["gptq", "awq", "hqq"])
def test_a_float16_model_stays_float16_and_the_text_is_cut_to_what_it_reads(
    tmp_path: Path, text: Path, seed: int, method: str
) -> None:
    make(tmp_path / "model", seed, num_hidden_layers=1, max_position_embeddings=64, dtype=torch.float16)
    (before,) = (tmp_path / "model").glob("*.safetensors")
    wanted = plan(tmp_path / "model", tmp_path / "made", text, method=method, length=100_000, samples=8)
    made = run(wanted, Report())
    assert json.loads((tmp_path / "made" / "config.json").read_text("utf-8"))["dtype"] == "float16"
    found = {n: t for path in (tmp_path / "made").glob("*.safetensors") for n, t in load_file(path).items()}
    assert {tensor.dtype for tensor in found.values() if tensor.is_floating_point()} == {torch.float16}
    for name, tensor in load_file(before).items():
        if "layers" not in name:
            assert torch.equal(tensor, found[name]), name
    if method != "hqq":
        assert made.tokens == 8 * 64 and any("Pieces of 64 tokens, not 100,000" in note for note in made.notes)
        assert not any("a longer text" in note for note in made.notes), "the number of pieces was the limit"


def test_adapters_are_merged_in_before(tmp_path: Path, text: Path, seed: int) -> None:
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
    found = log_probabilities(unpacked(tmp_path / "made"), ids)
    assert divergence(wanted, found) < 0.05 * divergence(wanted, plain)
    told = certificate(tmp_path, text, stack)
    print(f"certificate: KL {told.mean_kl:.2e}")
    assert told.mean_kl < 0.05 * divergence(wanted, plain)
    assert "lora 0.7" in (tmp_path / "made" / "README.md").read_text("utf-8")


def test_a_packed_base_is_unpacked_merged_into_and_packed_again(tmp_path: Path, text: Path, seed: int) -> None:
    make(tmp_path / "plain", seed)
    run(plan(tmp_path / "plain", tmp_path / "model", text, bits=8), Report())
    unpacked = tmp_path / "unpacked"
    merge(MergePlan(model=str(tmp_path / "model"), stack=NOTHING, target=str(unpacked), packed="16bit"), Report())
    base = load(unpacked)
    lora = random_adapter(tmp_path / "lora", "llama", base, seed, r=8)
    stack = AdapterStack(adapters=(StackedAdapter(path=str(lora), weight=0.7),))
    made = run(plan(tmp_path / "model", tmp_path / "made", text, bits=8, stack=stack), Report())
    (said,) = [note for note in made.notes if "differ from what was unpacked by" in note]
    assert "what the adapters changed" in said, "the loss is put beside what it is a loss of"
    assert any("packed by GPTQ" in note for note in made.notes)
    plain = divergence(log_probabilities(merged(base, [(lora, 0.7)]), tokens(unpacked, text)), log_probabilities(base, tokens(unpacked, text)))  # fmt: skip
    told = certificate(tmp_path, text, stack)  # against the packed base with the live adapter
    print(f"{said}\ncertificate: KL {told.mean_kl:.2e}, of the adapter {plain:.2e}")
    assert told.mean_kl < 0.1 * plain


@pytest.mark.parametrize("method", ["gptq", "awq", "hqq"])
def test_a_killed_run_goes_on_from_its_last_whole_layer_to_the_same_bytes(
    tmp_path: Path, text: Path, seed: int, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "model", seed, num_hidden_layers=4)
    run(plan(tmp_path / "model", tmp_path / "whole", text, method=method), Report())
    wanted = plan(tmp_path / "model", tmp_path / "made", text, method=method)
    written: list[int] = []

    class Dying(LayerFiles):
        def write(self, model: Any, layer: int, made: Any) -> None:
            if len(written) == 3:
                raise ZeroDivisionError
            super().write(model, layer, made)
            written.append(layer)

    with monkeypatch.context() as patched:  # a death in the middle: nothing is cleared away
        patched.setattr(Staging, "discard", lambda _: None)
        patched.setattr("app.adapters.quantized_folder.LayerFiles", Dying)
        with pytest.raises(ZeroDivisionError):
            run(wanted, Report())
    (staging,) = tmp_path.glob(".weft-*")
    assert written == [0, 1, 2] and not (tmp_path / "made").exists()
    (staging / "layers" / "3.part").write_bytes(b"half")
    (staging / "layers" / "2.safetensors").write_bytes(b"damaged")
    written.clear()
    with monkeypatch.context() as patched:
        patched.setattr("app.adapters.quantized_folder.LayerFiles", Dying)
        made = run(wanted, Report())
    assert written == [2, 3], "the first two were not made anew"
    assert any("Layers that an earlier run" in note for note in made.notes)
    assert weights_of(tmp_path / "made") == weights_of(tmp_path / "whole")
    assert not list(tmp_path.glob(".weft-*"))


def changed(model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change a model's tensors."""
    (file,) = model.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_what_is_not_quantized_keeps_its_bytes(tmp_path: Path, text: Path, seed: int) -> None:
    """A router's bias, say, is in 32 bits where all else has 16."""
    make(tmp_path / "model", seed)
    norm = "model.layers.1.post_attention_layernorm.weight"
    changed(tmp_path / "model", lambda tensors: tensors.update({norm: tensors[norm].float() + 1e-6}))
    run(plan(tmp_path / "model", tmp_path / "made", text, method="gptq"), Report())
    before, made = weights_of(tmp_path / "model"), weights_of(tmp_path / "made")
    kept = [name for name in before if not name.endswith("_proj.weight")]
    assert (
        norm in kept and len(kept) == 7 and {name: made[name] for name in kept} == {name: before[name] for name in kept}
    )


def test_a_model_that_lacks_a_matrix_is_refused(tmp_path: Path, text: Path, seed: int) -> None:
    make(tmp_path / "model", seed)
    lost = "model.layers.1.mlp.up_proj.weight"
    changed(tmp_path / "model", lambda tensors: tensors.pop(lost))
    with pytest.raises(WeftError, match=lost) as refused:
        run(plan(tmp_path / "model", tmp_path / "made", text), Report())
    assert refused.value.kind is ErrorKind.CORRUPT and not (tmp_path / "made").exists()
    assert not list(tmp_path.glob(".weft-*"))


@pytest.mark.fault
def test_a_drive_that_fills_up_meanwhile_leaves_nothing_and_is_said(
    tmp_path: Path, text: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "model", seed)
    calls = itertools.count()

    def full(tensors: Any, path: Path, **more: Any) -> None:
        if next(calls):
            path.write_bytes(b"half")
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save_file(tensors, path, **more)

    monkeypatch.setattr("app.adapters.quantized_folder.save_file", full)
    with pytest.raises(WeftError) as refused:
        run(plan(tmp_path / "model", tmp_path / "made", text), Report())
    assert refused.value.kind is ErrorKind.DISK_FULL and refused.value.hint
    assert not (tmp_path / "made").exists() and not list(tmp_path.glob(".weft-*"))


def test_our_text_is_not_the_one_that_certificates_are_made_on() -> None:
    """A model that is measured on what it was calibrated on looks better than it is."""
    calibrated, measured = (
        (RESOURCES / name).read_text("utf-8") for name in (CALIBRATION_TEXT, "certificate_text.txt")
    )
    sentences = [part.strip() for part in measured.split(".") if len(part) > 30]
    assert len(sentences) > 20 and not [part for part in sentences if part in calibrated]
    assert len(calibrated) > 8 * len(measured)


def test_every_piece_begins_as_the_tokenizer_begins_a_text(
    tmp_path: Path, text: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "model", seed)
    real = transformers.AutoTokenizer.from_pretrained

    def beginning(*args: Any, **named: Any) -> Any:
        made = real(*args, **named)
        core = made.backend_tokenizer
        core.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", made.bos_token_id)])
        return made

    wanted = plan(tmp_path / "model", tmp_path / "made", text)
    plain = _Run(wanted, Report())._pieces(tmp_path / "model")  # type: ignore[arg-type]
    assert {piece[0] for piece in plain} != {0}
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", beginning)
    pieces = _Run(wanted, Report())._pieces(tmp_path / "model")  # type: ignore[arg-type]
    assert {piece[0] for piece in pieces} == {0} and {len(piece) for piece in pieces} == {LENGTH}
    assert pieces[0][1:] == plain[0][:-1]


def test_a_cancel_leaves_nothing(tmp_path: Path, text: Path, seed: int) -> None:
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


class Child:
    """A child that quantizes, and can be killed."""

    def __init__(self, folder: Path) -> None:
        self.client = EngineClient(python=Path(sys.executable), backend="", log_path=folder.parent / "child.log")
        self.client.start()

    def run(self, plan: QuantizePlan, dies: Callable[[protocol.ProgressEvent], bool]) -> QuantizeResult | None:
        """Quantize; None when it was killed on the way."""
        command = self.client.send(protocol.RunTask(task="quantize", parameters=msgspec.json.encode(plan).decode()))
        while True:
            event = self.client.next_event()
            assert not isinstance(event, EngineExit | protocol.Failed), event
            if isinstance(event, protocol.ProgressEvent) and dies(event):
                os.kill(self.client.pid, signal.SIGKILL)
                self.client.shutdown()
                return None
            if isinstance(event, protocol.Done) and event.id == command:
                assert isinstance(event.result, protocol.TaskResult)
                self.client.shutdown()
                return msgspec.json.decode(event.result.json, type=QuantizeResult)


def weights_of(folder: Path) -> dict[str, bytes]:
    """Of all tensors the bytes, by name: a file that was gone on with has them in another order."""
    found = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    return {name: bytes(tensor.reshape(-1).contiguous().view(torch.uint8).numpy()) for name, tensor in found.items()}


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_killed_at_random_points_it_leaves_nothing_half_and_goes_on(
    tmp_path: Path, text: Path, seed: int, method: str
) -> None:
    """Merging, reading, each layer, writing: what has the final name is whole, and what was done is used."""
    make(tmp_path / "model", seed, num_hidden_layers=6)
    lora = random_adapter(tmp_path / "lora", "llama", load(tmp_path / "model"), seed, r=8)
    stack = AdapterStack(adapters=(StackedAdapter(path=str(lora), weight=0.7),))
    plans = [plan(tmp_path / "model", tmp_path / name, text, method=method, stack=stack) for name in ("whole", "made")]
    seen: list[protocol.ProgressEvent] = []
    assert Child(tmp_path).run(plans[0], lambda event: bool(seen.append(event)))
    whole, chance = weights_of(tmp_path / "whole"), random.Random(seed)
    quantizing = [event for event in seen if event.phase.startswith("Quantizing")]
    assert all(a.done <= b.done for a, b in itertools.pairwise(quantizing)) and quantizing[-1].unit == "bytes"
    for number in range(25):
        later = number % 2  # every other one in the middle of the layers
        after = chance.uniform(0.4, 0.9) if later else chance.randrange(len(seen))
        count = itertools.count()
        made = Child(tmp_path).run(
            plans[1],
            lambda event, later=later, after=after, count=count: (
                event.phase.startswith("Quantizing") and event.done > after * event.total
                if later
                else next(count) >= after
            ),
        )
        if made is not None or (tmp_path / "made").exists():
            assert weights_of(tmp_path / "made") == whole, f"kill {number}"
            shutil.rmtree(tmp_path / "made")
    made = Child(tmp_path).run(plans[1], lambda _: False)
    assert made is not None and weights_of(tmp_path / "made") == whole
    assert any("Layers that an earlier run" in note for note in made.notes), made.notes
    assert not list(tmp_path.glob(".weft-*"))


@pytest.mark.parametrize(
    ("changes", "more", "kind", "said"),
    [
        ({"intermediate_size": 224}, {"group_size": 64}, ErrorKind.BAD_INPUT, "group size of 32"),
        ({"intermediate_size": 200}, {"group_size": 32}, ErrorKind.UNSUPPORTED, "weft export"),
        ({"num_key_value_heads": 1, "num_attention_heads": 8}, {}, ErrorKind.UNSUPPORTED, "packs them by 32"),
        ({}, {"length": 16, "text": "too short"}, ErrorKind.BAD_INPUT, "too short"),
        ({}, {"text": None}, ErrorKind.NOT_FOUND, "There is no text"),
        ({}, {"text": "\0\1\2" * 9999}, ErrorKind.BAD_INPUT, "is no text in UTF-8"),
    ],
    ids=["group", "odd inputs", "odd outputs", "short text", "no text", "a program"],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    tmp_path: Path, text: Path, seed: int, changes: dict, more: dict, kind: ErrorKind, said: str
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


@pytest.mark.fault
@pytest.mark.parametrize("merged_first", [False, True], ids=["as it is", "with an adapter"])
def test_too_little_disk_is_refused_before_anything_is_written(
    tmp_path: Path, text: Path, seed: int, merged_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "model", seed)
    stack = NOTHING
    if merged_first:
        lora = random_adapter(tmp_path / "lora", "llama", load(tmp_path / "model"), seed, r=8)
        stack = AdapterStack(adapters=(StackedAdapter(path=str(lora)),))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))  # type: ignore[attr-defined]
    for step in ("_merge", "_quantize"):
        monkeypatch.setattr(f"app.tasks.quantize._Run.{step}", lambda *_: 1 / 0)  # refused before that
    with pytest.raises(WeftError) as refused:
        run(plan(tmp_path / "model", tmp_path / "made", text, stack=stack), Report())
    assert refused.value.kind is ErrorKind.DISK_FULL
    assert "are kept free" in refused.value.message and f"drive of {tmp_path}" in refused.value.message
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "made").exists() and not list(tmp_path.glob(".weft-*"))


def test_an_unknown_architecture_is_refused_in_words(tmp_path: Path, text: Path, seed: int) -> None:
    make(tmp_path / "model", seed)
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**config, "model_type": "spinning_jenny"}), "utf-8")
    with pytest.raises(WeftError, match="cannot build this model") as refused:
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
        {"method": "hqq", "bits": 6},
    ],
    ids=str,
)
def test_numbers_that_there_are_not_are_refused(tmp_path: Path, text: Path, more: dict) -> None:
    with pytest.raises(WeftError) as refused:
        run(plan(tmp_path / "none", tmp_path / "made", text, **more), Report())
    assert refused.value.kind is ErrorKind.BAD_INPUT and refused.value.hint
