"""Every quantized type, with an importance matrix and without: the file is llama.cpp's own quantizer's, byte for byte.

Each tensor is also held against ggml's function for one tensor, called with the type that the file names and the importances of
that tensor: a matrix that were not handed on, or to another tensor, would show.
"""

from __future__ import annotations

import ctypes
import math
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from app.adapters.gguf_quantize import quantize
from app.core.errors import ErrorKind, WeftError
from app.core.export_plan import TYPES
from app.core.formats import read_gguf_header
from tests.engine import gguf_kit, tiny_gguf
from tests.engine.adapter_kit import random_model
from tests.engine.killed import killed
from tests.engine.test_export_gguf import SEED, Exporter, base, export, plan, tensors

__all__ = ["export"]  # the fixture
pytestmark = pytest.mark.leaves_behind
QUANTIZED = [name for name, kind in TYPES.items() if not kind.direct]
_FLOATS = (0, 1, 30)
llama_cpp = pytest.importorskip("llama_cpp")
LIBRARY = str(next((Path(llama_cpp.__file__).parent / "lib").glob("*ggml-base.*")))


@pytest.fixture(scope="module")
def sixteen(tmp_path_factory: pytest.TempPathFactory, export: Exporter) -> Path:
    folder = tmp_path_factory.mktemp("sixteen")
    base(folder / "base", "llama", SEED, torch.float16, hidden_size=256, intermediate_size=512)
    return Path(export(plan(folder, "f16")).file)


def reference(source: bytes, shape: tuple[int, ...], kind: int, importances: np.ndarray | None) -> bytes:
    """ggml_quantize_chunk of a whole tensor."""
    library = ctypes.CDLL(LIBRARY)  # a handle of its own: the app declares other argument types on its
    rows = np.frombuffer(source, np.float16).astype(np.float32)
    width = shape[0]
    count = rows.size // width
    library.ggml_row_size.restype = ctypes.c_size_t
    library.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    out = ctypes.create_string_buffer(library.ggml_row_size(kind, width) * count)
    chunk = library.ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    pointer = ctypes.POINTER(ctypes.c_float)
    chunk.argtypes = [ctypes.c_int, pointer, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, pointer]
    given = importances.ctypes.data_as(pointer) if importances is not None else None
    written = chunk(kind, rows.ctypes.data_as(pointer), out, 0, count, width, given)
    assert written == len(out)
    return out.raw


def theirs(
    source: Path, target: Path, kind: str, imatrix: dict[str, np.ndarray] | None = None, again: bool = False
) -> bytes:
    """The file that llama.cpp's own quantizer makes."""
    from app.adapters.gguf_types import _entries

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread, parameters.allow_requantize = TYPES[kind].ftype, 1, again
    kept: list[object] = []
    if imatrix is not None:
        parameters.imatrix = _entries(llama_cpp, imatrix, kept)
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters)) == 0
    data = target.read_bytes()
    target.unlink()
    return data


CASES = [(kind, weighed) for kind in QUANTIZED for weighed in (False, True) if weighed or not TYPES[kind].imatrix]


def test_tensors_are_ggmls_own(sixteen: Path, tmp_path: Path) -> None:
    """A few of them, others each time."""
    quick = [case for case in CASES if not case[0].startswith("iq")]
    for number, (kind, weighed) in enumerate(random.Random(SEED).sample(quick, 4)):
        folder = tmp_path / str(number)
        folder.mkdir()
        compare(kind, weighed, sixteen, folder)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "weighed"), CASES)
def test_every_types_tensors_are_ggmls_own(kind: str, weighed: bool, sixteen: Path, tmp_path: Path) -> None:
    compare(kind, weighed, sixteen, tmp_path)


