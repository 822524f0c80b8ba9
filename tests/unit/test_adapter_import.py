"""Adapters brought into the library: copies, alpha that a person gives, duplicates by content, archives, many at once."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from app.core.adapter_content import content_of, structure_of
from app.core.adapter_file import read_adapter_file
from app.core.adapter_import import ImportOptions, ImportResult, Outcome, find_adapters, import_adapters
from app.core.adapter_note import read_note
from app.core.adapter_stage import file_name, library_name
from app.core.errors import ErrorKind, WeftError
from app.core.roots import Root
from app.store.adapters import AdapterStore
from app.store.database import Database
from app.store.library import LibraryStore
from app.store.refresh import refresh
from tests.fakes.library_files import (
    gguf_bytes,
    safetensors_bytes,
    write_folder,
    write_gguf_adapter,
    write_gguf_model,
    write_json,
)

PAIR = {"self_attn.q_proj": (16, 16), "mlp.up_proj": (48, 16)}


def random_tensors(seed: int, *, rank: int = 4, prefix: str = "base_model.model.", inside: str = "") -> bytes:
    """A safetensors file of random float32 LoRA tensors for a llama of one layer."""
    layout: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, (out, inputs) in PAIR.items():
        start = f"{prefix}model.layers.0.{name}"
        layout[f"{start}.lora_A{inside}.weight"] = ("F32", (rank, inputs))
        layout[f"{start}.lora_B{inside}.weight"] = ("F32", (out, rank))
    data = safetensors_bytes(layout)
    length = 8 + struct.unpack("<Q", data[:8])[0]
    numbers = random.Random(seed)
    values = [numbers.gauss(0, 1) for _ in range((len(data) - length) // 4)]
    return data[:length] + struct.pack(f"<{len(values)}f", *values)


def peft(folder: Path, seed: int, **config: object) -> Path:
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config})
    (folder / "adapter_model.safetensors").write_bytes(random_tensors(seed))
    return folder


class Library:
    """An index over one folder of adapters, as the window has it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "loras"
        self.database = Database(folder / "weft.sqlite")
        self.store = LibraryStore(self.database)
        self.adapters = AdapterStore(self.database)

    def take(self, *paths: Path, **options: object) -> list[ImportResult]:
        found = import_adapters(
            list(paths), ImportOptions(folder=str(self.folder), **options), same=self.adapters.same_as
        )
        refresh(self.store, [Root(path=str(self.folder))])
        return found


@pytest.fixture
def library(tmp_path: Path) -> Iterator[Library]:
    made = Library(tmp_path / "home")
    yield made
    made.database.close()


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_folder_is_copied_without_what_training_left_and_stays_as_it_was(
    tmp_path: Path, library: Library, seed: int
) -> None:
    source = peft(tmp_path / "given" / "pirate", seed)
    (source / "optimizer.pt").write_bytes(b"x" * 1000)
    (source / "README.md").write_text("about")
    peft(source / "checkpoint-5", seed + 1)
    before = snapshot(source)
    (result,) = library.take(source, run="run-7", title="Pirates")
    assert result.outcome is Outcome.ADDED and result.error is None and result.source == str(source)
    assert snapshot(source) == before
    copy = library.folder / "pirate"
    assert sorted(snapshot(copy)) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "weft_adapter.json",
    ]
    assert (copy / "adapter_model.safetensors").read_bytes() == before["adapter_model.safetensors"]
    note = read_note(copy)
    assert (note.source, note.run, note.title, note.alpha_given) == (str(source), "run-7", "Pirates", False)
    entry = library.store.find_adapter("pirate")
    assert (entry.rank, entry.alpha, entry.run, entry.source) == (4, 8.0, "run-7", str(source))
    assert [p.name for p in library.folder.iterdir()] == ["pirate"]


