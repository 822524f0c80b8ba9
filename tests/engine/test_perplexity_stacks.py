"""Perplexity under adapter stacks equals that of a plain loop over the merged model, on both loaders."""

# ruff: noqa: E402 (imports that need torch come after the check that it is there)

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed in this interpreter")
transformers = pytest.importorskip("transformers", reason="transformers is not installed in this interpreter")

from app.core.stack import AdapterStack, StackedAdapter
from app.engine.protocol import Score
from tests.engine import tiny_models
from tests.engine.adapter_kit import merged, random_adapter
from tests.engine.backend_kit import FakeReport, ask, loaded

TEXT = "the rain is on the shore and the tea is hot; the weft goes over and under the warp. " * 2
WINDOW, STRIDE = 48, 20


def plain(net: Any, tokens: list[int], window: int, stride: int) -> tuple[float, int]:
    """One forward pass for each scored token, with the context that its window gives it."""
    total, at, end = 0.0, 1, min(window, len(tokens))
    with torch.inference_mode():
        while at < len(tokens):
            start = max(0, end - window)
            for place in range(at, end):
                found = net(input_ids=torch.tensor([tokens[start:place]])).logits[0, -1].double().log_softmax(-1)
                total -= float(found[tokens[place]])
            at, end = end, min(end + stride, len(tokens))
    return total / (len(tokens) - 1), len(tokens) - 1


def apart(one: Any, other: Any, tokens: list[int]) -> bool:
    """Whether two models foresee differently. (Their perplexities may be near to each other by chance.)"""
    ids = torch.tensor([tokens[:WINDOW]])
    with torch.inference_mode():
        first, second = (net(input_ids=ids).logits[0].double().log_softmax(-1) for net in (one, other))
    wanted = torch.tensor(tokens[1:WINDOW])[:, None]
    return bool((first[:-1].gather(1, wanted) - second[:-1].gather(1, wanted)).abs().mean() > 0.01)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_on_transformers(tmp_path: Path, family: str, seed: int) -> None:
    from app.backends.transformers import Backend

    entry = tiny_models.make(tmp_path / family, family, seed=seed)
    net = transformers.AutoModelForCausalLM.from_pretrained(entry.path, dtype=torch.float32).eval()
    kinds: list[dict[str, Any]] = [{"r": 4}, {"r": 3, "use_dora": True}, {"r": 2, "modules_to_save": ["lm_head"]}]
    folders = [random_adapter(tmp_path / str(n), family, net, seed + n, **kind) for n, kind in enumerate(kinds)]
    weights = [0.8, -0.5, 0.6]
    stack = AdapterStack(
        adapters=tuple(StackedAdapter(path=str(p), weight=w) for p, w in zip(folders, weights, strict=True))
    )
    with loaded(Backend(), entry) as (backend, _):
        tokens = backend._prompts.encode(TEXT, True)
        for baked in (False, True):
            backend.set_adapters(stack, FakeReport(), baked=baked)
            result = backend.score(Score(text=TEXT, window=WINDOW, stride=STRIDE), FakeReport())
            reference = merged(copy.deepcopy(net), list(zip(folders, weights, strict=True)))
            nll, count = plain(reference, tokens, WINDOW, STRIDE)
            assert result.tokens == count
            assert result.nll == pytest.approx(nll, abs=1e-4), f"baked: {baked}"
        assert apart(reference, net, tokens), "the adapters do something"
        backend.set_adapters(AdapterStack(), FakeReport())
        assert backend.score(Score(text=TEXT, window=WINDOW, stride=STRIDE), FakeReport()).nll == pytest.approx(
            plain(net, tokens, WINDOW, STRIDE)[0], abs=1e-4
        )
        assert ask(backend, "Hi")[1].tokens


def test_in_llama_cpp(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed in this interpreter")
    from app.backends.llama_cpp import Backend
    from tests.engine.test_merged_copies import EXACT, Made

    monkeypatch.setenv("WEFT_CACHE", str(tmp_path / "cache"))
    made = Made(tmp_path, seed)
    stacks: list[dict[str, float]] = [{}, {"plain": 0.9}, {"plain": -0.5, "dora": 0.7}]
    with loaded(Backend(), made.entry, **EXACT) as (backend, _):
        model = backend._model
        tokens = model.with_bos(model.tokenize(TEXT, special=False))
        for weights in stacks:
            backend.set_adapters(made.stack(**weights), FakeReport())
            result = backend.score(Score(text=TEXT, window=WINDOW, stride=STRIDE), FakeReport())
            pairs = [(made.adapters[kind], weight) for kind, weight in weights.items()]
            reference = merged(copy.deepcopy(made.model), pairs)
            nll, count = plain(reference, tokens, WINDOW, STRIDE)
            assert result.tokens == count
            assert result.nll == pytest.approx(nll, abs=1e-3), weights
            assert apart(reference, made.model, tokens) == bool(weights), "the adapters do something"
