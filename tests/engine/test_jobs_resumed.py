"""What a merge, a quantizing or an export goes on with after a kill: only with what is its own, whole and on the disk."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from app.adapters import gguf_file_writer, gguf_types, merge_staging
from app.adapters.gguf_file_writer import Part, write_parts
from app.adapters.hf_stack import signature
from app.adapters.merge_staging import Staging, require_unchanged, stamp
from app.core.errors import ErrorKind, WeftError
from app.core.export_plan import ExportPlan, gguf_type
from app.core.quantize_plan import QuantizePlan
from app.core.stack import AdapterStack, StackedAdapter
from app.tasks import export_gguf, merge, quantize
from tests import seeds
from tests.engine.merge_kit import Report, make_base

pytestmark = pytest.mark.fault
CHANGES = ("unlink", "rmdir", "replace", "mkdir")


class Killed(BaseException):
    """The process ends here."""


class Kill:
    """Ends the process before the n-th change of the file system."""

    def __init__(self, patched: pytest.MonkeyPatch, number: int) -> None:
        self.left, self.done = number, False
        for name in CHANGES:
            patched.setattr(os, name, self._counted(getattr(os, name)))

    def _counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*given: Any, **more: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                self.done = True
                raise Killed
            return real(*given, **more)

        return counted


def stacked(adapter: Path, weight: float) -> AdapterStack:
    return AdapterStack(adapters=(StackedAdapter(path=str(adapter), weight=weight),))


@pytest.fixture
def parts(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A model, an adapter and a text, as far as stamps look at them."""
    model, adapter, text = tmp_path / "model", tmp_path / "adapter", tmp_path / "text.txt"
    for path in (model / "config.json", adapter / "adapter_model.safetensors", adapter / "adapter_config.json"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    text.write_text("The weft goes over and under.")
    return model, adapter, text


def job(parts: tuple[Path, Path, Path], target: Path, weight: float) -> quantize._Run:
    model, adapter, text = parts
    plan = QuantizePlan(model=str(model), target=str(target), calibration=str(text), stack=stacked(adapter, weight))
    return quantize._Run(plan, Report())  # type: ignore[arg-type]


@pytest.mark.parametrize("then", [1.0, 2.0], ids=["the first again", "the second again"])
def test_a_job_killed_while_it_clears_away_another_leaves_nothing_to_trust(
    tmp_path: Path, parts: tuple[Path, Path, Path], then: float
) -> None:
    number = 0
    for number in range(1, 100):
        target = tmp_path / f"{number}"
        with Staging(target) as staging:
            job(parts, target, 1.0)._begin(staging)
            for folder, names in {"merged": ("a", "b", "c"), "layers": ("0", "1")}.items():
                (staging.root / folder).mkdir()
                for name in names:
                    (staging.root / folder / name).touch()
        with pytest.MonkeyPatch.context() as patched:
            kill = Kill(patched, number)
            try:
                with Staging(target) as staging:
                    job(parts, target, 2.0)._begin(staging)
            except Killed:
                pass
        with Staging(target) as staging:
            job(parts, target, then)._begin(staging)
            left = {name: {path.name for path in (staging.root / name).glob("*")} for name in ("merged", "layers")}
        whole = {"merged": {"a", "b", "c"}, "layers": {"0", "1"}}
        assert left == {"merged": set(), "layers": set()} or (then == 1.0 and left == whole), (
            f"killed at change {number}"
        )
        if not kill.done:
            break
    assert 5 < number < 99


def test_a_merge_killed_while_it_clears_away_another_leaves_no_journal_of_it(tmp_path: Path) -> None:
    number = 0
    for number in range(1, 100):
        target = tmp_path / f"{number}"
        with Staging(target) as staging:
            staging.begin("first")
            for tensor in range(3):
                (staging.folder / f"{tensor}").touch()
                staging.note(tensor)
        with pytest.MonkeyPatch.context() as patched:
            kill = Kill(patched, number)
            try:
                with Staging(target) as staging:
                    staging.begin("second")
            except Killed:
                pass
        with Staging(target) as staging:
            done = staging.begin("first")
            assert all((staging.folder / f"{tensor}").exists() for tensor in done), f"killed at change {number}"
        if not kill.done:
            break
    assert 5 < number < 99


def test_what_a_killed_merge_had_written_is_on_the_disk_before_it_is_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(merge_staging, "sync_file", lambda path: synced.append(path.name))
    monkeypatch.setattr(merge_staging, "boot_id", lambda: "monday")
    with Staging(tmp_path / "out") as staging:
        staging.begin("same")
        (staging.folder / "model.safetensors").touch()
        staging.note(0)
    with Staging(tmp_path / "out") as staging:
        assert staging.begin("same") == {0}
    monkeypatch.setattr(merge_staging, "boot_id", lambda: "tuesday")
    with Staging(tmp_path / "out") as staging:
        known = list(synced)
        assert not staging.begin("same") or known == ["model.safetensors"]


def test_what_a_killed_export_had_written_is_on_the_disk_before_it_is_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, on_disk = tmp_path / "model.gguf", 0
    data = [bytes([number]) * 64 for number in range(4)]

    def sync(descriptor: int) -> None:
        nonlocal on_disk
        on_disk = os.fstat(descriptor).st_size

    def write(until: int) -> None:
        def part(number: int) -> Part:
            def put(out: Any, advance: Any) -> None:
                if number == until:
                    raise Killed
                out.write(data[number])
                advance(64)

            return Part(64, put)

        with pytest.raises(Killed):
            write_parts(file, b"head" * 8, map(part, range(4)), 32, "same", lambda *_: None, lambda: False)

    monkeypatch.setattr(gguf_file_writer, "boot_id", lambda: "monday")
    monkeypatch.setattr(gguf_file_writer.os, "fsync", sync)
    write(2)
    write(3)
    note = msgspec.json.decode(file.with_suffix(".note").read_bytes(), type=gguf_file_writer.Note)
    assert note.done == 32 + 3 * 64
    assert 0 < note.synced <= on_disk


# What tells one job from another ------------------------------------------------------------------


def test_a_stamp_sees_all_parts_of_a_gguf_and_an_adapters_config(tmp_path: Path) -> None:
    files = [tmp_path / f"model-0000{number}-of-00002.gguf" for number in (1, 2)]
    adapter, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    for path in (*files, adapter, config):
        path.write_text("1")
    for named, changed in ((files[0], files[1]), (adapter, config)):
        before, read = stamp(named), signature(named)
        require_unchanged([(named, before)])
        changed.write_text("12")
        assert stamp(named) != before
        assert named is not adapter or signature(named) != read
        with pytest.raises(WeftError) as caught:
            require_unchanged([(named, before)])
        assert caught.value.kind is ErrorKind.CORRUPT and caught.value.hint
    with pytest.raises(WeftError) as caught:
        stamp(tmp_path / "none.gguf")
    assert caught.value.kind is ErrorKind.NOT_FOUND


@pytest.mark.parametrize("name", ["config.json", "quantize_config.json"])
def test_a_merge_into_a_base_with_another_config_is_another_merge(parts: tuple[Path, Path, Path], name: str) -> None:
    model, adapter, _ = parts
    plan = merge.MergePlan(model=str(model), stack=stacked(adapter, 1.0), target="out")
    mark = merge._Run(plan, Report(), None)._mark  # type: ignore[arg-type]
    before = mark(SimpleNamespace(tensors=[]))
    (model / name).write_text('{"bits": 4}')
    assert mark(SimpleNamespace(tensors=[])) != before


def test_an_export_by_another_llama_cpp_or_converter_is_another_export(
    tmp_path: Path, parts: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "llama.cpp"
    (source / "conversion").mkdir(parents=True)
    (source / "conversion" / "base.py").write_text("1")
    monkeypatch.setenv("WEFT_LLAMA_SOURCE", str(source))
    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(__version__="1"))
    plan = ExportPlan(model=str(parts[0]), target=str(tmp_path / "out.gguf"), type="q8_0")
    mark = export_gguf._Export(plan, Report())._mark  # type: ignore[arg-type]
    marks = [mark()]
    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(__version__="2"))
    marks.append(mark())
    (source / "conversion" / "base.py").write_text("12")
    marks.append(mark())
    assert len(set(marks)) == 3


