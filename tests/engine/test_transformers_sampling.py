"""Sampling under transformers: every parameter against an independent reference, or by its effect on real answers."""

# ruff: noqa: E402 (imports that need torch come after the check that it is there)

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from collections.abc import Iterator

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed in this interpreter")
pytest.importorskip("transformers", reason="transformers is not installed in this interpreter")

from app.backends.transformers import SPEC, Backend
from app.core.errors import ErrorKind, WeftError
from app.core.sampling import Sampling
from app.generation.hf_sampling import RepetitionLengths, Sampler, dry_breaker_tokens, dry_penalties
from tests.engine import tiny_models
from tests.engine.backend_kit import ask, loaded

SIZE = 50


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    model = tiny_models.make(tmp_path_factory.mktemp("model") / "llama", seed=5, tie_word_embeddings=True)
    with loaded(Backend(), model) as (found, _):
        yield found


def sampler(
    prompt: list[int] | None = None, breakers: tuple[int, ...] = (), seed: int = 0, **fields: object
) -> Sampler:
    neutral = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0}
    return Sampler(Sampling(**{**neutral, **fields}), seed, prompt or [], lambda: breakers)  # type: ignore[arg-type]


def support(logits: torch.Tensor, **fields: object) -> set[int]:
    """Tokens that come out in many draws."""
    one = sampler(seed=1, **fields)
    return {one.choose(logits) for _ in range(3000)}


def test_every_field_is_served() -> None:
    assert SPEC.sampling == frozenset(Sampling.__struct_fields__)


def test_temperature_zero_takes_the_likeliest(seed: int) -> None:
    logits = torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))
    one = sampler(temperature=0.0)
    assert [one.choose(logits) for _ in range(5)] == [int(logits.argmax())] * 5


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_draws_follow_the_softmax(temperature: float) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    expected = torch.softmax(logits / temperature, 0)
    one = sampler(temperature=temperature, seed=3)
    count = 6000
    drawn = Counter(one.choose(logits) for _ in range(count))
    for token in range(4):
        p = float(expected[token])
        assert abs(drawn[token] / count - p) < 5 * math.sqrt(p * (1 - p) / count) + 1e-3


def test_top_k_keeps_the_k_likeliest(seed: int) -> None:
    logits = torch.randn(SIZE, generator=torch.Generator().manual_seed(seed)) * 0.3
    assert support(logits, top_k=3) == set(logits.topk(3).indices.tolist())


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    assert support(logits, top_p=0.75) == {0, 1}
    assert support(logits, top_p=0.9) == {0, 1, 2}
    assert support(logits, top_p=0.0) == {0}


def test_min_p_is_a_share_of_the_likeliest() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    assert support(logits, min_p=0.25) == {0, 1, 2}
    assert support(logits, min_p=0.5) == {0, 1}


def test_typical_keeps_what_is_near_the_entropy() -> None:
    """Meister et al. 2022, by hand: sort by |surprise - entropy|, keep until the mass is reached."""
    probabilities = torch.tensor([0.35, 0.25, 0.2, 0.15, 0.05])
    surprise = -probabilities.log()
    entropy = float((probabilities * surprise).sum())
    order = sorted(range(5), key=lambda i: abs(float(surprise[i]) - entropy))
    kept, mass = set(), 0.0
    for i in order:
        if mass >= 0.4:
            break
        kept.add(i)
        mass += float(probabilities[i])
    assert support(probabilities.log(), typical_p=0.4) == kept


def test_filters_come_before_the_temperature() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    # Under transformers' own order a temperature of 5 would flatten first and let all four through.
    assert support(logits, temperature=5.0, top_p=0.75) == {0, 1}


