"""The task that converts adapters for one model, there and back, and what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from app.core.adapter_plans import ConvertPlan
from app.core.errors import ErrorKind, WeftError
from app.core.formats import read_gguf_header
from app.core.recognise import recognise_adapter
from app.tasks import adapter_convert
from tests.engine.backend_kit import FakeReport

STARTER = Path(__file__).resolve().parents[2] / "resources" / "starter"
VOICE = STARTER / "voice-adapter"
GGUF = STARTER / "weft-starter-f16.gguf"


def convert(adapter: Path, model: Path, target: Path, alpha: float | None = None):
    return adapter_convert.run(
        ConvertPlan(adapter=str(adapter), model=str(model), target=str(target), alpha=alpha), FakeReport()
    )


def test_the_starter_s_voice_goes_there_and_back_to_the_bit(tmp_path: Path) -> None:
    there = convert(VOICE, GGUF, tmp_path / "voice.gguf")
    assert there.notes == () and there.bytes == (tmp_path / "voice.gguf").stat().st_size
    entry = recognise_adapter(tmp_path / "voice.gguf")
    assert entry is not None and not entry.problem and (entry.rank, entry.alpha) == (8, 16.0)
    back = convert(tmp_path / "voice.gguf", STARTER / "model", tmp_path / "back")
    assert back.notes == ()
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (VOICE, tmp_path / "back"))
    assert set(before) == set(after)
    assert all(torch.equal(tensor.float(), after[name].float()) for name, tensor in before.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "voice.gguf"]


def test_alpha_can_be_given_for_a_lone_file(tmp_path: Path) -> None:
    lone = tmp_path / "lone.safetensors"
    shutil.copy(VOICE / "adapter_model.safetensors", lone)
    with pytest.raises(WeftError, match="does not say its alpha"):
        convert(lone, GGUF, tmp_path / "x.gguf")
    convert(lone, GGUF, tmp_path / "x.gguf", alpha=4.0)
    assert read_gguf_header(tmp_path / "x.gguf").metadata["adapter.lora.alpha"] == 4.0


@pytest.mark.parametrize(
    ("adapter", "model", "target", "kind"),
    [
        (VOICE, STARTER / "model", "x.gguf", ErrorKind.BAD_INPUT),
        (VOICE, GGUF, "folder", ErrorKind.BAD_INPUT),
        (VOICE, GGUF, "taken.gguf", ErrorKind.BAD_INPUT),
        (VOICE, Path("/nowhere"), "x.gguf", ErrorKind.NOT_FOUND),
        (Path("/nowhere"), GGUF, "x.gguf", ErrorKind.NOT_FOUND),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    tmp_path: Path, adapter: Path, model: Path, target: str, kind: ErrorKind
) -> None:
    (tmp_path / "taken.gguf").write_bytes(b"mine")
    with pytest.raises(WeftError) as refused:
        convert(adapter, model, tmp_path / target)
    assert refused.value.kind is kind and refused.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["taken.gguf"] and (tmp_path / "taken.gguf").read_bytes() == b"mine"