def test_an_export_of_a_model_that_changed_meanwhile_gets_no_name(
    tmp_path: Path, parts: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out.gguf"
    made = export_gguf._Export(
        ExportPlan(model=str(parts[0]), target=str(target), type="q8_0"),
        Report(),  # type: ignore[arg-type]
    )

    def convert(staging: Staging, file: Path, _kind: str) -> Path:
        file.touch()
        (parts[0] / "config.json").write_text("{ }")
        return file

    monkeypatch.setattr(made, "_mark", lambda: "same")
    monkeypatch.setattr(made, "_convert", convert)
    monkeypatch.setattr(export_gguf, "check_loads", lambda _: None)
    monkeypatch.setattr("app.core.formats.read_gguf_header", lambda _: SimpleNamespace(tensors=[], metadata={}))
    with pytest.raises(WeftError) as caught:
        made.run()
    assert caught.value.kind is ErrorKind.CORRUPT
    assert not target.exists() and not list(tmp_path.glob(".weft-*"))


def test_a_quantized_model_whose_text_changed_meanwhile_gets_no_name(
    tmp_path: Path, parts: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = SimpleNamespace(path=parts[0], config={}, weights=[], close=lambda: None)
    monkeypatch.setattr("app.tasks.merge.stage_of", lambda *_, **__: stage)
    monkeypatch.setattr("app.adapters.quantize_shapes_torch.shapes_of", lambda *_: None)
    monkeypatch.setattr("app.adapters.quantize_shapes_torch.check_shapes", lambda *_: None)
    made = job(parts, tmp_path / "out", 0.0)
    for name, value in {"_pieces": [], "_require_space": None, "_finish": None, "_say_loss": None}.items():
        monkeypatch.setattr(made, name, lambda *_, value=value, **__: value)
    monkeypatch.setattr(made, "_quantize", lambda *_: ([], [], parts[2].write_text("Another text.")))
    with pytest.raises(WeftError) as caught:
        made.run()
    assert caught.value.kind is ErrorKind.CORRUPT
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".weft-*"))


