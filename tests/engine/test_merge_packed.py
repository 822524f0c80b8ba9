"""Bases packed by bitsandbytes: merged into 16 bits, or packed again with the loss said."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from app.adapters.merge_bnb_torch import UnpackedFiles
from app.core.errors import ErrorKind, WeftError
from app.tasks import merge as task
from tests.engine.adapter_kit import differences, logits, tokens
from tests.engine.merge_kit import Report, load, make_adapter, make_base, plan, saved

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
    "nf4 double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


def packed_base(tmp_path: Path, kind: str, seed: int) -> tuple[Path, Any]:
    plain = make_base(tmp_path / "plain", "llama", seed, "bfloat16", hidden_size=64, intermediate_size=128)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "plain",
            dtype=torch.bfloat16,
            device_map="cpu",
            quantization_config=transformers.BitsAndBytesConfig(**KINDS[kind]),
        )
        model.save_pretrained(tmp_path / "packed")
    return tmp_path / "packed", plain


def unpacked(folder: Path) -> dict[str, torch.Tensor]:
    """All matrices of a packed folder."""
    found: dict[str, torch.Tensor] = {}
    with UnpackedFiles(sorted(folder.glob("*.safetensors")), "bfloat16") as files:
        for name, tensor in files.tensors.items():
            data = bytearray(tensor.bytes)
            files.read(tensor, 0, memoryview(data))
            dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[tensor.dtype]
            found[name] = torch.frombuffer(data, dtype=dtype).reshape(tensor.shape)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_base_in_16_bits_and_packed_again(tmp_path: Path, kind: str, seed: int) -> None:
    base, plain = packed_base(tmp_path, kind, seed)
    adapter = make_adapter(tmp_path / "a", "llama", plain, seed, target_modules=["q_proj", "down_proj"])
    before = unpacked(base)
    done = task.run(plan(base, [(adapter, 0.7)], tmp_path / "wide", packed="16bit"), Report())
    wide = saved(tmp_path / "wide")
    merged = load(tmp_path / "wide", "bfloat16")
    assert not hasattr(merged.config, "quantization_config")
    expected = differences(plain, adapter)
    for name, tensor in before.items():
        d = 0.7 * expected[name] if name in expected else torch.zeros(())
        assert torch.equal(wide[name], (tensor.float() + d.float()).to(tensor.dtype)) or (
            (wide[name].double() - tensor.double() - d).abs().max() < 0.01
        )
        if name not in expected:
            assert torch.equal(wide[name], tensor)
    assert any("lost" in note for note in done.notes)

    again = task.run(plan(base, [(adapter, 0.7)], tmp_path / "again", packed="again"), Report())
    after = unpacked(tmp_path / "again")
    note = next(note for note in again.notes if note.startswith("Packed again"))
    told = float(re.findall(r"([\d.]+)% of their size", note)[0]) / 100
    errors = []
    for name, tensor in wide.items():
        if name in expected:
            errors.append(float((after[name].float() - tensor.float()).norm() / tensor.float().norm()))
        else:
            assert torch.equal(after[name], before[name])
    assert abs(sum(errors) / len(errors) - told) < 0.002
    limit = 0.02 if kind == "int8" else 0.2
    assert 0 < max(errors) < limit
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", device_map="cpu").eval()
    ids = tokens(seed)
    assert torch.isfinite(logits(loaded, ids)).all()
    assert {k: v.shape for k, v in saved(base).items() if "quant_state" not in k} == {
        k: v.shape for k, v in saved(tmp_path / "again").items() if "quant_state" not in k
    }


def test_packed_bases_are_refused_unless_asked_for_and_damaged_ones_always(tmp_path: Path, seed: int) -> None:
    base, plain = packed_base(tmp_path, "nf4", seed)
    adapter = make_adapter(tmp_path / "a", "llama", plain, seed)
    with pytest.raises(WeftError) as caught:
        task.run(plan(base, [(adapter, 1.0)], tmp_path / "out"), Report())
    assert caught.value.kind is ErrorKind.UNSUPPORTED
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    file = next(broken.glob("*.safetensors"))
    tensors = load_file(file)
    name = next(name for name in tensors if ".quant_state." in name)
    state = json.loads(bytes(tensors[name].tolist()))
    for change in ({"shape": [1 << 30, 1 << 30]}, {"blocksize": 7}, {"shape": None}, {"quant_type": "x"}):
        data = json.dumps({**state, **change}).encode()
        save_file({**tensors, name: torch.tensor(list(data), dtype=torch.uint8)}, file, metadata={"format": "pt"})
        with pytest.raises(WeftError) as caught:
            task.run(plan(broken, [(adapter, 1.0)], tmp_path / "out", packed="again"), Report())
        assert caught.value.kind is ErrorKind.CORRUPT
    assert not (tmp_path / "out").exists()
