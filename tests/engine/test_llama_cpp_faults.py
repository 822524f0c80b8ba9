"""llama.cpp: damaged, hostile and foreign files are refused in words, and never take the process down."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed in this interpreter")
pytest.importorskip("gguf")

from app.backends.llama_cpp import refuses  # noqa: E402
from app.core.errors import ErrorKind, WeftError  # noqa: E402
from app.core.library import ModelEntry, ModelFormat  # noqa: E402
from tests.engine import tiny_gguf  # noqa: E402
from tests.engine.llama_helpers import loaded, say, write_on  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]

# Loads each file named on the command line and says in one line what came of it.
CHILD = """
import json, sys
from app.backends.llama_cpp import Backend
from app.core.errors import WeftError
from app.core.library import ModelEntry, ModelFormat
from app.core.sampling import Sampling
from app.engine.protocol import Generate, Load
from tests.engine.llama_helpers import Recorder

backend = Backend()
for path in sys.argv[1:]:
    entry = ModelEntry(id=path, name=path, path=path, format=ModelFormat.GGUF)
    try:
        backend.load(Load(model=entry, options={"threads": 1, "n_ctx": 256}), Recorder())
        sampling = Sampling(temperature=0, max_tokens=4)
        backend.generate(Generate(prompt="the sea", sampling=sampling), Recorder())
        print(json.dumps(["loaded", "", ""]), flush=True)
    except WeftError as error:
        print(json.dumps([error.kind, error.message, error.hint]), flush=True)
backend.unload()
"""


def outcomes(*paths: Path, seconds: float = 120) -> list[list[str]]:
    """What a child says about each file; fails when the child dies."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, paths)],
        env=environment, capture_output=True, text=True, timeout=seconds, check=False,
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, (
        f"died after {len(lines)} files, at {paths[min(len(lines), len(paths) - 1)]}: {done.stderr[-800:]}"
    )
    assert len(lines) == len(paths)
    return lines


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> ModelEntry:
    return tiny_gguf.write(
        tmp_path_factory.mktemp("gguf") / "tiny.gguf", hidden=32, intermediate=64, layers=1, kv_heads=4
    )


