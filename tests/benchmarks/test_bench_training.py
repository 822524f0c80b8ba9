"""Training on mixed-length data against TRL's padded default, by turns in one process: tokens a second, at equal loss."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.bench
ROOT = Path(__file__).resolve().parents[2]


def measure(python: str, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    command = [python, "-m", f"tests.benchmarks.{module}", *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=1800)


def test_a_step_takes_little_longer_than_its_matrix_products() -> None:
    """One thread's own time, so that a busy machine tells the same; the best of a run's steps, the best of the products."""
    python = os.environ.get("WEFT_PYTHON_CORE") or (sys.executable if find_spec("peft") else "")
    if not python:
        pytest.skip("PyTorch and PEFT are not installed; `python3 run.py test --bench` installs them")
    ran = measure(python, "training_floor", "2")
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    floor, step = min(found["floor"]), min(found["step"])
    print(f"\nthe products alone {floor:.2f} s, a step {step:.2f} s: {floor / step:.2f} of the floor (at least 0.75)")
    assert floor / step >= 0.75


def test_mixed_lengths_train_two_and_a_half_times_as_fast_as_trl() -> None:
    """Tokens are those of the data, padding not counted. The best round of each is compared."""
    python = os.environ.get("WEFT_PYTHON_CORE") or (sys.executable if find_spec("trl") else "")
    if not python:
        pytest.skip("TRL is not installed; `python3 run.py test --bench` installs it")
    ran = measure(python, "training_speed", "2", "32")
    if "No module named 'trl'" in ran.stderr or "No module named 'datasets'" in ran.stderr:
        pytest.skip("TRL is not installed beside PyTorch")
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    best = {name: max(speeds) for name, speeds in found["tokens_per_second"].items()}
    print(
        f"\n{found['tokens']:,} tokens; padded batches are {found['padding']:.0%} padding; float32, {found['threads']} thread"
    )
    for name, speed in best.items():
        print(f"  {name:45} {speed:8.0f} tokens/s   ours is {best['ours'] / speed:.2f} times as fast")
    print(f"  loss after the run: ours {found['loss']['ours']:.4f}, TRL {found['loss']['trl']:.4f}")
    assert abs(found["loss"]["ours"] - found["loss"]["trl"]) < 0.02 * found["loss"]["trl"]
    assert best["ours"] / best["trl as it comes (gradient checkpointing)"] >= 2.5
    assert best["ours"] / best["trl"] >= 2.5
