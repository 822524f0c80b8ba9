"""Every quantized type, with an importance matrix and without: each tensor byte for byte what ggml's own quantizer makes of its row.

ggml's function for one tensor is the reference, called with the type that the file names and the importances of that tensor: a
matrix that were not handed on, or to another tensor, would show.
"""

from __future__ import annotations

import ctypes
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from app.adapters.gguf_quantize import quantize
from app.core.export_plan import TYPES
from app.core.formats import read_gguf_header
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
    quantize(sixteen, made, kind, imatrix=matrix if weighed else None, threads=1)
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