def test_top_k_first_changes_nothing_but_the_cost(seed: int) -> None:
    """The filters see only the top k; a full-width pass that masks instead must agree."""
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        logits = torch.randn(SIZE, generator=generator) * 2
        masked = logits[None]
        for warper in (TopKLogitsWarper(8), TopPLogitsWarper(0.8), MinPLogitsWarper(0.1)):
            masked = warper(None, masked)
        allowed = set(torch.nonzero(masked[0] > -1e30).flatten().tolist())
        assert support(logits, top_k=8, top_p=0.8, min_p=0.1, temperature=3.0) == allowed


def penalised(logits: torch.Tensor, seen: list[int], s: Sampling) -> torch.Tensor:
    """llama.cpp's formulas in a plain loop."""
    out = logits.clone()
    window = seen if s.penalty_range < 0 else seen[max(0, len(seen) - s.penalty_range) :] if s.penalty_range else []
    for token, count in Counter(window).items():
        out[token] = out[token] / s.repetition_penalty if out[token] > 0 else out[token] * s.repetition_penalty
        out[token] -= count * s.frequency_penalty + s.presence_penalty
    return out


@pytest.mark.parametrize("penalty_range", [-1, 0, 3, 64])
def test_penalties_equal_a_plain_loop(seed: int, penalty_range: int) -> None:
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    fields = {
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.4,
        "presence_penalty": -0.7,
        "penalty_range": penalty_range,
        "temperature": 0.0,
    }
    seen = [rng.randrange(SIZE) for _ in range(30)]
    one = sampler(prompt=seen, **fields)
    for _ in range(100):
        logits = torch.randn(SIZE, generator=generator)
        expected = penalised(logits, seen, Sampling(**fields))  # type: ignore[arg-type]
        token = one.choose(logits)
        assert token == int(expected.argmax())
        one.accept(token)
        seen.append(token)


def dry_reference(tokens: list[int], s: Sampling, breakers: set[int]) -> dict[int, float]:
    """DRY as its author describes it, the slow way: for each earlier place, how long does its past equal ours?"""
    window = tokens if s.dry_range < 0 else tokens[max(0, len(tokens) - s.dry_range) :]
    taken: dict[int, float] = {}
    for place in range(len(window) - 1):
        length = 0
        while (
            length <= place and window[place - length] == window[-1 - length] and window[place - length] not in breakers
        ):
            length += 1
        if length >= s.dry_allowed_length:
            penalty = s.dry_multiplier * s.dry_base ** (length - s.dry_allowed_length)
            taken[window[place + 1]] = max(taken.get(window[place + 1], 0.0), penalty)
    return taken


@pytest.mark.parametrize("dry_range", [-1, 1, 7, 25])
def test_dry_equals_its_definition(seed: int, dry_range: int) -> None:
    rng = random.Random(seed)
    for alphabet in (2, 3, 6):
        fields = Sampling(
            dry_multiplier=0.8, dry_base=1.75, dry_allowed_length=rng.randrange(1, 4), dry_range=dry_range
        )
        breakers = {0} if alphabet > 2 else set()
        history, tokens = RepetitionLengths(breakers), []
        for _ in range(60):
            token = rng.randrange(alphabet)
            tokens.append(token)
            history.append(token)
            ids, penalties = dry_penalties(history, fields)
            found: dict[int, float] = {}
            for i, p in zip(ids.tolist(), penalties.tolist(), strict=True):
                found[i] = max(found.get(i, 0.0), p)
            expected = dry_reference(tokens, fields, breakers)
            expected = {k: min(v, 1e4) for k, v in expected.items()}
            assert found == pytest.approx(expected, rel=1e-4)


def test_dry_stays_finite_on_endless_repetition() -> None:
    history = RepetitionLengths(())
    for _ in range(5000):
        history.append(7)
    _, penalties = dry_penalties(history, Sampling(dry_multiplier=10, dry_base=8))
    assert bool(torch.isfinite(penalties).all()) and float(penalties.max()) > 1000


