"""GPTQ and AWQ calibrated on the card, in the model's own 16 bits: as close to the model as what the processor makes in float32."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed in this interpreter")
if not torch.cuda.is_available():
    pytest.skip("PyTorch finds no NVIDIA card here (torch.cuda.is_available() is false)", allow_module_level=True)

from tests.engine import test_quantize, tiny_models  # noqa: E402 (needs torch)
from tests.engine.merge_kit import Report  # noqa: E402

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_the_card_calibrates_as_well_as_the_processor(tmp_path: Path, seed: int, method: str) -> None:
    words = random.Random(seed).choices(" ".join(tiny_models.CORPUS).split(), k=2500)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(" ".join(words[i : i + 12]) for i in range(0, len(words), 12)), "utf-8")
    test_quantize.make(tmp_path / "model", seed)
    ids = test_quantize.tokens(tmp_path / "model", text)
    wanted = test_quantize.log_probabilities(test_quantize.load(tmp_path / "model"), ids)
    losses: dict[str, float] = {}
    for device in ("cpu", "cuda"):
        target = tmp_path / device
        test_quantize.run(test_quantize.plan(tmp_path / "model", target, text, method=method, device=device), Report())
        found = test_quantize.log_probabilities(test_quantize.unpacked(target), ids)
        losses[device] = test_quantize.divergence(wanted, found)
    print(f"\n{method}: mean KL {losses['cpu']:.5f} by the processor, {losses['cuda']:.5f} by the card")
    assert losses["cuda"] < 1.2 * losses["cpu"]