@pytest.mark.parametrize("prefix", ["base_model.model.", "", "base_model.model.base_model.model."])
def test_a_lone_file_asks_for_alpha_and_remembers_it(tmp_path: Path, library: Library, prefix: str, seed: int) -> None:
    source = tmp_path / "downloads" / "my lora.safetensors"
    source.parent.mkdir()
    source.write_bytes(random_tensors(seed, prefix=prefix))
    (asked,) = library.take(source)
    assert (asked.outcome, asked.rank, asked.entry) == (Outcome.NEEDS_ALPHA, 4, None)
    assert library.store.adapter_count() == 0
    (result,) = library.take(source, alphas={asked.source: 12.0})
    assert result.outcome is Outcome.ADDED and result.entry is not None
    assert sorted(p.name for p in source.parent.iterdir()) == ["my lora.safetensors"]
    file = read_adapter_file(Path(result.entry.path))
    assert not file.needs_alpha and {lora.scale for m in file.modules.values() for lora in m.loras} == {3.0}
    assert read_note(Path(result.entry.path)).alpha_given
    config = json.loads((Path(result.entry.path) / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "up_proj"] and config["r"] == 4
    # The same file again is known, though its alpha is not said; with another alpha it is another adapter.
    assert library.take(source, alphas={str(source): 12.0})[0].outcome is Outcome.DUPLICATE
    assert library.take(source, alphas={str(source): 5.0})[0].outcome is Outcome.ADDED


def test_duplicates_are_found_by_their_tensors_and_named(tmp_path: Path, library: Library, seed: int) -> None:
    first = peft(tmp_path / "one", seed)
    assert library.take(first)[0].outcome is Outcome.ADDED
    again = peft(tmp_path / "another name", seed)
    (again / "README.md").write_text("not the same folder")
    inside = tmp_path / "renamed"
    inside.mkdir()
    write_json(inside / "adapter_config.json", {"peft_type": "LORA", "r": 4, "lora_alpha": 8})
    (inside / "adapter_model.safetensors").write_bytes(random_tensors(seed, inside=".default"))
    for source in (again, inside):
        (result,) = library.take(source)
        assert result.outcome is Outcome.DUPLICATE and result.entry is not None and result.entry.name == "one", source
    other = peft(tmp_path / "other", seed + 1)
    louder = peft(tmp_path / "louder", seed, lora_alpha=16)
    assert [r.outcome for r in library.take(other, louder)] == [Outcome.ADDED, Outcome.ADDED]
    twice = [peft(tmp_path / "a", seed + 5), peft(tmp_path / "b", seed + 5)]
    assert [r.outcome for r in library.take(*twice)] == [Outcome.ADDED, Outcome.DUPLICATE]
    assert library.take(again, duplicates=True)[0].outcome is Outcome.ADDED
    ((left, right),) = library.adapters.duplicates()
    assert {left.name, right.name} == {"one", "another name"}


def test_many_at_once_each_with_its_own_end(tmp_path: Path, library: Library, seed: int) -> None:
    given = tmp_path / "given"
    good = peft(given / "good", seed)
    gguf = write_gguf_adapter(given / "small.gguf")
    model = write_folder(given / "model")
    cut = given / "cut.safetensors"
    cut.write_bytes(random_tensors(seed + 1)[:-7])
    nothing = given / "nothing"
    nothing.mkdir()
    many = given / "collection"
    for number in range(3):
        peft(many / f"lora-{number}", seed + 10 + number)
    results = library.take(good, gguf, model, cut, nothing, given / "gone", write_gguf_model(given / "m.gguf"), many)
    assert [r.outcome.value for r in results] == [
        "added", "added", "failed", "failed", "failed", "failed", "failed", "added", "added", "added",
    ]  # fmt: skip
    errors = [r.error for r in results if r.error]
    assert [e.kind for e in errors] == [
        ErrorKind.BAD_INPUT,
        ErrorKind.CORRUPT,
        ErrorKind.BAD_INPUT,
        ErrorKind.NOT_FOUND,
        ErrorKind.BAD_INPUT,
    ]
    assert "is a model" in errors[0].message and "truncated" in errors[1].message and all(e.hint for e in errors)
    names = {e.name for e in library.store.adapters()}
    assert names == {"good", "small", "lora-0", "lora-1", "lora-2"}
    assert not list(library.folder.glob(".*"))


def test_what_the_library_has_stays_where_it_is(tmp_path: Path, library: Library, seed: int) -> None:
    root = tmp_path / "root"
    inside = peft(root / "x", seed)
    outside = peft(tmp_path / "elsewhere" / "y", seed + 1)
    assert library.take(inside, roots=(str(root),))[0].outcome is Outcome.PRESENT
    (left,) = library.take(outside, copy=False)
    assert left.outcome is Outcome.IN_PLACE and left.entry is not None and left.entry.path == str(outside)
    assert library.store.adapter_count() == 0


def test_names_that_every_program_gives_take_their_folder_s(tmp_path: Path, seed: int) -> None:
    assert library_name(tmp_path / "runs" / "pirates" / "model" / "model_weights", tmp_path).endswith("pirates")
    folder = tmp_path / "pirate" / "checkpoint-120"
    folder.mkdir(parents=True)
    assert library_name(folder, folder) == "pirate-checkpoint-120"
    assert [file_name(n) for n in ("con", "a/b:c", "x. ", "", "Ünï 模型")] == [
        "adapter con",
        "a_b_c",
        "x",
        "adapter",
        "Ünï 模型",
    ]
    assert len(file_name("模" * 300).encode()) <= 200
    peft(tmp_path / "home" / "a", seed)
    peft(tmp_path / "home" / "a" / "checkpoint-1", seed)
    assert find_adapters(tmp_path / "home") == [tmp_path / "home" / "a"]
    assert find_adapters(tmp_path / "home" / "a" / "adapter_model.safetensors") == [tmp_path / "home" / "a"]


def test_an_archive_brings_all_that_it_holds(tmp_path: Path, library: Library, seed: int) -> None:
    peft(tmp_path / "src" / "bundle" / "sailor", seed)
    (tmp_path / "src" / "bundle" / "loose.safetensors").write_bytes(random_tensors(seed + 1))
    archive = tmp_path / "two.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as out:
        for name in ("sailor/adapter_config.json", "sailor/adapter_model.safetensors", "loose.safetensors"):
            out.write(tmp_path / "src" / "bundle" / name, f"bundle/{name}")
    results = library.take(archive)
    assert {r.outcome for r in results} == {Outcome.ADDED, Outcome.NEEDS_ALPHA}
    (asked,) = [r for r in results if r.outcome is Outcome.NEEDS_ALPHA]
    assert asked.source == str(archive / "bundle" / "loose.safetensors")
    again = library.take(archive, alphas={asked.source: 4})
    assert sorted(r.outcome.value for r in again) == ["added", "duplicate"]
    assert {e.name for e in library.store.adapters()} == {"sailor", "loose"}
    assert library.store.find_adapter("sailor").source == str(archive)
    flat = shutil.make_archive(str(tmp_path / "flat lora"), "gztar", peft(tmp_path / "flat", seed + 2))
    assert library.take(Path(flat))[0].outcome is Outcome.ADDED
    assert library.store.find_adapter("flat lora").rank == 4
    empty = tmp_path / "none.zip"
    with zipfile.ZipFile(empty, "w") as out:
        out.writestr("readme.txt", "hello")
    assert "holds no adapter" in str(library.take(empty)[0].error)
    assert not list(library.folder.glob(".*"))


@pytest.mark.fault
def test_what_is_cancelled_or_fails_leaves_nothing(
    tmp_path: Path, library: Library, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = peft(tmp_path / "given", seed)
    calls = iter([False, False, *[True] * 99])
    assert import_adapters([source], ImportOptions(folder=str(library.folder)), cancelled=lambda: next(calls)) == []
    assert not library.folder.exists() or not list(library.folder.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))  # type: ignore[attr-defined]
    (full,) = library.take(source)
    assert full.error is not None and full.error.kind is ErrorKind.DISK_FULL
    assert not library.folder.exists() or not list(library.folder.iterdir())
    monkeypatch.undo()
    stale = library.folder / ".incoming-999999999-0"
    stale.mkdir(parents=True)
    assert library.take(source)[0].outcome is Outcome.ADDED and not stale.exists()
    (again,) = library.take(source, duplicates=True)
    assert again.entry is not None and Path(again.entry.path).name == "given (2)"


@pytest.mark.attack
def test_a_pickle_that_runs_code_is_refused_before_anything_is_copied(tmp_path: Path, library: Library) -> None:
    bad = tmp_path / "lora.bin"
    with zipfile.ZipFile(bad, "w") as out:
        out.writestr("archive/data.pkl", b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00lora\x85R.")
    folder = tmp_path / "peft"
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "r": 4, "lora_alpha": 8})
    shutil.copy(bad, folder / "adapter_model.bin")
    (result,) = library.take(folder)
    assert result.error is not None and result.error.kind is ErrorKind.HOSTILE
    assert library.take(bad)[0].outcome is Outcome.FAILED
    assert not library.folder.exists() or not list(library.folder.iterdir())


