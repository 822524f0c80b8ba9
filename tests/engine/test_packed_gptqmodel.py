"""GPTQ tensors as GPTQModel itself writes and reads them, against ours."""

from __future__ import annotations

import random
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed in this interpreter")

from app.adapters.packed_grid import gptq  # noqa: E402 (needs torch)
from tests.engine import packed_kit  # noqa: E402

SEED = random.randrange(1 << 30)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.leaves_behind("GPTQModel keeps its threads until the process ends"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def library() -> Any:
    return pytest.importorskip("gptqmodel.utils.model", reason="gptqmodel is not installed in this interpreter")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptqmodel_writes_and_reads_the_zeros_that_are_read_here(library: Any, bits: int) -> None:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    print("seed", SEED)
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(SEED))
    parts, back = packed_kit.gptq_parts(weight, bits, 32, 2, None)
    module = TorchLinear(bits, 32, False, False, 96, 64, register_buffers=True)
    for key, value in parts.items():
        getattr(module, key).copy_(value)
    library.convert_gptq_v2_to_v1_format_module(module, library.QuantizeConfig(bits=bits, group_size=32))
    written = {key: getattr(module, key).clone() for key in parts}
    assert torch.equal(written["qzeros"], packed_kit.gptq_parts(weight, bits, 32, 1, None)[0]["qzeros"])
    assert torch.equal(gptq("m", written, 96).weight(), back)
    library.convert_gptq_v1_to_v2_format_module(module, bits, torch.int32)
    assert torch.equal(module.qzeros, parts["qzeros"])
    module.post_init()
    theirs = module.dequantize_weight().T.float()
    assert (theirs - back).abs().max() < 1e-3 * back.abs().max()  # their product is float16