def test_dry_ends_a_loop() -> None:
    logits = torch.tensor([0.0, 1.0, 3.0, 2.0])

    def answer(**fields: object) -> list[int]:
        one, out = sampler(temperature=0.0, **fields), []
        for _ in range(12):
            out.append(one.choose(logits))
            one.accept(out[-1])
        return out

    assert answer() == [2] * 12
    assert answer(dry_multiplier=0.8)[:4] == [2, 2, 2, 2] and len(set(answer(dry_multiplier=0.8))) > 1
    assert answer(dry_multiplier=0.8, dry_range=0) == [2] * 12


def test_dry_breakers_are_tokens_of_the_model(backend: Backend) -> None:
    tokens = dry_breaker_tokens(backend._prompts.tokenizer)
    assert {backend._prompts.tokenizer.decode([t]) for t in tokens} == {"\n", ":", '"', "*"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("top_k", 2),
        ("top_p", 0.3),
        ("min_p", 0.9),
        ("typical_p", 0.2),
        ("temperature", 0.3),
        ("repetition_penalty", 2.0),
        ("frequency_penalty", 2.0),
        ("presence_penalty", 2.0),
        ("seed", 99),
    ],
)
def test_each_parameter_changes_real_answers(backend: Backend, field: str, value: float) -> None:
    base = {
        "temperature": 2.5,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "seed": 4,
        "max_tokens": 80,
        "dry_allowed_length": 1,
    }
    prompt = "aaa aaa aaa loom loom"
    assert ask(backend, prompt, **base)[0] != ask(backend, prompt, **{**base, field: value})[0]


def test_dry_changes_real_answers(backend: Backend) -> None:
    # So few tokens that they must repeat.
    letters = {"grammar": "root ::= many many many\nmany ::= ab ab ab ab ab ab ab ab\nab ::= [ab]", "max_tokens": 60}
    assert ask(backend, "Say:", **letters)[0] != ask(backend, "Say:", **letters, dry_multiplier=5.0)[0]


# Grammars -----------------------------------------------------------------------------------------


def test_an_answer_follows_a_grammar(backend: Backend) -> None:
    grammar = 'root ::= "yes" | "no" | "per" [a-c]+ "haps"'
    for seed in range(8):
        text, done = ask(backend, "Will it?", grammar=grammar, temperature=1.0, seed=seed, max_tokens=60)
        assert re.fullmatch(r"yes|no|per[abc]+haps", text) or (
            done.finish_reason == "length" and text.startswith("per")
        )
        assert done.finish_reason in ("stop", "length")


def test_an_answer_follows_a_schema(backend: Backend) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["warp", "weft"]}, "picks": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["name", "picks"],
        "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": False},
    }
    for seed in range(5):
        text, done = ask(
            backend, "Describe:", json_schema=json.dumps(schema), temperature=1.0, seed=seed, max_tokens=80
        )
        assert done.finish_reason == "stop"
        value = json.loads(text)
        assert value["name"] in ("warp", "weft") and 0 <= value["picks"] <= 99


@pytest.mark.parametrize(
    "fields",
    [
        {"grammar": "root ::= ("},
        {"grammar": "root ::= missing"},
        {"grammar": "root ::= "},
        {"grammar": 'root ::= ""'},
        {"json_schema": "{nonsense"},
        {"json_schema": '{"type": "nonsense"}'},
        {"json_schema": "{}", "grammar": 'root ::= "a"'},
    ],
)
def test_a_bad_grammar_is_refused_and_the_model_lives(backend: Backend, fields: dict[str, str]) -> None:
    with pytest.raises(WeftError) as error:
        ask(backend, "Hi", **fields)
    assert error.value.kind is ErrorKind.BAD_INPUT and error.value.hint
    assert ask(backend, "Hi")[1].tokens


def test_greedy_with_a_schema_is_repeatable(backend: Backend) -> None:
    schema = '{"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3}'
    one, _ = ask(backend, "List:", json_schema=schema, max_tokens=60)
    two, _ = ask(backend, "List:", json_schema=schema, max_tokens=60)
    assert one == two and one.lstrip().startswith("[")
