"""The Transformers loader generates: equal to transformers' own generate, reading nothing twice, ending when told."""

# ruff: noqa: E402 (imports that need torch come after the check that it is there)

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed in this interpreter")
transformers = pytest.importorskip("transformers", reason="transformers is not installed in this interpreter")

from app.backends.transformers import Backend
from app.core.errors import ErrorKind, WeftError
from app.core.library import ModelEntry
from app.generation.hf_text import TokenText
from tests.engine import tiny_models
from tests.engine.backend_kit import FakeReport, ask, ask_surely, assistant, loaded, system, user

FAMILIES = ("llama", "qwen2", "mistral", "gemma2", "gpt2", "phi", "mamba")
LONG = "The warp is held under tension while the weft is drawn through it. " * 4  # longer than the sliding windows


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelEntry]:
    root = tmp_path_factory.mktemp("models")
    found = {f: tiny_models.make(root / f, f, seed=7) for f in FAMILIES}
    found["sentencepiece"] = tiny_models.make(root / "sp", "llama", tokenizer="sentencepiece", seed=3)
    return found


@pytest.fixture(scope="module")
def llama(models: dict[str, ModelEntry]) -> Iterator[Backend]:
    backend = Backend()
    with loaded(backend, models["llama"]):
        backend._prompts.template.render((user("start the renderer now"),), deadline=30)  # type: ignore[union-attr]
        yield backend


