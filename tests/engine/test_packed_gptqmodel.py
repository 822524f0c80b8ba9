"""What GPTQModel writes and reads itself, against what is written and read here. Runs where it is installed: docs/packed.md says how."""

from __future__ import annotations

import contextlib
import os
import random
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # read at import: its 8-bit kernel would be compiled for minutes
os.environ.setdefault("GPTQMODEL_DISABLE_PACK_EXT", "1")  # likewise
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
torch = pytest.importorskip("torch", reason="torch is not installed in this interpreter")

from app.adapters.packed_grid import gptq  # noqa: E402 (needs torch)
from app.tasks.quantize import _Run  # noqa: E402
from tests.engine import packed_kit, test_quantize, tiny_models  # noqa: E402
from tests.engine.merge_kit import Report  # noqa: E402

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


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, and a text beside it."""
    folder = tmp_path_factory.mktemp("gptqmodel")
    words = random.Random(SEED).choices(" ".join(tiny_models.CORPUS).split(), k=2500)
    (folder / "text").write_text("\n".join(" ".join(words[i : i + 12]) for i in range(0, len(words), 12)), "utf-8")
    test_quantize.make(folder / "model", SEED, num_hidden_layers=4)
    return folder


METHODS = [("gptq", 4, {}), ("gptq", 4, {"desc_act": True}), ("gptq", 3, {}), ("gptq", 8, {}), ("awq", 4, {})]


@pytest.mark.parametrize(("method", "bits", "more"), METHODS, ids=str)
def test_it_reads_what_is_made_here_and_makes_nothing_better(
    library: Any, model: Path, tmp_path: Path, method: str, bits: int, more: dict[str, Any]
) -> None:
    import transformers

    print("seed", SEED)
    ids = test_quantize.tokens(model / "model", model / "text")
    wanted = test_quantize.log_probabilities(test_quantize.load(model / "model"), ids)

    def loss(found: Any) -> float:
        return test_quantize.divergence(wanted, test_quantize.log_probabilities(found, ids))

    plan = test_quantize.plan(model / "model", tmp_path / "ours", model / "text", method=method, bits=bits, **more)
    test_quantize.run(plan, Report())
    theirs_of_ours, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", device_map="cpu", output_loading_info=True
    )
    assert not info["missing_keys"], info
    ours = loss(test_quantize.unpacked(tmp_path / "ours"))
    read = loss(theirs_of_ours.eval())
    pieces = _Run(plan, Report())._pieces(model / "model")  # type: ignore[arg-type]
    made_by_library(model / "model", pieces, tmp_path, method, bits, more)
    theirs = loss(test_quantize.unpacked(tmp_path / "theirs"))
    print(f"{method} {bits} {more}: KL {ours:.5f}, read by GPTQModel {read:.5f}, made by GPTQModel {theirs:.5f}")
    assert abs(read - ours) < 0.1 * ours + 5e-4  # its kernels compute in 16 bits
    assert ours < 1.15 * theirs


def made_by_library(
    model: Path, pieces: list[list[int]], to: Path, method: str, bits: int, more: dict[str, Any]
) -> None:
    """The same model quantized by GPTQModel on the same pieces of the text."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    own: dict[str, Any] = (
        {"format": "gptq", "desc_act": False, **more} if method == "gptq" else {"format": "gemm", "sym": False}
    )
    if more:
        own["act_group_aware"] = False
    config = QuantizeConfig(
        quant_method=method,
        bits=bits,
        group_size=test_quantize.GROUP,
        device="cpu",
        offload_to_disk_path=str(to / "aside"),
        **own,
    )
    with contextlib.chdir(to):
        quantizer = GPTQModel.load(str(model), config, trust_remote_code=False, dtype=torch.bfloat16)
        quantizer.quantize(
            [{"input_ids": piece, "attention_mask": [1] * len(piece)} for piece in pieces],
            batch_size=1,
            calibration_data_min_length=1,
            backend=BACKEND.AWQ_TORCH if method == "awq" else BACKEND.AUTO,
        )
        quantizer.save(str(to / "theirs"))