# Going on -----------------------------------------------------------------------------------------


def test_an_export_killed_after_a_merge_by_peft_goes_on_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from app.adapters import merge_stream_torch

    model, adapter = tmp_path / "base", tmp_path / "adapter"
    make_base(model, "llama", seeds.given(), "bfloat16")
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").touch()
    real, merges = merge_stream_torch.Merge, []

    def only_by_peft(plan: Any, *rest: Any) -> Any:
        if plan.stack.adapters:
            raise merge_stream_torch.NeedsPeft("so it is in this test")
        return real(plan, *rest)

    def by_peft(plan: Any, _report: Any) -> Any:
        merge.check_target(Path(plan.target))
        merges.append(Path(model).rename(plan.target))  # whole: what is there is the model itself
        Path(model).symlink_to(plan.target)
        return SimpleNamespace(notes=[])

    monkeypatch.setattr(merge_stream_torch, "Merge", only_by_peft)
    monkeypatch.setattr(merge, "run", by_peft)
    plan = ExportPlan(model=str(model), target=str(tmp_path / "out.gguf"), type="q8_0", stack=stacked(adapter, 1.0))
    exports = [export_gguf._Export(plan, Report()) for _ in range(2)]  # type: ignore[arg-type]
    for made in exports:
        with Staging(made.target) as staging, pytest.raises(Killed):
            staging.begin("same")
            with made._merge(staging):
                raise Killed
    assert len(merges) == 1
    assert any("earlier run" in note for note in exports[1].notes)


# In words -----------------------------------------------------------------------------------------


def test_only_what_could_not_be_written_is_said_to_be_so(
    tmp_path: Path, parts: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.adapters.quantize_shapes_torch.shapes_of", lambda *_: None)
    monkeypatch.setattr("app.adapters.quantize_shapes_torch.check_shapes", lambda *_: None)
    stage = SimpleNamespace(path=parts[0], config={}, weights=[], close=lambda: None)
    monkeypatch.setattr("app.tasks.merge.stage_of", lambda *_, **__: stage)
    shard = str(parts[0] / "model.safetensors")
    with Staging(tmp_path / "out") as staging:
        ours = str(staging.root / "aside" / "1.bin")
    for error, kind, said in (
        (OSError(errno.ENOSPC, "No space left on device"), ErrorKind.DISK_FULL, "became full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", shard), ErrorKind.DISK_FULL, "became full"),
        (PermissionError(errno.EACCES, "Permission denied", ours), ErrorKind.PERMISSION, "cannot be written"),
        (PermissionError(errno.EACCES, "Permission denied"), ErrorKind.PERMISSION, "cannot be written"),
        (PermissionError(errno.EACCES, "Permission denied", shard), ErrorKind.PERMISSION, f"{shard} cannot be read"),
        (OSError(errno.EIO, "Input/output error", shard), ErrorKind.CORRUPT, f"{shard} cannot be read"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), ErrorKind.OUT_OF_MEMORY, "memory"),
        (OSError("model has no file named tokenizer.model"), ErrorKind.UNSUPPORTED, "tokenizer.model"),
    ):
        made = job(parts, tmp_path / "out", 0.0)
        monkeypatch.setattr(made, "_pieces", lambda *_: [])
        monkeypatch.setattr(made, "_require_space", lambda *_, **__: None)

        def fail(*_: Any, error: OSError = error) -> None:
            raise error

        monkeypatch.setattr(made, "_quantize", fail)
        with pytest.raises(WeftError) as caught:
            made.run()
        assert (caught.value.kind, said in caught.value.message) == (kind, True), (error, caught.value)
        assert caught.value.hint


def test_who_is_not_merging_is_told_the_whole_command(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}}'
    )
    with pytest.raises(WeftError) as caught:
        merge.stage_of(tmp_path)
    assert "`weft merge … --packed 16bit`" in caught.value.hint


def test_a_path_that_is_no_text_reaches_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    llama_cpp: Any = pytest.importorskip("llama_cpp")
    given: list[bytes] = []

    def dry_run(source: bytes, _target: bytes, _parameters: Any) -> int:
        given.append(source)
        return 0

    monkeypatch.setattr(llama_cpp, "llama_model_quantize", dry_run)
    name = b"/models/caf\xe9.gguf"
    gguf_types.chosen_types(Path(os.fsdecode(name)), gguf_type("q4_k_m"), None, requantize=True)
    assert given == [name]
