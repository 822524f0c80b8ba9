"""The task that converts adapters: there and back to the bit, the same from either form of the base, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from app.core.adapter_file import read_adapter_file
from app.core.convert_plan import Converted, ConvertPlan
from app.core.errors import ErrorKind, WeftError
from app.core.library import ModelEntry
from app.core.recognise import recognise_adapter, recognise_model
from app.tasks import convert_adapter
from tests.engine.adapter_kit import FAMILIES, random_adapter, random_model
from tests.engine.backend_kit import FakeReport

STARTER = Path(__file__).resolve().parents[2] / "resources" / "starter"
VOICE = STARTER / "voice-adapter"
GGUF = STARTER / "weft-starter-f16.gguf"


def entry(path: Path) -> ModelEntry:
    found = recognise_model(path)
    assert found is not None
    return found


def convert(adapter: Path, model: ModelEntry, target: Path) -> Converted:
    return convert_adapter.run(ConvertPlan(adapter=str(adapter), model=model, to=str(target)), FakeReport())


def same(one: Path, other: Path) -> None:
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    before = {name: tensor for name, tensor in before.items() if ".base_layer." not in name}
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert torch.equal(tensor.float(), after[name].float()), name
    scales = [
        {n: [lora.scale for lora in m.loras] for n, m in read_adapter_file(f).modules.items() if m.loras}
        for f in (one, other)
    ]
    assert scales[0] == scales[1]


def test_the_starters_voice_goes_there_and_back_and_either_base_gives_the_same_file(tmp_path: Path) -> None:
    there = convert(VOICE, entry(GGUF), tmp_path / "voice.gguf")
    assert there.notes == [] and there.bytes == (tmp_path / "voice.gguf").stat().st_size
    found = recognise_adapter(tmp_path / "voice.gguf")
    assert found is not None and not found.problem and (found.rank, found.alpha) == (8, 16.0)
    convert(VOICE, entry(STARTER / "model"), tmp_path / "other.gguf")
    assert (tmp_path / "voice.gguf").read_bytes() == (tmp_path / "other.gguf").read_bytes()
    convert(tmp_path / "voice.gguf", entry(STARTER / "model"), tmp_path / "back")
    same(VOICE, tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "other.gguf", "voice.gguf"]


@pytest.mark.parametrize("family", ["bloom", "gemma", "gpt2", "llama", "mistral", "phi", "phi3", "qwen2", "qwen3"])
def test_folders_of_safetensors_are_base_enough(tmp_path: Path, family: str, seed: int) -> None:
    model = random_model(family, seed)
    model.save_pretrained(tmp_path / "model")
    folder = random_adapter(tmp_path / "peft", family, model, seed, rank_pattern={FAMILIES[family][2][0]: 2})
    base = entry(tmp_path / "model")
    assert convert(folder, base, tmp_path / "made.gguf").notes == []
    assert convert(tmp_path / "made.gguf", base, tmp_path / "back").notes == []
    same(folder, tmp_path / "back")


@pytest.mark.fault
def test_what_cannot_be_is_refused_and_nothing_is_left_behind(tmp_path: Path, seed: int) -> None:
    model = random_model("llama", seed)
    misfit = random_adapter(tmp_path / "misfit", "llama", model, seed)
    dora = random_adapter(tmp_path / "dora", "llama", model, seed, use_dora=True)
    taken = tmp_path / "taken.gguf"
    taken.write_bytes(b"mine")
    gguf = entry(GGUF)
    made = tmp_path / "voice.gguf"
    convert(VOICE, gguf, made)
    there = sorted(path.name for path in tmp_path.iterdir())
    for adapter, base, target, kind in (
        (VOICE, gguf, taken, ErrorKind.BAD_INPUT),
        (misfit, gguf, tmp_path / "x.gguf", ErrorKind.UNSUPPORTED),
        (dora, gguf, tmp_path / "x.gguf", ErrorKind.UNSUPPORTED),
        (made, gguf, tmp_path / "x", ErrorKind.UNSUPPORTED),
        (tmp_path / "nowhere", gguf, tmp_path / "x.gguf", ErrorKind.NOT_FOUND),
    ):
        with pytest.raises(WeftError) as refused:
            convert(adapter, base, target)
        assert refused.value.kind is kind and refused.value.hint, adapter
        assert sorted(path.name for path in tmp_path.iterdir()) == there
    assert taken.read_bytes() == b"mine"
