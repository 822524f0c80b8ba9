"""Certificates: equal to a plain loop over both models' logits, whichever way they are loaded; bad input; where they are stored."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import transformers

from app.core.certify_plan import Certificate, CertifyPlan, CertifySide, lines, verdict
from app.core.errors import ErrorKind, WeftError
from app.core.stack import AdapterStack, StackedAdapter
from app.generation.score_windows import score_windows
from app.tasks.certify import run
from tests.engine import tiny_gguf, tiny_models
from tests.engine.adapter_kit import merged, random_adapter, random_model
from tests.engine.backend_kit import FakeReport
from tests.engine.llama_helpers import Bare
from tests.engine.test_merge_gguf import plain_adapter

pytest.importorskip("llama_cpp")
TEXT = Path(__file__).resolve().parents[2] / "resources" / "certificate_text.txt"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path / "cache"))


def folder(path: Path, seed: int, family: str = "llama", size: int = 0) -> tuple[Path, Any, Any]:
    tokenizer = tiny_models.byte_tokenizer()
    model = random_model(family, seed, vocab_size=size or len(tokenizer) + 8)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path, model, tokenizer


def stack(*pairs: tuple[Path, float]) -> AdapterStack:
    return AdapterStack(adapters=tuple(StackedAdapter(path=str(p), weight=w, name=p.name) for p, w in pairs))


def plain_loop(a: np.ndarray, b: np.ndarray, ids: list[int], found: dict[str, float]) -> None:
    """Add one window's rows, [tokens - 1, vocabulary], to sums: as plainly as can be."""
    for row in range(len(ids) - 1):
        x, y = (torch.log_softmax(torch.tensor(v[row], dtype=torch.float64), -1) for v in (a, b))
        found["n"] = found.get("n", 0) + 1
        found["kl"] = found.get("kl", 0) + float((x.exp() * (x - y)).sum())
        found["top"] = found.get("top", 0) + int(x.argmax() == y.argmax())
        found["a"] = found.get("a", 0) - float(x[ids[row + 1]])
        found["b"] = found.get("b", 0) - float(y[ids[row + 1]])
        found["largest"] = max(found.get("largest", 0), float(np.abs(a[row].astype(float) - b[row]).max()))


def check(made: Certificate, found: dict[str, float], tolerance: float = 1e-4) -> None:
    n = found["n"]
    assert made.predictions == n
    assert made.mean_kl == pytest.approx(found["kl"] / n, abs=tolerance)
    assert made.top1_agreement == pytest.approx(found["top"] / n, abs=1 / n)  # a tie may fall either way
    assert made.perplexity_a == pytest.approx(np.exp(found["a"] / n), rel=tolerance)
    assert made.perplexity_b == pytest.approx(np.exp(found["b"] / n), rel=tolerance)
    assert made.largest_logit_difference == pytest.approx(found["largest"], abs=10 * tolerance)