def test_content_is_of_tensors_and_scales_alone(tmp_path: Path, seed: int) -> None:
    one, two = read_adapter_file(peft(tmp_path / "1", seed)), read_adapter_file(peft(tmp_path / "2", seed))
    assert content_of(one) == content_of(two) and structure_of(one) == content_of(one).structure
    other = read_adapter_file(peft(tmp_path / "3", seed + 1))
    assert structure_of(other) == structure_of(one) and not content_of(other).same(content_of(one))
    lone = tmp_path / "x.safetensors"
    lone.write_bytes(random_tensors(seed))
    assert content_of(read_adapter_file(lone)).same(content_of(one))  # alpha unknown: may well be the same
    assert not content_of(read_adapter_file(lone, 5)).same(content_of(one))


def test_fits_are_counted_once_and_asked_anew_when_files_change(tmp_path: Path, library: Library, seed: int) -> None:
    write_folder(tmp_path / "models" / "fits")
    write_folder(tmp_path / "models" / "wide", config={"hidden_size": 64})
    library.take(peft(tmp_path / "a", seed))
    roots = [Root(path=str(library.folder)), Root(path=str(tmp_path / "models"))]
    refresh(library.store, roots)
    (adapter,) = library.store.adapters()
    counts = library.adapters.fit_counts()
    assert msgspec.structs.astuple(counts[adapter.id]) == (1, 0, 2)
    kept = library.database.rows("SELECT * FROM fits")
    assert len(kept) == 2 and library.adapters.fit_counts() == counts
    assert library.database.rows("SELECT * FROM fits") == kept
    best = library.adapters.ranked(adapter)
    assert [r.model.name for r in best] == ["fits", "wide"]
    ((found, matched, total),) = library.adapters.adapters_for(best[0].model)
    assert (found.id, matched, total) == (adapter.id, 2, 2)
    weights = Path(adapter.path) / "adapter_model.safetensors"
    weights.write_bytes(
        safetensors_bytes(
            {
                f"model.layers.7.self_attn.q_proj.lora_{s}.weight": ("F32", shape)
                for s, shape in (("A", (2, 16)), ("B", (16, 2)))
            }
        )
    )
    refresh(library.store, roots)
    assert msgspec.structs.astuple(library.adapters.fit_counts()[adapter.id]) == (0, 0, 2)