def reference(model: ModelEntry, text: str, count: int) -> list[int]:
    """Greedy tokens by transformers' own generate."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.path)
    net = transformers.AutoModelForCausalLM.from_pretrained(model.path).eval()
    inputs = torch.tensor([tokenizer(text)["input_ids"]])
    out = net.generate(
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=count, do_sample=False, pad_token_id=1
    )
    return out[0, inputs.shape[1] :].tolist()


def spoken(backend: Backend, text: str, **parameters: object) -> tuple[list[int], int]:
    """The tokens that the decoder was fed after the prompt, and how many were reused."""
    size = len(backend._prompts.encode(text, True))
    _, done = ask(backend, text, **parameters)  # type: ignore[arg-type]
    return backend._decoder.cached[size:], done.reused_tokens  # type: ignore[union-attr]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_generate(models: dict[str, ModelEntry], family: str) -> None:
    expected = reference(models[family], LONG, 24)
    with loaded(Backend(), models[family]) as (backend, _):
        tokens, _ = spoken(backend, LONG, max_tokens=24)
        ends = backend._prompts.ends
    stop = next((i for i, t in enumerate(expected) if t in ends), len(expected))
    # The last token of an answer is never fed back, so the cache holds one less.
    assert tokens == expected[: min(stop, 23)]
    assert len(set(expected)) > 3 or family in ("mamba", "gemma2")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_second_turn_reads_only_what_is_new(models: dict[str, ModelEntry], family: str) -> None:
    with loaded(Backend(), models[family]) as (backend, _):
        decoder = backend._decoder
        _, first = ask(backend, LONG)
        assert first.reused_tokens == 0
        held = decoder.cached
        read = decoder.forwarded
        longer = LONG + "And what came of it?"
        _, second = ask(backend, longer, max_tokens=1)
        if decoder.croppable:
            shared = len(backend._prompts.encode(LONG, True))
            assert second.reused_tokens >= shared - 1
            assert decoder.forwarded - read == second.prompt_tokens - second.reused_tokens
        else:
            assert family == "mamba" and second.reused_tokens == 0 and held
        warm = ask_surely(backend, longer)
        backend._decoder.reset()
        cold, done = ask(backend, longer)
        assert done.reused_tokens == 0
        assert warm.same_as(cold)


def test_a_recurrent_model_keeps_what_it_read_when_the_text_only_grows(models: dict[str, ModelEntry]) -> None:
    with loaded(Backend(), models["mamba"]) as (backend, _):
        text, one = ask(backend, (user(LONG),), max_tokens=3)
        held, said = len(backend._decoder.cached), backend._prompts.said
        warm = ask_surely(backend, (user(LONG), assistant(text)), continue_last=True, max_tokens=5)
        assert warm.done.reused_tokens == held == one.prompt_tokens + 2
        backend._decoder.reset()
        backend._prompts.said = said  # so that the same tokens are read, all at once this time
        cold, three = ask(backend, (user(LONG), assistant(text)), continue_last=True, max_tokens=5)
        assert three.reused_tokens == 0 and warm.same_as(cold)


def test_a_chat_reads_its_history_once(llama: Backend) -> None:
    first = (system("Be kind."), user("What is a warp? " * 8))
    answer, one = ask(llama, first, max_tokens=6)
    read = llama._decoder.forwarded
    _, two = ask(llama, (*first, assistant(answer), user("And a weft?")), max_tokens=1)
    assert two.reused_tokens >= one.prompt_tokens + one.tokens - 1
    assert llama._decoder.forwarded - read <= two.prompt_tokens - two.reused_tokens + 1


def test_long_prompts_are_read_in_chunks_and_cancel_comes_between(
    models: dict[str, ModelEntry], tmp_path: Path
) -> None:
    model = tiny_models.make(tmp_path / "long", "llama", context=8192, hidden_size=128, num_hidden_layers=4)
    with loaded(Backend(), model) as (backend, _):
        text = LONG * 40
        report = FakeReport(lambda r: any(done >= 1024 for _, done, _ in r.phases))
        started = time.perf_counter()
        _, done = ask(backend, text, report)
        ended = time.perf_counter()
        assert done.finish_reason == "cancelled" and done.tokens == 0 and report.text == ""
        assert report.cancelled_at is not None and ended - report.cancelled_at < 2 and ended > started
        held = len(backend._decoder.cached)
        assert 1024 <= held < done.prompt_tokens
        steps = [done for phase, done, _ in report.phases if phase == "Reading the prompt"]
        assert steps == sorted(steps) and len(steps) >= 2
        _, again = ask(backend, text, max_tokens=2)
        assert again.reused_tokens == held and again.finish_reason == "length"


def test_cancel_comes_within_a_pass_and_the_cache_stays_right(models: dict[str, ModelEntry]) -> None:
    with loaded(Backend(), models["llama"]) as (backend, _):
        looks = 0

        def soon(_: FakeReport) -> bool:
            nonlocal looks
            looks += 1
            return looks == 3  # once before the only chunk, then before each of its layers

        ask(backend, "The weft", max_tokens=1)
        held = len(backend._decoder.cached)
        _, done = ask(backend, "The weft" + LONG, FakeReport(soon))
        assert done.finish_reason == "cancelled" and len(backend._decoder.cached) <= held
        warm = ask_surely(backend, "The weft" + LONG)
        assert warm.done.reused_tokens > 0
        backend._decoder.reset()
        assert warm.same_as(ask(backend, "The weft" + LONG)[0])


def test_cancel_while_answering_keeps_what_was_said(llama: Backend) -> None:
    report = FakeReport(lambda r: r.count >= 5)
    text, done = ask(llama, "Once upon a time", report, max_tokens=300)
    assert done.finish_reason == "cancelled" and 5 <= done.tokens <= 7 and text
    whole = ask_surely(llama, "Once upon a time", max_tokens=20)
    assert whole.sure.startswith(text) or text.startswith(whole.sure)


def test_stop_strings_end_the_answer_before_they_appear(llama: Backend) -> None:
    whole, _ = ask(llama, "The loom", max_tokens=40)
    for at in range(3, 12):
        stop = whole[at : at + 3]
        if "\n" in stop or "\\" in stop or not stop.strip():
            continue
        text, done = ask(llama, "The loom", max_tokens=40, stop=stop)
        assert text == whole[: whole.find(stop)]
        assert done.finish_reason == "stop" and done.tokens <= 40


def test_an_end_token_ends_the_answer(llama: Backend, models: dict[str, ModelEntry]) -> None:
    """`<|im_end|>` ends a turn though config.json names another token; it is not shown."""
    assert {1, 4} <= llama._prompts.ends
    logits = torch.zeros(len(llama._prompts.tokenizer))
    logits[4] = 9
    original = llama._decoder.step
    llama._decoder.step = lambda token: logits  # type: ignore[method-assign]
    try:
        text, done = ask(llama, "The loom", max_tokens=9)
    finally:
        llama._decoder.step = original  # type: ignore[method-assign]
        llama._decoder.reset()
    assert done.finish_reason == "stop" and done.tokens == 1 and "im_end" not in text


def test_length_and_context_end_the_answer(llama: Backend, models: dict[str, ModelEntry]) -> None:
    _, done = ask(llama, "The loom", max_tokens=5)
    assert (done.finish_reason, done.tokens) == ("length", 5)
    with loaded(Backend(), models["llama"], context_length=40) as (backend, event):
        assert event.context == 40
        _, done = ask(backend, "The loom", max_tokens=None)
        assert done.finish_reason in ("length", "stop") and done.prompt_tokens + done.tokens <= 40
        with pytest.raises(WeftError, match="too long") as error:
            ask(backend, LONG)
        assert error.value.kind is ErrorKind.BAD_INPUT


def test_the_oldest_turns_go_when_the_context_is_full(models: dict[str, ModelEntry]) -> None:
    with loaded(Backend(), models["llama"], context_length=128) as (backend, _):
        turns = [m for i in range(8) for m in (user(f"Question {i} about the loom"), assistant("It weaves."))]
        _, done = ask(backend, (system("Be kind."), *turns, user("The last question?")), max_tokens=20)
        assert done.dropped_messages > 0 and done.dropped_messages % 2 == 0
        assert done.prompt_tokens <= 128 - 20
        seen = backend._prompts.tokenizer.decode(backend._decoder.cached)
        assert "Be kind." in seen and "The last question?" in seen and "Question 0" not in seen
        with pytest.raises(WeftError, match="too long"):
            ask(backend, (user(LONG * 3),))


def test_continuing_equals_not_having_stopped(llama: Backend) -> None:
    whole = ask_surely(llama, (user("Tell me more"),), max_tokens=24)
    head, _ = ask(llama, (user("Tell me more"),), max_tokens=8)
    tail, done = ask(llama, (user("Tell me more"), assistant(head)), continue_last=True, max_tokens=16)
    assert done.reused_tokens >= done.prompt_tokens - 1  # the answer's own tokens, not the tokenizer's idea of them
    assert whole.same_as(head + tail)


def test_seeds_repeat_and_differ(llama: Backend) -> None:
    def draw(seed: int | None) -> tuple[str, int]:
        text, done = ask(llama, "The loom", temperature=1.5, seed=seed, top_k=0, top_p=1.0, min_p=0.0)
        return text, done.seed

    assert draw(11) == draw(11)
    assert draw(11)[0] != draw(12)[0]
    one, two = draw(None), draw(None)
    assert one[1] != two[1] and draw(one[1])[0] == one[0]


def test_an_empty_prompt_and_an_empty_conversation(llama: Backend) -> None:
    text, done = ask(llama, "")
    assert done.tokens and text
    with pytest.raises(WeftError, match="no message"):
        ask(llama, ())


def test_without_a_model_it_says_so() -> None:
    with pytest.raises(WeftError, match="No model is loaded"):
        ask(Backend(), "Hi")


def test_a_model_without_a_template_uses_chatml(tmp_path: Path) -> None:
    model = tiny_models.make(tmp_path / "bare", template=None)
    with loaded(Backend(), model) as (backend, event):
        assert not event.has_template and any("ChatML" in note for note in event.notes)
        _, done = ask(backend, (user("Hi"),))
        assert done.prompt_tokens > 3
    with loaded(Backend(), model, chat_template="{% for m in messages %}{{ m.content }}{% endfor %}") as (backend, _):
        ask(backend, (user("Hi there"),), max_tokens=1)
        assert backend._prompts.tokenizer.decode(backend._decoder.cached).endswith("Hi there")


def test_a_template_without_system_prompts_gets_it_in_the_question_and_that_is_said_once(tmp_path: Path) -> None:
    strict = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}" + (
        "{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    model = tiny_models.make(tmp_path / "strict", template=strict)
    with loaded(Backend(), model) as (backend, _):
        logs: list[str] = []
        for _ in range(2):
            report = FakeReport()
            ask(backend, (system("Be kind."), user("Hi")), report, max_tokens=1)
            logs += report.logs
            assert "user: Be kind.\n\nHi" in backend._prompts.tokenizer.decode(backend._decoder.cached)
        assert len(logs) == 1 and "system prompt" in logs[0]


@pytest.mark.attack
def test_an_endless_template_does_not_hang_the_engine(tmp_path: Path) -> None:
    bomb = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    model = tiny_models.make(tmp_path / "bomb", template=bomb)
    with loaded(Backend(), model) as (backend, _):
        with pytest.raises(WeftError) as error:
            ask(backend, (user("Hi"),))
        assert error.value.kind is ErrorKind.HOSTILE
        assert ask(backend, "raw text still works")[1].tokens


@pytest.mark.parametrize("kind", ["byte", "sentencepiece"])
@pytest.mark.parametrize(
    "text",
    [
        "織り機で布を織る",
        "🧵🪡 Größe — naïve",
        "  two  blanks\n\n\tand a tab ",
        "plain words only",
        "mixed 🧵 and words, again 織",
    ],
)
def test_text_comes_out_whole_whatever_the_tokens(kind: str, text: str) -> None:
    tokenizer = tiny_models.byte_tokenizer() if kind == "byte" else tiny_models.sentencepiece_tokenizer()
    prompt = tokenizer("The loom", add_special_tokens=False)["input_ids"]
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    stream = TokenText(tokenizer, prompt)
    pieces = [stream.feed(t) for t in tokens]
    whole = tokenizer.decode(prompt + tokens, skip_special_tokens=True)
    assert tokenizer.decode(prompt) + "".join(pieces) + stream.flush() == whole
    assert not any("\ufffd" in p for p in pieces)


def test_any_tokens_come_out_as_they_decode(models: dict[str, ModelEntry]) -> None:
    generator = torch.Generator().manual_seed(torch.seed() % 2**31)
    print("seed", generator.initial_seed())
    for kind in ("byte", "sentencepiece"):
        tokenizer = tiny_models.byte_tokenizer() if kind == "byte" else tiny_models.sentencepiece_tokenizer()
        prompt = tokenizer("The loom", add_special_tokens=False)["input_ids"]
        # Tokens that are whole characters: how a run of broken bytes falls into U+FFFD is each decoder's own business.
        plain = [
            i
            for i in range(5, len(tokenizer))
            if "\ufffd" not in tokenizer.decode([i]) and "<0x" not in tokenizer.convert_ids_to_tokens(i)
        ]
        picks = torch.randint(len(plain), (300,), generator=generator).tolist()
        tokens = [plain[i] for i in picks]
        stream = TokenText(tokenizer, prompt)
        text = "".join(stream.feed(t) for t in tokens) + stream.flush()
        whole = tokenizer.decode(prompt + tokens)[len(tokenizer.decode(prompt)) :]
        assert text == whole


def test_broken_bytes_neither_stop_the_stream_nor_eat_what_follows() -> None:
    for tokenizer in (tiny_models.byte_tokenizer(), tiny_models.sentencepiece_tokenizer()):
        broken = tokenizer("ꙮ", add_special_tokens=False)["input_ids"][-1]
        words = tokenizer(" and so on", add_special_tokens=False)["input_ids"]
        stream = TokenText(tokenizer, words)
        out = "".join(stream.feed(t) for t in [*[broken] * 100, *words]) + stream.flush()
        assert out.endswith("and so on") and "\ufffd" in out


def test_detokenizing_costs_the_same_at_the_end_as_at_the_beginning() -> None:
    tokenizer = tiny_models.byte_tokenizer()
    tokens = tokenizer("The weft is drawn through the warp. " * 200)["input_ids"]
    stream = TokenText(tokenizer, [])
    times: list[float] = []
    for token in tokens:
        start = time.perf_counter()
        stream.feed(token)
        times.append(time.perf_counter() - start)
    early, late = sorted(times[50:350])[150], sorted(times[-300:])[150]
    assert late < 3 * early + 5e-5


def test_the_starter_model_answers_if_it_is_there() -> None:
    folder = Path(__file__).parents[2] / "resources" / "starter" / "model"
    if not (folder / "model.safetensors").exists():
        pytest.skip("resources/starter/model has not been made yet")
    net = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    with loaded(Backend(), tiny_models.entry(folder, net)) as (backend, event):
        text, done = ask(backend, (user("How do I add a LoRA?"),), max_tokens=96)
        assert event.has_template and done.finish_reason == "stop" and len(text.split()) > 4
        answer = backend._prompts.tokenizer.decode(
            backend._decoder.cached[done.prompt_tokens :], skip_special_tokens=True
        )
        assert text.strip() == answer.strip()