@pytest.mark.parametrize("together", [True, False], ids=["together", "in turn"])
def test_a_live_stack_against_another_model_equals_a_plain_loop(tmp_path: Path, seed: int, together: bool) -> None:
    a, model, tokenizer = folder(tmp_path / "a", seed)
    b, other, _ = folder(tmp_path / "b", seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    other.save_pretrained(b)
    pairs = [(random_adapter(tmp_path / "x", "llama", model, seed, use_dora=True), 0.2)]
    plan = CertifyPlan(
        a=CertifySide(model=str(a), stack=stack(*pairs)), b=CertifySide(model=str(b)), text=str(TEXT), tokens=150, window=40,
        together=together,
    )  # fmt: skip
    made = run(plan, FakeReport())
    ids = tokenizer(TEXT.read_text("utf-8"))["input_ids"][:150]
    found: dict[str, float] = {}
    whole = merged(model, pairs)
    for part in score_windows(150, 40):
        fed = ids[part.first - 1 : part.end]
        with torch.inference_mode():
            x, y = (m(input_ids=torch.tensor([fed])).logits[0].float().numpy() for m in (whole, other))
        plain_loop(x, y, fed, found)
    check(made, found)
    assert made.top1_agreement < 1 and made.mean_kl > 0
    assert made.a == "a with x 0.2" and made.b == "b"


def test_a_merge_is_certified_and_stored_in_its_card(tmp_path: Path, seed: int) -> None:
    from app.core.merge_plan import MergePlan
    from app.tasks.merge import run as merge

    a, model, _ = folder(tmp_path / "a", seed)
    given = stack((random_adapter(tmp_path / "x", "llama", model, seed, use_rslora=True), 0.7))
    target = tmp_path / "merged"
    merge(MergePlan(model=str(a), stack=given, target=str(target)), FakeReport())
    before = (target / "README.md").read_text()
    plan = CertifyPlan(
        a=CertifySide(model=str(a), stack=given), b=CertifySide(model=str(target)), text=str(TEXT), tokens=200, store=str(target)
    )  # fmt: skip
    made = run(plan, FakeReport())
    assert made.largest_logit_difference < 1e-3 and made.mean_kl < 1e-6
    assert made.top1_agreement >= 1 - 1 / made.predictions  # a tie may fall either way
    assert made.window == 64, "cut to the model's context"
    stored = msgspec.json.decode((target / "certificate.json").read_bytes(), type=Certificate)
    assert stored == made and len(made.files) == 2
    card = (target / "README.md").read_text()
    assert (
        card.startswith(before.rstrip("\n"))
        and "## Certificate" in card
        and "mean KL" in card
        and verdict(made) in card
    )
    (target / "README.md").write_text(card + "\n## Mine\n\nKept.\n")
    run(plan, FakeReport())
    again = (target / "README.md").read_text()
    assert again.count("## Certificate") == 1 and "## Mine\n\nKept." in again


def test_a_certificate_can_be_paused(tmp_path: Path, seed: int) -> None:
    a, _, _ = folder(tmp_path / "a", seed)

    class Pausing(FakeReport):
        """Holds it at its first window, and lets it go on a little later."""

        seen, later = 0, -1

        def progress(self, phase: str, done: float = 0, total: float = 0, unit: str = "") -> None:
            super().progress(phase, done, total, unit)
            if phase == "Comparing" and not self.seen:
                self.seen = len(self.phases)
                self.adjust('{"paused": true}')
                threading.Timer(0.2, self.resume).start()

        def resume(self) -> None:
            self.later = len(self.phases)
            self.adjust('{"paused": false}')

    report = Pausing()
    side = CertifySide(model=str(a))
    made = run(CertifyPlan(a=side, b=side, text=str(TEXT), tokens=150, window=40), report)
    assert report.seen == report.later < len(report.phases), "nothing was read while it was held"
    assert made.predictions == 149 and made.largest_logit_difference == 0


def test_two_ggufs_equal_a_plain_loop_in_llama_cpp(tmp_path: Path, seed: int) -> None:
    import llama_cpp

    full = tiny_gguf.write(tmp_path / "full.gguf", hidden=256, intermediate=512, seed=seed)
    small = tiny_gguf.write(tmp_path / "small.gguf", hidden=256, intermediate=512, seed=seed, kind="Q4_K_M")
    plan = CertifyPlan(
        a=CertifySide(model=full.path), b=CertifySide(model=small.path), text=str(TEXT), tokens=120, window=50,
        store=small.path,
    )  # fmt: skip
    made = run(plan, FakeReport())
    exact: dict[str, Any] = {
        "context": 64, "type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32,
        "flash_attn_type": llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED,
    }  # fmt: skip
    found: dict[str, float] = {}
    with Bare(full.path, **exact) as a, Bare(small.path, **exact) as b:
        ids = a.tokenize(TEXT.read_text("utf-8"), special=False)[:120]
        for part in score_windows(120, 50):
            fed = ids[part.first - 1 : part.end]
            rows = []
            for bare in (a, b):
                llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(bare.context), True)
                got = []
                for token in fed:
                    bare.decode([token])
                    got.append(bare.logits())
                rows.append(np.stack(got))
            plain_loop(*rows, fed, found)
    check(made, found, tolerance=1e-2)  # of Q4_K products of one row and of many llama.cpp computes differently
    print(f"KL of Q4_K_M {made.mean_kl:.5f}, plain {found['kl'] / found['n']:.5f}")
    assert made.mean_kl > 0 and made.files == [str(tmp_path / "small.certificate.json")]


def test_a_gguf_with_a_stack_against_its_merged_file(tmp_path: Path, seed: int) -> None:
    from app.adapters.merge_gguf import merge_into_gguf

    base = tiny_gguf.write(tmp_path / "base.gguf", seed=seed)
    adapter = plain_adapter(
        tmp_path / "a.gguf", {"blk.0.attn_q": (64, 64), "blk.1.ffn_down": (64, 128)}, seed, alpha=64.0
    )
    merge_into_gguf(Path(base.path), stack((adapter, 0.6)), tmp_path / "m.gguf", lambda *_: None, lambda: False)
    same = run(
        CertifyPlan(
            a=CertifySide(model=base.path, stack=stack((adapter, 0.6))), b=CertifySide(model=str(tmp_path / "m.gguf")),
            text=str(TEXT), tokens=100,
        ), FakeReport(),
    )  # fmt: skip
    assert same.largest_logit_difference < 1e-3 and same.mean_kl < 1e-6
    apart = run(
        CertifyPlan(a=CertifySide(model=base.path), b=CertifySide(model=str(tmp_path / "m.gguf")), text=str(TEXT), tokens=100),
        FakeReport(),
    )  # fmt: skip
    assert apart.mean_kl > 1e-4 and "KL" in " ".join(lines(apart))