def test_gguf_adapters_that_would_crash_llama_cpp_are_not_taken_in(tmp_path: Path, library: Library) -> None:
    path = tmp_path / "bad.gguf"
    metadata = {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 8,
    }
    path.write_bytes(
        gguf_bytes(metadata, [("blk.0.attn_q.weight.lora_a", (16, 4), 0), ("blk.0.attn_q.weight.lora_b", (4, 16), 0)])
    )
    (result,) = library.take(path)
    assert isinstance(result.error, WeftError) and "alpha" in result.error.message


@pytest.mark.fault
@pytest.mark.skipif(os.name == "nt", reason="kills the POSIX way")
def test_an_import_that_is_killed_leaves_nothing_that_looks_like_an_adapter(
    tmp_path: Path, library: Library, seed: int
) -> None:
    """A child is killed while it copies; the next import takes its leavings away and succeeds."""
    source = peft(tmp_path / "given", seed)
    weights = source / "adapter_model.safetensors"
    layout = {f"model.layers.0.mlp.up_proj.lora_{s}.weight": ("F32", (1024, 2048)) for s in "AB"}
    layout["model.layers.0.mlp.up_proj.lora_B.weight"] = ("F32", (2048, 1024))
    weights.write_bytes(safetensors_bytes(layout))
    before = snapshot(source)
    code = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from app.core.adapter_import import ImportOptions, import_adapters\n"
        "def told(name, done, of):\n    if done > of / 2:\n        os.kill(os.getpid(), signal.SIGKILL)\n"
        "import_adapters([Path(sys.argv[1])], ImportOptions(folder=sys.argv[2]), progress=told)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(source), str(library.folder)], check=False, timeout=60)
    assert ended.returncode == -signal.SIGKILL
    left = list(library.folder.iterdir())
    assert len(left) == 1 and left[0].name.startswith(".incoming-")
    refresh(library.store, [Root(path=str(library.folder))])
    assert library.store.adapter_count() == 0
    (result,) = library.take(source)
    assert result.outcome is Outcome.ADDED and [p.name for p in library.folder.iterdir()] == ["given"]
    assert snapshot(source) == before
    assert (library.folder / "given" / weights.name).read_bytes() == before[weights.name]


def test_kinds_that_cannot_be_stacked_are_refused_in_words(tmp_path: Path, library: Library, seed: int) -> None:
    (loha,) = library.take(peft(tmp_path / "loha", seed, peft_type="IA3"))
    (pissa,) = library.take(peft(tmp_path / "pissa", seed, init_lora_weights="pissa"))
    assert [r.error.kind for r in (pissa, loha) if r.error] == [ErrorKind.UNSUPPORTED] * 2
    assert loha.error is not None and "IA3" in loha.error.message and pissa.error is not None and pissa.error.hint
