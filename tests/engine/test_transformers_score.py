"""Perplexity under transformers equals a plain loop over the same windows."""

# ruff: noqa: E402 (imports that need torch come after the check that it is there)

from __future__ import annotations

import math
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed in this interpreter")
transformers = pytest.importorskip("transformers", reason="transformers is not installed in this interpreter")

from app.backends.transformers import Backend
from app.core.errors import ErrorKind, WeftError
from app.engine.protocol import Score
from tests.engine import tiny_models
from tests.engine.backend_kit import FakeReport, ask, loaded

TEXT = "The warp is held under tension while the weft is drawn through it, over and under. " * 6


def plain(path: str, tokens: list[int], window: int, stride: int) -> tuple[float, int]:
    """One forward pass for each scored token, with the context that its window gives it."""
    net = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    total, at, end = 0.0, 1, window
    with torch.inference_mode():
        while at < len(tokens):
            end = min(end, len(tokens))
            start = max(0, end - window)
            logits = net(input_ids=torch.tensor([tokens[start : end - 1]])).logits[0].double().log_softmax(-1)
            for position in range(at, end):
                total -= float(logits[position - 1 - start, tokens[position]])
            at, end = end, end + stride
    return total / (len(tokens) - 1), len(tokens) - 1


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "mamba"])
@pytest.mark.parametrize(("window", "stride"), [(0, 0), (40, 0), (40, 13)])
def test_perplexity_equals_a_plain_loop(tmp_path: Path, family: str, window: int, stride: int) -> None:
    model = tiny_models.make(tmp_path / family, family, seed=8)
    with loaded(Backend(), model) as (backend, event):
        tokens = backend._prompts.encode(TEXT, True)
        result = backend.score(Score(text=TEXT, window=window, stride=stride), FakeReport())
        span = window or min(event.context, len(tokens))
        expected, count = plain(model.path, tokens, span, min(stride or span - 1, span - 1))
        assert result.tokens == count
        assert result.nll == pytest.approx(expected, abs=1e-4)
        assert result.perplexity == pytest.approx(math.exp(result.nll))
        assert ask(backend, "Hi")[1].tokens  # the cache is clean afterwards


def test_no_more_than_a_few_rows_of_logits_are_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from app.generation import hf_score
    from app.generation.hf_decode import Decoder

    held: list[int] = []
    plain_rows = Decoder.rows

    def rows(self: Decoder, tokens: list[int]) -> torch.Tensor:
        found = plain_rows(self, tokens)
        held.append(len(found))
        return found

    monkeypatch.setattr(Decoder, "rows", rows)
    with loaded(Backend(), tiny_models.make(tmp_path / "m")) as (backend, _):
        result = backend.score(Score(text=TEXT * 3), FakeReport())
    assert max(held) <= hf_score.ROWS < result.tokens and sum(held) >= result.tokens


def test_scoring_can_be_cancelled_and_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    with loaded(Backend(), tiny_models.make(tmp_path / "m")) as (backend, _):
        for text, window, match in (("", 0, "two tokens"), (TEXT, 600, "does not fit"), (TEXT, 1, "two tokens")):
            with pytest.raises(WeftError, match=match):
                backend.score(Score(text=text, window=window), FakeReport())
        with pytest.raises(WeftError) as error:
            backend.score(Score(text=TEXT, window=20), FakeReport(lambda r: len(r.phases) > 3))
        assert error.value.kind is ErrorKind.CANCELLED
