"""Exports whose base is a GGUF file: with a stack, to any type, to the base's own types, and their certificates."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from app.core.certify_plan import CertifyPlan, CertifySide
from app.core.errors import ErrorKind, WeftError
from app.core.export_plan import ExportPlan
from app.core.ggml import TYPES
from app.core.stack import AdapterStack, StackedAdapter
from app.tasks.certify import run as certify
from app.tasks.export_gguf import run as export
from tests.engine import tiny_gguf
from tests.engine.backend_kit import FakeReport
from tests.engine.killed import killed
from tests.engine.test_merge_gguf import plain_adapter, tensors

pytest.importorskip("llama_cpp")
TEXT = str(Path(__file__).resolve().parents[2] / "resources" / "certificate_text.txt")
SHAPES = {f"blk.{layer}.{name}": size for layer in range(2) for name, size in {"attn_q": (256, 256), "ffn_up": (512, 256)}.items()}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("held", "wanted"), [("F16", "q8_0"), ("F32", "f16"), ("Q4_K_M", "q4_k_m"), ("Q4_K_M", "base"), ("Q8_0", "base")]
)
def test_a_gguf_with_a_stack_becomes_a_gguf(tmp_path: Path, held: str, wanted: str, seed: int) -> None:
    entry = tiny_gguf.write(tmp_path / "base.gguf", hidden=256, intermediate=512, kind=held, seed=seed)
    adapter = plain_adapter(tmp_path / "a.gguf", SHAPES, seed, alpha=32.0)
    stack = AdapterStack(adapters=(StackedAdapter(path=str(adapter), weight=0.7, name="a"),))
    target = tmp_path / "out.gguf"
    made = export(ExportPlan(model=entry.path, stack=stack, target=str(target), type=wanted, threads=1), FakeReport())
    before, after = tensors(Path(entry.path)), tensors(target)
    assert set(before) == set(after) and made.bytes == target.stat().st_size
    if wanted in ("base", "q4_k_m"):
        changed = {name for name in before if before[name] != after[name]}
        assert changed == {f"{name}.weight" for name in SHAPES}, "what no adapter touches keeps its bytes"
        assert {n: t for n, (t, _) in before.items()} == {n: t for n, (t, _) in after.items()}
        assert any("quantized" in note for note in made.notes)
    else:
        assert {TYPES[t].name for t, _ in after.values()} == {"F32", wanted.upper()}
    found = certify(
        CertifyPlan(
            a=CertifySide(model=entry.path, stack=stack), b=CertifySide(model=str(target)), text=TEXT, tokens=100, store=str(target)
        ), FakeReport(),
    )  # fmt: skip
    base = certify(
        CertifyPlan(a=CertifySide(model=entry.path), b=CertifySide(model=str(target)), text=TEXT, tokens=100),
        FakeReport(),
    )
    print(f"{held} to {wanted}: KL against the live stack {found.mean_kl:.2e}, against the base {base.mean_kl:.2e}")
    assert found.mean_kl < base.mean_kl / 3 and Path(found.files[0]).name == "out.certificate.json"
    assert not list(tmp_path.glob(".weft-*"))


def test_the_bases_types_want_a_gguf_and_adapters(tmp_path: Path, seed: int) -> None:
    entry = tiny_gguf.write(tmp_path / "base.gguf", seed=seed)
    for model in (entry.path, str(tmp_path)):
        with pytest.raises(WeftError, match="The type base is for GGUF models") as refused:
            export(ExportPlan(model=model, target=str(tmp_path / "out.gguf"), type="base"), FakeReport())
        assert refused.value.kind is ErrorKind.BAD_INPUT
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.gguf"]


def test_what_llama_cpp_cannot_load_never_gets_its_name(tmp_path: Path, seed: int) -> None:
    """A bias that the architecture has no place for."""
    from tests.engine import gguf_kit
    from tests.engine.adapter_kit import random_adapter, random_model

    model = random_model("cohere", seed, tie_word_embeddings=True)
    base = gguf_kit.write(model, "cohere", tmp_path / "base.gguf")
    adapter = random_adapter(tmp_path / "a", "cohere", model, seed, lora_bias=True, target_modules=["down_proj"])
    stack = AdapterStack(adapters=(StackedAdapter(path=str(adapter)),))
    with pytest.raises(WeftError) as refused:
        export(ExportPlan(model=str(base), stack=stack, target=str(tmp_path / "out.gguf"), type="base"), FakeReport())
    assert refused.value.kind is ErrorKind.UNSUPPORTED and "no place for" in refused.value.message
    assert not (tmp_path / "out.gguf").exists() and not list(tmp_path.glob(".weft-*"))


@pytest.mark.fault
@pytest.mark.parametrize(("phase", "wanted"), [("Merging", "base"), ("Merging", "q4_k_m"), ("Quantizing", "q4_k_m"), ("Quantizing", "q4_k_s")])  # fmt: skip
def test_a_killed_export_goes_on_from_the_last_complete_tensor(
    tmp_path: Path, phase: str, wanted: str, seed: int
) -> None:
    entry = tiny_gguf.write(tmp_path / "base.gguf", hidden=256, intermediate=512, kind="Q8_0", seed=seed)
    adapter = plain_adapter(tmp_path / "a.gguf", SHAPES, seed, alpha=32.0)
    stack = AdapterStack(adapters=(StackedAdapter(path=str(adapter), weight=0.7, name="a"),))
    plans = {
        name: ExportPlan(model=entry.path, stack=stack, target=str(tmp_path / f"{name}.gguf"), type=wanted, threads=1,
                         imatrix=TEXT if wanted == "q4_k_s" else "", imatrix_chunks=1)
        for name in ("whole", "out")
    }  # fmt: skip
    limit = random.Random(seed).uniform(0.4, 0.95)

    class Dying(FakeReport):
        def progress(self, name: str, done: float = 0, total: float = 0, unit: str = "") -> None:
            if name == phase and done > limit * total > 0:
                os._exit(9)

    assert killed(lambda: export(plans["out"], Dying()))
    assert not (tmp_path / "out.gguf").exists() and len(list(tmp_path.glob(".weft-*"))) == 1
    report = FakeReport()
    made = export(plans["out"], report)
    whole = export(plans["whole"], FakeReport())
    print(f"killed at {limit:.0%} of {phase}: {made.resumed:,} bytes were kept")
    assert made.resumed > 0 and whole.resumed == 0
    assert Path(made.file).read_bytes() == Path(whole.file).read_bytes()
    if phase == "Quantizing":
        assert "Merging" not in {name for name, *_ in report.phases}
        assert not any("importance" in name for name, *_ in report.phases), "it was measured before"
    assert not list(tmp_path.glob(".weft-*"))
