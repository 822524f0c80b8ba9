"""Merges that are killed, run out of disk, are cancelled or given what they must not take: nothing is lost or half written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from app.adapters import merge_write_torch
from app.adapters.merge_staging import PREFIX
from app.core.errors import ErrorKind, WeftError
from app.tasks import merge as task
from tests.engine.merge_kit import Report, load, make_adapter, make_base, peft_merge, plan, saved

pytestmark = pytest.mark.fault
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def parts(tmp_path: Path, seed: int) -> tuple[Path, Path]:
    model = make_base(tmp_path / "base", "llama", seed, "bfloat16", "60KB", hidden_size=64, intermediate_size=160)
    linear = ["q_proj", "v_proj", "down_proj"]
    return tmp_path / "base", make_adapter(tmp_path / "adapter", "llama", model, seed, target_modules=linear)


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.is_file()}


def merge(base: Path, adapter: Path, target: Path, report: Any = None, **more: Any) -> Any:
    return task.run(plan(base, [(adapter, 1.0)], target, **more), report or Report())


def refused(base: Path, adapter: Path, target: Path, **more: Any) -> WeftError:
    before = set(target.parent.iterdir())
    with pytest.raises(WeftError) as caught:
        merge(base, adapter, target, **more)
    assert caught.value.hint
    assert set(target.parent.iterdir()) == before
    return caught.value


# Killed -----------------------------------------------------------------------------------------


def killed(tmp_path: Path, parts: tuple[Path, Path], points: int, seed: int) -> None:
    base, adapter = parts
    before = hashes(base), hashes(adapter)
    place = tmp_path / "killed"
    place.mkdir()
    program = Path(__file__).with_name("merge_killed.py")
    done = subprocess.run(
        [sys.executable, str(program), str(base), str(adapter), str(place), str(points), str(seed)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
        capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    resumed = 0
    for point in found["points"]:
        assert point["died"] == -9, point
        assert point["complete"] in (None, True), point  # under the final name lies all of it, or nothing
        assert point["visible"] == ([] if point["complete"] is None else ["merged"]), point
        assert point["left"] == ["merged"], point
        assert point["right"], point
        if point["complete"] is None:
            assert "error" not in point["again"], point
            resumed += point["again"]["resumed"] > 0
    assert (hashes(base), hashes(adapter)) == before
    print(f"{points} kills among {found['calls']} calls; {resumed} went on from complete tensors")
    assert resumed


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_killed_anywhere_and_run_again(tmp_path: Path, parts: tuple[Path, Path], seed: int) -> None:
    killed(tmp_path, parts, 10, seed)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_killed_at_fifty_points_and_run_again(tmp_path: Path, parts: tuple[Path, Path], seed: int) -> None:
    killed(tmp_path, parts, 50, seed)


def test_what_an_interrupted_merge_left_is_not_used_for_another_one(
    tmp_path: Path, parts: tuple[Path, Path], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = parts

    def die(self: Any) -> None:
        raise SystemExit

    with monkeypatch.context() as patched:
        # As after a kill: all tensors are complete, nothing was tidied up.
        patched.setattr("app.adapters.merge_staging.Staging.publish", die)
        patched.setattr("app.adapters.merge_staging.Staging.discard", lambda self: None)
        with pytest.raises(SystemExit):
            merge(base, adapter, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(PREFIX)]
    file = adapter / "adapter_model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, file)
    done = merge(base, adapter, tmp_path / "out")
    assert done.resumed == 0
    peft_merge(base, "bfloat16", [(adapter, 1.0)], tmp_path / "peft")
    theirs = saved(tmp_path / "peft")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in saved(tmp_path / "out").items())
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(PREFIX)]


# Disk -------------------------------------------------------------------------------------------


def test_too_little_disk_is_refused_before_anything_is_written(
    tmp_path: Path, parts: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))  # type: ignore[attr-defined]
    error = refused(*parts, tmp_path / "out")
    assert error.kind is ErrorKind.DISK_FULL
    assert "MB are kept free" in error.message and "are free" in error.message
    assert f"drive of {tmp_path}" in error.message


@pytest.mark.parametrize("call", ["pwrite", "copy_file_range", "posix_fallocate", "fsync"])
def test_a_disk_that_becomes_full_leaves_nothing_behind(
    tmp_path: Path, parts: tuple[Path, Path], call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = parts
    before = hashes(base), hashes(adapter)
    real, seen = getattr(os, call), [0]

    def full(*arguments: Any, **more: Any) -> Any:
        seen[0] += 1
        if seen[0] > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments, **more)

    with monkeypatch.context() as patched:
        patched.setattr(os, call, full)
        error = refused(base, adapter, tmp_path / "out")
    assert error.kind is ErrorKind.DISK_FULL
    assert (hashes(base), hashes(adapter)) == before
    assert merge(base, adapter, tmp_path / "out").tensors > 0


def test_where_the_kernel_cannot_copy_we_do(
    tmp_path: Path, parts: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(*parts, tmp_path / "one")

    def cannot(*_: Any) -> int:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", cannot)
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: cannot())
    merge(*parts, tmp_path / "two")
    first, second = hashes(tmp_path / "one"), hashes(tmp_path / "two")
    assert {k: v for k, v in first.items() if k != "README.md"} == {k: v for k, v in second.items() if k != "README.md"}


def test_a_base_that_changes_under_the_merge_is_noticed(
    tmp_path: Path, parts: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = parts
    real = merge_write_torch.Writer.run

    def touched(self: Any, threads: int) -> None:
        real(self, threads)
        os.utime(next(base.glob("*.safetensors")), (1, 1))

    monkeypatch.setattr(merge_write_torch.Writer, "run", touched)
    assert refused(base, adapter, tmp_path / "out").kind is ErrorKind.CORRUPT


# Pause, cancel ----------------------------------------------------------------------------------


def test_pause_stops_the_writing_and_cancel_reclaims_the_disk(
    tmp_path: Path, parts: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = Report()
    real = merge_write_torch.Writer._next
    seen = [0]

    def slow(self: Any) -> Any:
        seen[0] += 1
        if seen[0] == 3:
            report.adjust('{"paused": true}')
        return real(self)

    monkeypatch.setattr(merge_write_torch.Writer, "_next", slow)
    caught: list[WeftError] = []

    def work() -> None:
        try:
            merge(*parts, tmp_path / "out", report=report)
        except WeftError as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    while seen[0] < 3:
        time.sleep(0.01)
    stood = 0
    while stood != seen[0]:  # other threads may have been about to begin another piece
        stood = seen[0]
        time.sleep(0.3)
    assert thread.is_alive(), "it was not paused"
    time.sleep(0.3)
    assert seen[0] == stood and thread.is_alive()
    report.stop()
    thread.join(60)
    assert not thread.is_alive()
    assert [error.kind for error in caught] == [ErrorKind.CANCELLED]
    assert not (tmp_path / "out").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(PREFIX)]


def test_two_merges_to_one_target(tmp_path: Path, parts: tuple[Path, Path]) -> None:
    from app.adapters.merge_staging import Staging

    with Staging(tmp_path / "out") as staging:
        with pytest.raises(WeftError) as caught:
            merge(*parts, tmp_path / "out")
        assert caught.value.kind is ErrorKind.BUSY
        staging.discard()


# Refused ----------------------------------------------------------------------------------------


def test_what_is_refused_before_anything_is_written(tmp_path: Path, parts: tuple[Path, Path], seed: int) -> None:
    base, adapter = parts
    assert refused(base, adapter, base / "inside").kind is ErrorKind.BAD_INPUT
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    assert refused(base, adapter, tmp_path / "taken").kind is ErrorKind.BAD_INPUT
    assert refused(base, adapter, tmp_path / ("n" * 256)).kind is ErrorKind.PERMISSION
    assert refused(base, adapter, tmp_path / "out", dtype="int8").kind is ErrorKind.BAD_INPUT
    assert refused(base, tmp_path / "nowhere", tmp_path / "out").kind is ErrorKind.NOT_FOUND
    make_base(tmp_path / "other", "gpt2", seed)
    assert refused(tmp_path / "other", adapter, tmp_path / "out").kind is ErrorKind.UNSUPPORTED
    broken = tmp_path / "broken"
    shutil.copytree(adapter, broken)
    tensors = load_file(broken / "adapter_model.safetensors")
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    save_file(tensors, broken / "adapter_model.safetensors")
    with pytest.raises(WeftError) as caught:
        merge(base, broken, tmp_path / "out")
    assert caught.value.kind is ErrorKind.CORRUPT
    assert not (tmp_path / "out").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(PREFIX)]


def test_a_truncated_base_and_an_index_that_points_elsewhere(tmp_path: Path, parts: tuple[Path, Path]) -> None:
    base, adapter = parts
    shard = next(base.glob("*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    assert refused(base, adapter, tmp_path / "out").kind is ErrorKind.CORRUPT
    shard.write_bytes(whole)
    index = base / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"][next(iter(listed["weight_map"]))] = "../../x.safetensors"
    index.write_text(json.dumps(listed))
    assert refused(base, adapter, tmp_path / "out").kind is ErrorKind.HOSTILE


def test_a_quantized_base_names_the_model_to_fetch(tmp_path: Path, parts: tuple[Path, Path]) -> None:
    base, adapter = parts
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config["_name_or_path"] = "someone/Small-8B-bnb-4bit"
    (base / "config.json").write_text(json.dumps(config))
    error = refused(base, adapter, tmp_path / "out")
    assert error.kind is ErrorKind.UNSUPPORTED
    assert "weft download someone/Small-8B`" in error.hint


# What lies beside the weights -------------------------------------------------------------------


def test_shards_config_tokenizer_and_card(tmp_path: Path, parts: tuple[Path, Path]) -> None:
    base, adapter = parts
    tokens = [{"id": 0, "content": "<s>", "special": True}]
    (base / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
    (base / "preprocessor_config.json").write_text("{}")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    more = [*tokens, {"id": 95, "content": "<new>", "special": True}]
    (adapter / "tokenizer.json").write_text(json.dumps({"added_tokens": more}))
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    done = merge(base, adapter, tmp_path / "out", shard_size=40_000, dtype="float32")
    out = Path(done.folder)
    files = sorted(out.glob("*.safetensors"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(files) > 2 and set(index["weight_map"].values()) == {p.name for p in files}
    assert index["metadata"]["total_size"] == done.bytes
    largest = max(t.numel() * 4 for t in saved(out).values())
    assert all(p.stat().st_size <= max(40_000, largest) + 4000 for p in files)
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    assert json.loads((out / "tokenizer.json").read_text())["added_tokens"] == more
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (out / "preprocessor_config.json").is_file() and (out / "generation_config.json").is_file()
    card = (out / "README.md").read_text()
    assert "license: apache-2.0" in card and "| adapter | 1 |" in card
    both = hashlib.sha256()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        both.update((adapter / file).read_bytes())
    assert both.hexdigest() in card
    assert str(tmp_path) not in card
    assert load(out, "float32").config.num_hidden_layers == 2


def test_untouched_tensors_keep_their_bytes_and_their_dtype(tmp_path: Path, parts: tuple[Path, Path]) -> None:
    base, adapter = parts
    shard = next(p for p in base.glob("*.safetensors") if any("norm" in name for name in load_file(p)))
    tensors = load_file(shard)
    name = next(name for name in tensors if "norm" in name)
    tensors[name] = tensors[name].float() + 1e-4
    save_file(tensors, shard, metadata={"format": "pt"})
    done = merge(base, adapter, tmp_path / "out")
    made = saved(tmp_path / "out")
    assert made[name].dtype == torch.float32 and torch.equal(made[name], tensors[name])
    assert done.copied > 0
    for other, tensor in saved(base).items():
        if not any(part in other for part in ("q_proj", "v_proj", "down_proj")):
            assert torch.equal(made[other], tensor)