def compare(kind: str, weighed: bool, sixteen: Path, tmp_path: Path) -> None:
    """Quantize, and hold each tensor against the reference."""
    header = read_gguf_header(sixteen)
    shapes = {t.name: tuple(t.shape) for t in header.tensors}
    values = np.random.default_rng([SEED, QUANTIZED.index(kind)])
    matrix = {
        name: (values.random(shape[0]) ** 3 + 1e-3).astype(np.float32)
        for name, shape in shapes.items()
        if len(shape) == 2 and name != "token_embd.weight"
    }
    made = tmp_path / "made.gguf"
    told: list[tuple[int, int]] = []
    given = matrix if weighed else None
    quantize(sixteen, made, kind, imatrix=given, threads=1, progress=lambda *now: told.append(now))
    assert told == sorted(told) and told[-1] == (made.stat().st_size,) * 2, "bytes, and never back"
    assert made.read_bytes() == theirs(sixteen, tmp_path / "theirs.gguf", kind, given)
    before, after = tensors(sixteen), tensors(made)
    assert set(before) == set(after)
    compared, weighing = 0, 0
    for name, (number, data) in after.items():
        if number in _FLOATS:
            assert before[name] == (number, data), name
            continue
        importances = matrix.get(name) if weighed else None
        wanted = reference(before[name][1], shapes[name], number, importances)
        assert data == wanted, (name, number)
        compared += 1
        if importances is not None:
            weighing += reference(before[name][1], shapes[name], number, np.ones_like(importances)) != wanted
    assert compared >= 2 * 7, "every projection of both layers"
    # These round to the nearest step, whatever matters.
    if weighed and kind not in ("tq1_0", "tq2_0"):
        assert weighing, "the importances made no difference: the test would not see them missing"
    assert math.prod(shapes["blk.0.ffn_up.weight"]) == 256 * 512


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("mixtral", "q2_k_s"),
        ("gpt2", "q4_k_m"),
        ("gemma", "q3_k_m"),
        *(pytest.param(family, "iq2_xs", marks=pytest.mark.slow) for family in ("mixtral", "gpt2", "gemma")),
    ],
)
def test_experts_and_other_architectures_too(family: str, kind: str, tmp_path: Path) -> None:
    """Stacked experts with an importance matrix of each; fused matrices; a head that is the embedding."""
    model = random_model(family, SEED, hidden_size=256, intermediate_size=256, vocab_size=512)
    source = gguf_kit.write(model, family, tmp_path / "source.gguf")
    values = np.random.default_rng(SEED)
    matrix = {
        t.name: (values.random(math.prod(t.shape) // t.shape[1]) ** 3 + 1e-3).astype(np.float32)
        for t in read_gguf_header(source).tensors
        if len(t.shape) > 1
    }
    if family == "mixtral":
        assert matrix["blk.0.ffn_up_exps.weight"].size > 256, "one for each expert"
    made = tmp_path / "made.gguf"
    quantize(source, made, kind, imatrix=matrix, threads=2)
    assert made.read_bytes() == theirs(source, tmp_path / "theirs.gguf", kind, matrix)


@pytest.mark.parametrize("held", ["Q8_0", "F32", "split"])
def test_what_is_quantized_or_split_already(held: str, tmp_path: Path) -> None:
    """128 columns are too few for the K-quants: llama.cpp falls back to others for these."""
    shape: dict[str, Any] = {"split": 300_000} if held == "split" else {"kind": held}
    entry = tiny_gguf.write(tmp_path / "base.gguf", hidden=256, intermediate=128, seed=SEED, **shape)
    assert (len(entry.files) > 1) == (held == "split")
    made = tmp_path / "made.gguf"
    quantize(Path(entry.path), made, "q4_k_m", threads=1, requantize=True)
    assert made.read_bytes() == theirs(Path(entry.path), tmp_path / "theirs.gguf", "q4_k_m", again=True)
    assert {t.type for t in read_gguf_header(made).tensors} > {0, 12}


def test_a_killed_quantizing_goes_on_with_the_same_bytes(tmp_path: Path) -> None:
    entry = tiny_gguf.write(tmp_path / "base.gguf", hidden=256, intermediate=512, kind="F16", seed=SEED)
    source, whole, made = Path(entry.path), tmp_path / "whole.gguf", tmp_path / "made.gguf"
    quantize(source, whole, "q4_k_m", threads=1)
    limit = random.Random(SEED).uniform(0.2, 0.95)

    def die(done: int, total: int) -> None:
        if done > limit * total:
            os._exit(9)

    def begin() -> None:
        quantize(source, made, "q4_k_m", threads=1, progress=die, made_of="this")

    assert killed(begin)
    assert quantize(source, tmp_path / "other.gguf", "q4_k_m", threads=1, made_of="this") == 0
    part = made.read_bytes()
    found = quantize(source, made, "q4_k_m", threads=1, made_of="this")
    print(f"killed at {limit:.0%}: {found:,} of {whole.stat().st_size:,} bytes were kept")
    assert 0 < found <= len(part) and made.read_bytes() == whole.read_bytes()
    made.write_bytes(part)
    assert quantize(source, made, "q4_k_m", threads=1, made_of="of another") == 0
    assert made.read_bytes() == whole.read_bytes()


def test_a_cancel_stops_quantizing_and_leaves_nothing(tmp_path: Path) -> None:
    entry = tiny_gguf.write(tmp_path / "base.gguf", hidden=256, intermediate=512, kind="F16", seed=SEED)
    told: list[int] = []
    with pytest.raises(WeftError) as stopped:
        quantize(
            Path(entry.path), tmp_path / "made.gguf", "q4_k_m", threads=1, made_of="this",
            progress=lambda done, _: told.append(done), cancelled=lambda: len(told) > 4,
        )  # fmt: skip
    assert stopped.value.kind is ErrorKind.CANCELLED and [p.name for p in tmp_path.iterdir()] == ["base.gguf"]


@pytest.mark.attack
@pytest.mark.parametrize("wrong", ["missing", "size", "nan", "weights", "quantized"])
def test_what_llama_cpp_would_refuse_is_refused(wrong: str, tmp_path: Path) -> None:
    spoilt = float("nan") if wrong == "weights" else None
    held = "Q8_0" if wrong == "quantized" else "F16"
    entry = tiny_gguf.write(tmp_path / "base.gguf", hidden=256, intermediate=512, kind=held, seed=SEED, spoil=spoilt)
    matrix = {
        t.name: np.ones(t.shape[0], np.float32) for t in read_gguf_header(Path(entry.path)).tensors if len(t.shape) > 1
    }
    if wrong == "missing":
        del matrix["blk.1.ffn_up.weight"]
    if wrong == "size":
        matrix["blk.1.ffn_up.weight"] = np.ones(7, np.float32)
    if wrong == "nan":
        matrix["blk.1.ffn_up.weight"][3] = np.inf
    with pytest.raises(WeftError) as refused:
        quantize(Path(entry.path), tmp_path / "made.gguf", "iq2_xs", imatrix=matrix, threads=1)
    assert refused.value.kind in (ErrorKind.UNSUPPORTED, ErrorKind.CORRUPT) and refused.value.hint
    assert [p.name for p in tmp_path.iterdir()] == ["base.gguf"]
