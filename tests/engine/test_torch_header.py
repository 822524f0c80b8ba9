"""Tensors of torch checkpoints found without torch: the same names, shapes and bytes as torch itself loads."""

from __future__ import annotations

import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import save_file

from app.core.adapter_content import content_of
from app.core.adapter_file import read_adapter_file
from app.core.errors import ErrorKind, WeftError
from app.core.torch_header import read_torch_header

DTYPES = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I64": "<i8", "U8": "u1"}


@pytest.fixture
def seed(seed: int) -> int:
    torch.manual_seed(seed)
    return seed


def read(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    found: dict[str, Any] = {}
    for tensor in read_torch_header(path):
        raw = data[tensor.offset : tensor.offset + tensor.bytes]
        if tensor.dtype == "BF16":
            found[tensor.name] = torch.frombuffer(bytearray(raw), dtype=torch.bfloat16).reshape(tensor.shape)
        else:
            array = numpy.frombuffer(raw, DTYPES[tensor.dtype]).copy()
            found[tensor.name] = torch.from_numpy(array).reshape(tensor.shape)
    return found


def test_every_tensor_is_where_torch_finds_it(tmp_path: Path, seed: int) -> None:
    big = torch.randn(10, 6)
    module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))
    tensors: dict[str, Any] = OrderedDict(
        {f"layer.{i}.lora_A.weight": torch.randn(random.Random(seed + i).randrange(1, 9), 7) for i in range(300)}
    )
    tensors |= {
        "half": torch.randn(4, 3).half(),
        "bf16": torch.randn(4, 3).bfloat16(),
        "double": torch.randn(2).double(),
        "long": torch.arange(5),
        "byte": torch.arange(5, dtype=torch.uint8),
        "number": torch.tensor(3.5),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "rows of a larger one": big[3:7],
        "the same storage": big,
        "twice": big,
        "ünï": torch.randn(1, 4),
        **{f"module.{k}": v for k, v in module.state_dict().items()},
    }
    for name, content in (("dict", dict(tensors)), ("state", module.state_dict()), ("ordered", tensors)):
        path = tmp_path / f"{name}.bin"
        torch.save(content, path)
        found = read(path)
        assert list(found) == list(content)
        assert all(torch.equal(found[key], value) for key, value in content.items())


def test_the_same_tensors_are_the_same_adapter_in_either_format(tmp_path: Path, seed: int) -> None:
    tensors = {f"m.layers.0.q_proj.lora_{s}.weight": torch.randn(shape) for s, shape in (("A", (2, 5)), ("B", (7, 2)))}
    torch.save(tensors, tmp_path / "x.bin")
    save_file(tensors, tmp_path / "y.safetensors")
    first, second = (content_of(read_adapter_file(tmp_path / name, 4.0)) for name in ("x.bin", "y.safetensors"))
    assert first == second
    save_file({name: tensor + 1e-6 for name, tensor in tensors.items()}, tmp_path / "z.safetensors")
    assert not content_of(read_adapter_file(tmp_path / "z.safetensors", 4.0)).same(first)


@pytest.mark.parametrize(
    "content",
    [
        lambda: [torch.randn(2)],
        lambda: torch.randn(2),
        dict,
        lambda: {"a": torch.randn(2), "epoch": 3},
        lambda: {"state": {"a": torch.randn(2)}},
        lambda: {"turned": torch.randn(3, 4).T},
        lambda: {"spread": torch.randn(1).expand(4, 4)},
        lambda: {"sparse": torch.eye(3).to_sparse()},
    ],
)
def test_what_is_no_plain_dictionary_is_left_to_torch(tmp_path: Path, content: Any, seed: int) -> None:
    torch.save(content(), tmp_path / "x.pt")
    with pytest.raises(WeftError) as refused:
        read_torch_header(tmp_path / "x.pt")
    assert refused.value.kind is ErrorKind.UNSUPPORTED and refused.value.hint


def test_the_old_format_is_left_to_torch(tmp_path: Path) -> None:
    torch.save({"a": torch.randn(2)}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(WeftError, match="before 1.6"):
        read_torch_header(tmp_path / "x.pt")


@pytest.mark.attack
def test_changed_bytes_end_in_words_or_in_tensors_inside_the_file(tmp_path: Path, seed: int) -> None:
    torch.save({f"m.{i}.lora_A.weight": torch.randn(3, 4) for i in range(6)}, tmp_path / "good.bin")
    good = (tmp_path / "good.bin").read_bytes()
    numbers = random.Random(seed)
    path = tmp_path / "bad.bin"
    refused = 0
    for _ in range(400):
        bad = bytearray(good)
        for _ in range(numbers.randrange(1, 4)):
            bad[numbers.randrange(len(bad))] = numbers.randrange(256)
        path.write_bytes(bad if numbers.random() < 0.8 else bad[: numbers.randrange(len(bad))])
        size = path.stat().st_size
        try:
            found = read_torch_header(path)
        except WeftError as error:
            refused += 1
            assert error.hint
        else:
            assert all(t.offset >= 0 and t.offset + t.bytes <= size for t in found)
    assert refused > 40