def test_other_vocabularies_are_refused_and_other_tokenizers_told(tmp_path: Path, seed: int) -> None:
    a, _, _ = folder(tmp_path / "a", seed)
    b, _, _ = folder(tmp_path / "b", seed, size=600)
    for together in (True, False):
        with pytest.raises(WeftError, match="vocabularies differ") as refused:
            run(
                CertifyPlan(a=CertifySide(model=str(a)), b=CertifySide(model=str(b)), text=str(TEXT), tokens=30, together=together),
                FakeReport(),
            )  # fmt: skip
        assert refused.value.kind is ErrorKind.UNSUPPORTED and refused.value.hint
    c = tmp_path / "c"
    shutil.copytree(a, c)
    data = json.loads((c / "tokenizer.json").read_text())
    data["model"]["merges"] = []
    (c / "tokenizer.json").write_text(json.dumps(data))
    made = run(
        CertifyPlan(a=CertifySide(model=str(a)), b=CertifySide(model=str(c)), text=str(TEXT), tokens=60), FakeReport()
    )
    assert "split this text differently" in made.notes[0] and made.largest_logit_difference == 0


@pytest.mark.attack
def test_bad_plans_are_refused_in_words(tmp_path: Path, seed: int) -> None:
    a, model, _ = folder(tmp_path / "a", seed)
    side = CertifySide(model=str(a))
    empty, short = tmp_path / "empty.txt", tmp_path / "short.txt"
    empty.write_text("  \n")
    short.write_text("a")
    spoilt = tmp_path / "nan"
    shutil.copytree(a, spoilt)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(spoilt)
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF" + b"\xff" * 100)
    wrong: list[tuple[CertifyPlan, str]] = [
        (CertifyPlan(a=side, b=side, text=str(tmp_path / "none.txt")), "cannot be read"),
        (CertifyPlan(a=side, b=side, text=str(empty)), "is empty"),
        (CertifyPlan(a=side, b=side, text=str(short)), "less than two"),
        (CertifyPlan(a=side, b=side, text=str(TEXT), tokens=1), "Two tokens"),
        (CertifyPlan(a=side, b=CertifySide(model=str(tmp_path / "nowhere")), text=str(TEXT)), "no model"),
        (CertifyPlan(a=side, b=CertifySide(model=str(spoilt)), text=str(TEXT), tokens=20), "no numbers"),
        (CertifyPlan(a=side, b=CertifySide(model=str(damaged)), text=str(TEXT), tokens=20), "damaged"),
    ]
    for plan, words in wrong:
        with pytest.raises(WeftError, match=words) as refused:
            run(plan, FakeReport())
        assert refused.value.hint, words
    stopped = FakeReport(cancel_when=lambda report: any("Comparing" in phase for phase, _, _ in report.phases))
    with pytest.raises(WeftError) as cancelled:
        run(CertifyPlan(a=side, b=side, text=str(TEXT), window=10), stopped)
    assert cancelled.value.kind is ErrorKind.CANCELLED


def test_a_tokenizers_beginning_is_kept_and_a_recurrent_model_read_at_once(tmp_path: Path, seed: int) -> None:
    tokenizer = tiny_models.byte_tokenizer()
    torch.manual_seed(seed)
    config = transformers.MambaConfig(
        vocab_size=len(tokenizer), hidden_size=32, state_size=8, num_hidden_layers=2, initializer_range=0.2, bos_token_id=0, eos_token_id=1
    )  # fmt: skip
    model = transformers.MambaForCausalLM(config).float().eval()
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    side = CertifySide(model=str(tmp_path / "m"))
    made = run(CertifyPlan(a=side, b=side, text=str(TEXT), tokens=100, window=60), FakeReport())
    ids = tokenizer(TEXT.read_text("utf-8"))["input_ids"][:100]
    total = 0.0
    for part in score_windows(100, 60):
        fed = torch.tensor([ids[part.first - 1 : part.end]])
        with torch.inference_mode():
            rows = torch.log_softmax(model(input_ids=fed).logits[0, :-1].double(), -1)
        total -= float(rows[range(fed.shape[1] - 1), fed[0, 1:]].sum())
    assert made.perplexity_a == pytest.approx(np.exp(total / 99), rel=1e-4) and made.largest_logit_difference == 0
