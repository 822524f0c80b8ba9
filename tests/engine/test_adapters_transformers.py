"""Adapter stacks through the Transformers loader: answers as of the merged model, the cache kept when it may be, bad adapters refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from app.backends.transformers import Backend
from app.core.errors import ErrorKind, WeftError
from app.core.library import ModelEntry
from app.core.stack import AdapterStack, StackedAdapter
from app.engine.protocol import Load
from tests import seeds
from tests.engine import tiny_models
from tests.engine.adapter_kit import differences, random_adapter, rms
from tests.engine.backend_kit import FakeReport, ask, ask_surely, assistant, loaded, user


def stack(*pairs: tuple[Path, float]) -> AdapterStack:
    return AdapterStack(adapters=tuple(StackedAdapter(path=str(path), weight=weight) for path, weight in pairs))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelEntry, list[Path], Path]:
    """A model folder, three adapters for it, and the root."""
    root = tmp_path_factory.mktemp("stack")
    seed = seeds.of(__name__)
    print("seed", seed)
    entry = tiny_models.make(root / "model", "llama", seed=seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(entry.path)
    kinds: list[dict[str, Any]] = [
        {"r": 8},
        {"r": 4, "use_dora": True},
        {"r": 2, "modules_to_save": ["lm_head"], "use_rslora": True},
    ]
    return (
        entry,
        [random_adapter(root / f"adapter {i}", "llama", model, seed + i, **kind) for i, kind in enumerate(kinds)],
        root,
    )


def merge(entry: ModelEntry, folder: Path, pairs: list[tuple[Path, float]]) -> ModelEntry:
    """The same model with the stack in its weights."""
    import shutil

    shutil.copytree(entry.path, folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(entry.path)
    total: dict[str, torch.Tensor] = {}
    for path, weight in pairs:
        for name, d in differences(model, path).items():
            total[name] = total.get(name, 0) + weight * d
    state = load_file(folder / "model.safetensors")
    save_file(
        {k: (v.double() + total.get(k, 0)).float() for k, v in state.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    return tiny_models.entry(folder, model)


def test_a_conversation_with_switches_says_what_merged_models_say(made: Any, tmp_path: Path) -> None:
    entry, (first, second, third), _ = made
    turns = ["What is your name?", "And the weft?", "One more", "Now without", "Again"]
    stacks = [
        [(first, 0.7), (second, 1.0)],
        [(first, 0.7), (second, 1.0)],
        [(second, 0.5), (third, 1.2)],
        [],
        [(first, 0.0), (third, 1.2)],
    ]
    merged = {}
    with loaded(Backend(), entry) as (backend, _):
        messages: tuple[Any, ...] = ()
        for number, (turn, pairs) in enumerate(zip(turns, stacks, strict=True)):
            backend.set_adapters(stack(*pairs), FakeReport())
            messages = (*messages, user(turn))
            said = ask_surely(backend, messages, max_tokens=12)
            merged[number] = (messages, said, said.done.reused_tokens)
            messages = (*messages, assistant("Yes, over and under."))  # random models write bytes that are no text
    assert merged[1][2] > 0, "the same stack keeps what was read"
    assert merged[2][2] == merged[3][2] == merged[4][2] == 0, "another stack may not use it"
    for number, (asked, said, _) in merged.items():
        other = merge(entry, tmp_path / f"merged {number}", stacks[number])
        with loaded(Backend(), other) as (backend, _):
            assert said.same_as(ask(backend, asked, max_tokens=12)[0]), number


def test_a_model_can_be_loaded_with_its_stack_and_weight_zero_is_the_base(made: Any) -> None:
    entry, (first, second, _), _ = made
    backend, report = Backend(), FakeReport()
    with loaded(Backend(), entry) as (plain, _):
        base = ask_surely(plain, "The warp", max_tokens=24)
    backend.load(Load(model=entry, adapters=stack((first, 1.0), (second, 1.0))), report)
    try:
        on = ask(backend, "The warp", max_tokens=24)[0]
        backend.set_adapters(stack((first, 0.0), (second, 0.0)), report)
        off = ask(backend, "The warp", max_tokens=24)[0]
        backend.set_adapters(AdapterStack(), report)
        assert base.same_as(off) and base.same_as(ask(backend, "The warp", max_tokens=24)[0])
        assert on != base.text
    finally:
        backend.unload()


def test_half_a_weight_twice_is_the_whole(made: Any) -> None:
    entry, (first, _, _), _ = made
    with loaded(Backend(), entry) as (backend, _):
        backend.set_adapters(stack((first, 1.0)), FakeReport())
        whole = ask_surely(backend, "The warp", max_tokens=24)
        backend.set_adapters(stack((first, 0.5), (first, 0.5)), FakeReport())
        text, done = ask(backend, "The warp", max_tokens=24)
        assert whole.same_as(text) and done.reused_tokens > 0, "it is the same stack"


def test_a_refused_adapter_leaves_the_stack_as_it_was(made: Any, tmp_path: Path) -> None:
    entry, (first, _, _), _ = made
    other = tiny_models.make(tmp_path / "wide", "llama", hidden_size=128)
    stranger = random_adapter(
        tmp_path / "stranger", "llama", transformers.AutoModelForCausalLM.from_pretrained(other.path), 1
    )
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_bytes((first / "adapter_config.json").read_bytes())
    tensors = load_file(first / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, broken / "adapter_model.safetensors")
    with loaded(Backend(), entry) as (backend, _):
        backend.set_adapters(stack((first, 1.0)), FakeReport())
        before = ask_surely(backend, "The warp")
        for bad, kind, words in (
            (stranger, ErrorKind.UNSUPPORTED, "0 of its"),
            (broken, ErrorKind.CORRUPT, "no numbers"),
            (tmp_path / "nowhere", ErrorKind.NOT_FOUND, "no adapter"),
        ):
            with pytest.raises(WeftError) as refused:
                backend.set_adapters(stack((first, 0.2), (bad, 1.0)), FakeReport())
            assert refused.value.kind is kind and words in refused.value.message and refused.value.hint
            assert before.same_as(ask(backend, "The warp")[0])


@pytest.mark.attack
def test_a_pickle_that_runs_code_is_refused(made: Any, tmp_path: Path) -> None:
    import pickle

    entry, (first, _, _), _ = made

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((first / "adapter_config.json").read_bytes())
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Evil()))
    good = tmp_path / "good"
    good.mkdir()
    (good / "adapter_config.json").write_bytes((first / "adapter_config.json").read_bytes())
    torch.save(load_file(first / "adapter_model.safetensors"), good / "adapter_model.bin")
    with loaded(Backend(), entry) as (backend, _):
        with pytest.raises(WeftError) as refused:
            backend.set_adapters(stack((folder, 1.0)), FakeReport())
        assert refused.value.kind is ErrorKind.HOSTILE and not (tmp_path / "ran").exists()
        backend.set_adapters(stack((good, 1.0)), FakeReport())
        pickled = ask_surely(backend, "The warp")
        backend.set_adapters(stack((first, 1.0)), FakeReport())
        assert pickled.same_as(ask(backend, "The warp")[0])


def test_part_of_an_adapter_is_used_and_said(made: Any, tmp_path: Path) -> None:
    entry, (first, _, _), _ = made
    folder = tmp_path / "more"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((first / "adapter_config.json").read_bytes())
    tensors = load_file(first / "adapter_model.safetensors")
    a = next(t for n, t in tensors.items() if "lora_A" in n)
    tensors |= {
        f"base_model.model.model.layers.9.self_attn.q_proj.lora_{s}.weight": a.clone() if s == "A" else a.T.contiguous()
        for s in "AB"
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    report = FakeReport()
    with loaded(Backend(), entry) as (backend, _):
        backend.set_adapters(stack((folder, 1.0)), report)
    assert any("21 of 22 modules" in line for line in report.logs)


@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
def test_adapters_work_on_a_quantized_base(tmp_path: Path, bits: str) -> None:
    pytest.importorskip("bitsandbytes")
    seed = random.randrange(1 << 30)
    print("seed", seed)
    entry = tiny_models.make(tmp_path / "model", "llama", seed=seed, intermediate_size=128)  # 4-bit wants multiples of 64
    model = transformers.AutoModelForCausalLM.from_pretrained(entry.path)
    first = random_adapter(tmp_path / "first", "llama", model, seed, r=8)
    second = random_adapter(tmp_path / "second", "llama", model, seed + 1, use_dora=True)
    with loaded(Backend(), entry, **{bits: True}) as (backend, _):
        model = backend._model
        ids = torch.arange(5, 25)[None]

        def run() -> torch.Tensor:
            with torch.inference_mode():
                return model(input_ids=ids).logits.float()

        base = run()
        from app.adapters.base_torch import weight_of

        linears = {n: m for n, m in model.named_modules() if hasattr(m, "in_features")}
        plain = {n: weight_of(m).float().clone() for n, m in linears.items()}
        backend.set_adapters(stack((first, 0.5), (second, 1.0)), FakeReport())
        ours = run()
        backend.set_adapters(AdapterStack(), FakeReport())
        assert torch.equal(run(), base)
        # The reference: the unpacked weights, merged, in a plain model.
        reference = transformers.AutoModelForCausalLM.from_pretrained(entry.path, dtype=torch.float32)
        with torch.no_grad():
            for name, weight in plain.items():
                reference.get_submodule(name).weight.copy_(weight)
            quantized_base = reference(input_ids=ids).logits
            total: dict[str, torch.Tensor] = {}
            for path, weight in ((first, 0.5), (second, 1.0)):
                for name, d in differences(reference, path).items():
                    total[name] = total.get(name, 0) + weight * d
            for name, d in total.items():
                reference.get_parameter(name).add_(d.float())
            expected = reference(input_ids=ids).logits
        noise = rms(base - quantized_base)  # of the packed kernels themselves
        if bits == "load_in_8bit":  # they round activations too, which are larger under the adapters
            noise *= 3
        assert rms(ours - expected) < 3 * noise + 1e-4
        assert rms(ours - expected) < 0.25 * rms(expected - quantized_base)


def test_an_adapter_that_repeats_layers_comes_and_goes_between_two_answers(made: Any, tmp_path: Path) -> None:
    entry, (first, _, _), _ = made
    folder = tmp_path / "replicated"
    folder.mkdir()
    config = json.loads((first / "adapter_config.json").read_text()) | {"layer_replication": [[0, 2], [1, 2]]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes((first / "adapter_model.safetensors").read_bytes())
    question = (user("Say something, then something else."),)
    with loaded(Backend(), entry) as (backend, _):
        base = ask_surely(backend, question, max_tokens=12)
        backend.set_adapters(stack((folder, 1.0)), FakeReport())
        longer = ask(backend, question, max_tokens=12)[0]
        with pytest.raises(WeftError) as refused:
            backend.set_adapters(stack((folder, 1.0), (first, 1.0)), FakeReport())
        assert refused.value.kind is ErrorKind.UNSUPPORTED and "repeat different layers" in refused.value.message
        backend.set_adapters(stack((folder, 0.0)), FakeReport())
        again = ask(backend, question, max_tokens=12)[0]
    assert base.same_as(again) and base.text != longer
