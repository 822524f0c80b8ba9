"""Exports to a drive that is too small: refused beforehand, or ended when it becomes full, with nothing left and nothing lost."""

from __future__ import annotations

import errno
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from app.adapters.gguf_file_writer import _converted
from app.core.export_plan import TYPES
from tests.engine.full_drive import Outcome, Step
from tests.engine.test_export_gguf import SEED, base, plan

ROOT = Path(__file__).resolve().parents[2]
MARGIN = 64 * 1024 * 1024  # stays free


def in_a_child(steps: list[Step]) -> list[Outcome]:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.engine.full_drive"],
        cwd=ROOT,
        input=msgspec.json.encode(steps),
        capture_output=True,
        timeout=180,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr.decode()[-3000:]
    return msgspec.json.decode(ended.stdout.splitlines()[-1], type=list[Outcome])


@pytest.mark.fault
def test_a_drive_that_is_too_small_is_told_beforehand_and_a_full_one_costs_nothing(tmp_path: Path) -> None:
    base(tmp_path / "base", "llama", SEED, torch.float16, hidden_size=256, intermediate_size=512)
    before = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    weights = sum(tensor.numel() for tensor in load_file(tmp_path / "base" / "model.safetensors").values())
    half, small = 2 * weights, int(weights * TYPES["q4_k_m"].bits / 8)
    part = random.Random(SEED).uniform(0.1, 0.9)
    steps = [
        Step(plan(tmp_path, "f16", name="half"), free=half + MARGIN),  # just enough
        Step(plan(tmp_path, "f16"), free=half + MARGIN - 1),
        Step(plan(tmp_path, "f16"), full="model.gguf", limit=int(part * half)),
        Step(plan(tmp_path, "f16")),
        Step(plan(tmp_path, "q4_k_m", name="small")),
        Step(plan(tmp_path, "q4_k_m", name="again"), free=half + small + MARGIN - 1),
        Step(plan(tmp_path, "q4_k_m", name="again"), full="model.gguf", limit=int(part * small)),
        Step(plan(tmp_path, "q4_k_m", name="again")),
    ]
    found = in_a_child(steps)
    print([(each.kind, each.message) for each in found])
    assert [each.kind for each in found] == ["", *["disk_full"] * 2, "", "", *["disk_full"] * 2, ""]
    for refused in (found[1], found[5]):
        assert "(and 67.1 MB are kept free)" in refused.message and "are free" in refused.message
    for full in (found[2], found[6]):
        assert "became full" in full.message
    first, second = ["base", "half.gguf"], ["base", "half.gguf", "out.gguf", "small.gguf"]
    assert [each.left for each in found[:3]] == [first] * 3, "no target, and no staging folder"
    assert [each.left for each in found[5:7]] == [second] * 2
    assert found[7].left == sorted([*second, "again.gguf"])
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "half.gguf").read_bytes()
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "small.gguf").read_bytes()
    assert {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()} == before


@pytest.mark.fault
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("count", [8, 1 << 20], ids=["small", "large"])
def test_a_full_drive_is_told_by_its_number(count: int) -> None:
    """The kernel's own refusal: numpy's tofile says of large arrays that some was not written, of small ones nothing."""
    tensor = np.ones(count, np.float32)
    part = _converted(SimpleNamespace(tensor=tensor, nbytes=tensor.nbytes))
    with pytest.raises(OSError) as full, Path("/dev/full").open("wb") as out:
        part.write(out, lambda _: None)
        out.flush()
    assert full.value.errno == errno.ENOSPC
