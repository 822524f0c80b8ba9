"""Merging a model of over a gigabyte against PEFT's load, merge and save, and against `cp`; by turns, each in a process of its own.

Ratios of the best of several turns count: a busy machine makes every single one slower. The merge waits for the disk
before it says that it is done, so `cp` is measured with the same wait.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.bench,
    pytest.mark.skipif(find_spec("peft") is None, reason="needs the engines' environment (torch, transformers, peft)"),
]
ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("merge_programs.py")
TURNS = int(os.environ.get("WEFT_BENCH_TURNS", "4"))


def child(*arguments: object) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def copy_and_sync(source: Path, target: Path) -> tuple[float, float]:
    """Seconds of `cp`, and with the wait for the disk."""
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    copied = time.perf_counter() - started
    for file in target.iterdir():
        descriptor = os.open(file, os.O_RDWR)
        os.fsync(descriptor)
        os.close(descriptor)
    return copied, time.perf_counter() - started


def require_disk(folder: Path, gigabytes: float) -> None:
    free = shutil.disk_usage(folder).free / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GB in {folder}, and {free:.1f} are free")


@pytest.fixture
def large(tmp_path: Path) -> Path:
    require_disk(tmp_path, 8)
    made = child("make", tmp_path / "large", 1.3)
    assert made["bytes"] >= 1e9
    return tmp_path / "large"


def test_merging_is_three_times_as_fast_as_peft_and_no_slower_than_two_and_a_half_copies(large: Path) -> None:
    base, adapter = large / "base", large / "adapter"
    size = sum(p.stat().st_size for p in base.iterdir())
    ours, peft, copied, synced = [], [], [], []
    for turn in range(TURNS):
        ours.append(child("ours", base, adapter, large / "ours"))
        if turn < 2:
            peft.append(child("peft", base, adapter, large / "peft"))
        plain, waited = copy_and_sync(base, large / "copy")
        copied.append(plain)
        synced.append(waited)
        for name in ("ours", "peft", "copy"):
            shutil.rmtree(large / name, ignore_errors=True)
    mine = min(o["seconds"] for o in ours)
    theirs = min(p["seconds"] for p in peft)
    memory = max(o["memory"] for o in ours)
    print(f"\n{size / 1e9:.2f} GB, bfloat16, LoRA of rank 16 on all linear layers; best of {TURNS} turns")
    print(f"| merge, on the disk | {mine:6.2f} s | {memory / 2**20:6.0f} MiB above imports |")
    print(
        f"| PEFT load, merge, save | {theirs:6.2f} s | {min(p['memory'] for p in peft) / 2**20:6.0f} MiB | {theirs / mine:.1f}× |"
    )
    print(f"| cp, on the disk | {min(synced):6.2f} s | {min(synced) / mine:.2f} of cp |")
    print(f"| cp, in the page cache | {min(copied):6.2f} s | {min(copied) / mine:.2f} of cp |")
    assert memory <= 100 * 2**20
    assert theirs / mine >= 3
    assert min(synced) / mine >= 0.4


def test_memory_is_flat_from_a_small_model_to_a_large_one(tmp_path: Path) -> None:
    require_disk(tmp_path, 10)
    found: dict[float, float] = {}
    for gigabytes in (0.6, 1.3, 4.0):
        folder = tmp_path / str(gigabytes)
        size = child("make", folder, gigabytes)["bytes"] / 1e9
        found[size] = child("ours", folder / "base", folder / "adapter", folder / "out")["memory"] / 2**20
        shutil.rmtree(folder)
    print(
        "\n| " + " | ".join(f"{size:.1f} GB: {memory:.0f} MiB above imports" for size, memory in found.items()) + " |"
    )
    smallest, *_, largest = found.values()
    assert max(found.values()) <= 100
    assert largest <= smallest + 16