@pytest.mark.fault
def test_truncated_files_are_refused(tiny, tmp_path):
    data = Path(tiny.path).read_bytes()
    files = []
    for size in (0, 3, 4, 23, 24, 100, 5000, len(data) // 2, len(data) - 1000, len(data) - 1):
        files.append(tmp_path / f"{size}.gguf")
        files[-1].write_bytes(data[:size])
    for path, (kind, message, hint) in zip(files, outcomes(*files), strict=True):
        assert kind in (ErrorKind.CORRUPT, ErrorKind.HOSTILE, ErrorKind.UNSUPPORTED), (path, message)
        assert path.name in message and hint


@pytest.mark.attack
def test_damaged_headers_never_crash(tiny, tmp_path):
    data = Path(tiny.path).read_bytes()
    seed = random.randrange(10**9)
    print(f"seed {seed}")
    chance = random.Random(seed)
    header = data.index(b"token_embd.weight") + 2000
    files = []
    for i in range(40):
        damaged = bytearray(data)
        for _ in range(chance.choice((1, 1, 2, 8))):
            at = chance.randrange(4, header)
            if chance.random() < 0.3:
                damaged[at : at + 8] = struct.pack("<Q", chance.choice((2**63, 2**64 - 1, 2**32, 2**31, 2**40)))
            else:
                damaged[at] = chance.randrange(256)
        files.append(tmp_path / f"{i}.gguf")
        files[-1].write_bytes(damaged)
    for kind, message, hint in outcomes(*files):
        assert kind == "loaded" or (message and hint)


@pytest.mark.attack
def test_a_token_that_stands_twice_in_the_vocabulary_is_refused(tiny, tmp_path):
    """llama.cpp aborts on it (`id_to_token.size() == token_to_id.size()`)."""
    data = Path(tiny.path).read_bytes()
    first, second = (struct.pack("<Q", 6) + b"<0x%02X>" % byte for byte in (0x41, 0x42))
    assert first in data and second in data, "the tiny model has byte tokens"
    path = tmp_path / "twice.gguf"
    path.write_bytes(data.replace(second, first, 1))
    ((kind, message, hint),) = outcomes(path)
    assert kind == ErrorKind.CORRUPT and "twice" in message and hint


@pytest.mark.attack
def test_absurd_counts_and_wrong_types_are_refused_at_once(tiny, tmp_path):
    data = Path(tiny.path).read_bytes()
    magic_and_version = data[:8]
    files = {
        "tensors.gguf": magic_and_version + struct.pack("<QQ", 2**62, 1) + data[24:],
        "keys.gguf": magic_and_version + struct.pack("<QQ", 1, 2**62) + data[24:],
        "string.gguf": magic_and_version + struct.pack("<QQQ", 0, 1, 2**60),
        "version.gguf": b"GGUF" + struct.pack("<I", 99) + data[8:],
        "other.gguf": b"PK\x03\x04" + data[4:],
    }
    at = data.index(b"output_norm.weight") + len("output_norm.weight")
    files["type.gguf"] = data[: at + 4 + 8] + struct.pack("<I", 77) + data[at + 4 + 8 + 4 :]
    files["integers.gguf"] = data[: at + 4 + 8] + struct.pack("<I", 24) + data[at + 4 + 8 + 4 :]
    files["offset.gguf"] = data[: at + 4 + 8 + 4] + struct.pack("<Q", 2**50) + data[at + 4 + 8 + 4 + 8 :]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for name, (kind, message, hint) in zip(files, outcomes(*(tmp_path / n for n in files), seconds=30), strict=True):
        assert kind != "loaded", name
        assert message and hint


def test_an_unknown_architecture_is_named(tiny, tmp_path):
    data = Path(tiny.path).read_bytes()
    path = tmp_path / "new.gguf"
    path.write_bytes(data.replace(b"llama", b"lxama"))
    with pytest.raises(WeftError) as caught, loaded(tiny_entry(path)):
        pass
    assert caught.value.kind is ErrorKind.UNSUPPORTED and "'lxama'" in caught.value.message


def test_a_missing_tensor_is_named(tiny, tmp_path):
    data = Path(tiny.path).read_bytes()
    path = tmp_path / "hole.gguf"
    path.write_bytes(data.replace(b"blk.0.ffn_up.weight", b"blk.0.ffn_xx.weight"))
    with pytest.raises(WeftError) as caught, loaded(tiny_entry(path)):
        pass
    assert caught.value.kind is ErrorKind.CORRUPT and "blk.0.ffn_up.weight" in caught.value.message


@pytest.mark.fault
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_said(tmp_path, value):
    entry = tiny_gguf.write(tmp_path / "nan.gguf", spoil=value)
    with loaded(entry) as (backend, _), pytest.raises(WeftError) as caught:
        say(backend, "the sea")
    assert caught.value.kind is ErrorKind.CORRUPT and "NaN" in caught.value.message
    with pytest.raises(WeftError) as caught, loaded(entry, check_tensors=True):
        pass
    assert caught.value.kind is ErrorKind.CORRUPT


def test_split_files_load_from_any_part_and_missing_ones_are_named(tiny, tmp_path):
    whole = tiny_gguf.write(tmp_path / "whole.gguf")
    entry = tiny_gguf.write(tmp_path / "model.gguf", split=200_000)
    parts = [Path(file) for file in entry.files]
    assert len(parts) > 2
    with loaded(whole) as (one, _), loaded(entry) as (other, _):
        assert write_on(one, "the sea") == (write_on(other, "the sea")[0], _any())
    with loaded(tiny_entry(parts[1])) as (backend, _):
        assert write_on(backend, "the sea")[1].tokens
    parts[2].unlink()
    with pytest.raises(WeftError) as caught, loaded(entry):
        pass
    assert caught.value.kind is ErrorKind.NOT_FOUND and parts[2].name in caught.value.message


@pytest.mark.attack
def test_the_header_of_every_part_is_checked_before_the_library_sees_one(tmp_path, monkeypatch):
    entry = tiny_gguf.write(tmp_path / "model.gguf", split=200_000)
    part = Path(entry.files[2])
    data = bytearray(part.read_bytes())
    data[16:24] = struct.pack("<Q", 2**60)  # so many metadata entries
    part.write_bytes(data)
    monkeypatch.setattr("app.generation.llama_model.LlamaModel", lambda *_: pytest.fail("the library was asked"))
    with pytest.raises(WeftError) as caught, loaded(entry):
        pass
    assert caught.value.kind in (ErrorKind.CORRUPT, ErrorKind.HOSTILE) and part.name in caught.value.message


def test_a_missing_file_is_not_found(tmp_path):
    with pytest.raises(WeftError) as caught, loaded(tiny_entry(tmp_path / "none.gguf")):
        pass
    assert caught.value.kind is ErrorKind.NOT_FOUND and caught.value.hint


def test_unicode_and_long_paths_load(tiny, tmp_path):
    folder = tmp_path / "Größe 織り 🧵"
    folder.mkdir()
    path = folder / ("ä" * 120 + ".gguf")
    path.write_bytes(Path(tiny.path).read_bytes())
    with loaded(tiny_entry(path)) as (backend, _):
        assert write_on(backend, "the sea")[1].tokens


def test_models_that_do_not_write_are_refused_in_words():
    for name in ("bert", "nomic-bert", "clip", "t5"):
        assert refuses(ModelEntry(id="x", name="x", path="x", format=ModelFormat.GGUF, architecture=name))
    assert not refuses(ModelEntry(id="x", name="x", path="x", format=ModelFormat.GGUF, architecture="llama"))


@pytest.mark.fault
def test_a_failed_load_leaves_nothing_and_the_next_one_works(tiny, tmp_path):
    from app.backends.llama_cpp import Backend
    from app.engine.protocol import Load
    from tests.engine.llama_helpers import Recorder

    backend = Backend()
    backend.load(Load(model=tiny), Recorder())
    with pytest.raises(WeftError):
        backend.load(Load(model=tiny_entry(tmp_path / "none.gguf")), Recorder())
    with pytest.raises(WeftError, match="No model"):
        write_on(backend, "x")
    backend.load(Load(model=tiny), Recorder())
    assert write_on(backend, "the sea")[1].tokens
    backend.unload()


FUZZ = """
import random, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
import llama_cpp
from app.core.errors import WeftError
from app.core.sampling import Sampling
from app.generation.llama_grammar import check_grammar
from app.generation.llama_log import library_log
from app.generation.llama_sampler import Sampler
from tests.engine.grammar_fuzz import mutated, walk

library_log(llama_cpp)
params = llama_cpp.llama_model_default_params()
params.vocab_only = True
model = llama_cpp.llama_model_load_from_file(sys.argv[1].encode(), params)
vocab = llama_cpp.llama_model_get_vocab(model)
chance = random.Random(int(sys.argv[2]))
passed = refused = 0
for _ in range(int(sys.argv[3])):
    grammar = mutated(chance)
    try:
        check_grammar(grammar)
    except WeftError:
        refused += 1
        continue
    print(repr(grammar), file=sys.stderr, flush=True)
    try:
        sampler = Sampler(llama_cpp, vocab, context=256, sampling=Sampling(), grammar=grammar, seed=1)
    except WeftError:
        continue
    walk(llama_cpp, vocab, sampler._grammar, chance)
    sampler.close()
    passed += 1
print(passed, refused)
"""


@pytest.mark.attack
def test_no_grammar_that_passes_the_check_crashes_the_library(tiny):
    seed = random.randrange(10**9)
    print(f"seed {seed}")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", FUZZ, tiny.path, str(seed), "1500"],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"seed {seed}: {done.stderr[-1500:]}"
    passed, refused = map(int, done.stdout.split())
    assert passed > 20 and refused > 100


def tiny_entry(path: Path) -> ModelEntry:
    return ModelEntry(id=str(path), name=path.stem, path=str(path), format=ModelFormat.GGUF)


class _any:
    """Equal to everything."""

    def __eq__(self, _: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]
