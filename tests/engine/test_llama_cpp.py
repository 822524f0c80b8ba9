"""llama.cpp: what it generates is what the library computes, turns are not read again, and Cancel is heard at once."""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path

import pytest

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed in this interpreter")
pytest.importorskip("gguf")

from app.core.conversation import Message  # noqa: E402
from app.core.errors import ErrorKind, WeftError  # noqa: E402
from app.core.library import ModelEntry, ModelFormat  # noqa: E402
from app.core.sampling import Sampling  # noqa: E402
from app.engine.protocol import Generate, Load, Score  # noqa: E402
from tests.engine import tiny_gguf  # noqa: E402
from tests.engine.llama_helpers import GREEDY, Bare, Recorder, conversation, loaded, say, write_on  # noqa: E402

STARTER = Path(__file__).resolve().parents[2] / "resources" / "starter"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> ModelEntry:
    return tiny_gguf.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def larger(tmp_path_factory) -> ModelEntry:
    """About 30 M parameters: enough that reading a prompt takes a while."""
    path = tmp_path_factory.mktemp("gguf") / "larger.gguf"
    return tiny_gguf.write(
        path, layers=8, hidden=512, intermediate=1536, heads=8, kv_heads=8, vocab=4096, context=8192, kind="F16"
    )


def starter() -> ModelEntry:
    path = STARTER / "weft-starter-f16.gguf"
    return ModelEntry(id=str(path), name="starter", path=str(path), format=ModelFormat.GGUF)


def test_greedy_tokens_equal_a_bare_loop(tiny):
    with Bare(tiny.path) as bare, loaded(tiny) as (backend, event):
        prompt = bare.tokenize("the rain is on the shore")
        expected = bare.greedy(prompt, 64)
        _, result = write_on(backend, "the rain is on the shore", Sampling(temperature=0, max_tokens=len(expected)))
        assert backend._context.tokens == (prompt + expected)[: len(backend._context.tokens)]
        assert result.tokens == len(expected) and result.prompt_tokens == len(prompt)
        assert event.context == 2048 and event.has_template and event.seconds > 0 and event.memory > 0
        assert event.device == "CPU, 1 thread"


def test_answers_equal_transformers():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()  # its helper thread would outlive the test
    tokenizer = transformers.AutoTokenizer.from_pretrained(STARTER / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(STARTER / "model", dtype=torch.float32)
    with loaded(starter(), cache_type_k="f32", cache_type_v="f32") as (backend, _):
        for question in ("How do I add a LoRA?", "What is Weft?", "Wie spät ist es? 🧵"):
            chat = [{"role": "user", "content": question}]
            inputs = tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            with torch.no_grad():
                output = model.generate(**inputs, max_new_tokens=48, do_sample=False)[0]
            expected = output[inputs["input_ids"].shape[1] :]
            text, result = say(backend, question, sampling=Sampling(temperature=0, max_tokens=48))
            assert result.prompt_tokens == inputs["input_ids"].shape[1]
            assert text == tokenizer.decode(expected, skip_special_tokens=True)


def test_second_turn_reads_only_what_is_new(tiny):
    history = "the sea is near the shore and here is the rain " * 8
    with loaded(tiny) as (backend, _), loaded(tiny) as (fresh, _):
        answer, first = say(backend, history)
        assert first.reused_tokens == 0
        again, second = say(backend, history, answer, "and then")
        expected, whole = say(fresh, history, answer, "and then")
        assert second.reused_tokens >= first.prompt_tokens + first.tokens - 1
        assert second.prompt_tokens - second.reused_tokens < 30
        assert whole.reused_tokens == 0
        assert again and abs(len(expected) - len(again)) < 64


def test_reused_history_gives_the_same_answer(tiny):
    """Where the history is tokenized as it was generated, the answers are equal to the letter."""
    question, answer = "the sea " * 20, "is near"
    with loaded(tiny) as (backend, _), loaded(tiny) as (fresh, _):
        say(backend, question, answer, "one")
        text, result = say(backend, question, answer, "two")
        expected, whole = say(fresh, question, answer, "two")
        assert text == expected
        assert whole.reused_tokens == 0 and result.reused_tokens > result.prompt_tokens // 2


def test_the_same_prompt_again_decodes_its_last_token_only(tiny):
    with loaded(tiny) as (backend, _):
        text, first = say(backend, "the sea is here")
        again, second = say(backend, "the sea is here")
        assert again == text
        assert second.reused_tokens == first.prompt_tokens - 1


def test_making_an_answer_anew_and_changing_the_question_read_no_history(tiny):
    with loaded(tiny) as (backend, _):
        answer, first = say(backend, "the sea is near the shore")
        _, second = say(backend, "the sea is near the shore", answer, "and then")
        _, anew = say(backend, "the sea is near the shore", answer, "and then")
        assert anew.reused_tokens == second.prompt_tokens - 1
        _, changed = say(backend, "the sea is near the shore", answer, "or not")
        assert changed.reused_tokens >= first.prompt_tokens + first.tokens - 1


def test_a_prompt_that_grows_in_the_middle_of_a_word_is_tokenized_whole(tiny):
    with loaded(tiny) as (backend, _), Bare(tiny.path) as bare:
        for text in ("the r", "the rain", "the rain is", "the rain island"):
            write_on(backend, text, Sampling(temperature=0, max_tokens=1))
            expected = bare.tokenize(text)
            assert backend._prompts.said[-1].tokens[: len(expected)] == expected


def test_continuing_an_answer_goes_on_where_it_stopped(tiny):
    with loaded(tiny) as (backend, _):
        whole, _ = say(backend, "the sea", sampling=Sampling(temperature=0, max_tokens=24))
        head, first = say(backend, "the sea", sampling=Sampling(temperature=0, max_tokens=10))
        tail, second = say(
            backend, "the sea", head, sampling=Sampling(temperature=0, max_tokens=14), continue_last=True
        )
        assert whole.startswith(head)
        assert second.prompt_tokens >= first.prompt_tokens and second.reused_tokens >= first.prompt_tokens - 1
        assert head + tail == whole or "�" in whole  # a character that was cut in two stays cut


def test_beginning_of_sequence_is_never_doubled(tiny, tmp_path):
    bare = tiny_gguf.write(tmp_path / "bare.gguf", template="{% for m in messages %}{{ m.content }}{% endfor %}")
    for entry in (tiny, bare):
        with loaded(entry) as (backend, _):
            say(backend, "the sea")
            assert backend._context.tokens[:2].count(1) == 1 and backend._context.tokens[0] == 1
            write_on(backend, "<s>the sea")
            assert backend._context.tokens[:2].count(1) == 1


def test_a_file_without_a_template_says_so_and_answers(tmp_path):
    entry = tiny_gguf.write(tmp_path / "plain.gguf", template="")
    with loaded(entry) as (backend, event):
        assert not event.has_template and any("template" in note for note in event.notes)
        assert say(backend, "the sea")[1].tokens == 32


def test_cancel_in_the_middle_of_a_prompt(larger):
    with loaded(larger, n_ctx=4096, n_batch=4096) as (backend, _):
        report, cancelled_at = Recorder(), [0.0]

        def cancel() -> None:
            cancelled_at[0] = time.perf_counter()
            report.cancel()

        timer = threading.Timer(0.3, cancel)
        timer.start()
        result = backend.generate(Generate(prompt="the sea is near " * 800, sampling=GREEDY), report)
        ended = time.perf_counter()
        timer.join()
        assert result.finish_reason == "cancelled" and result.tokens == 0
        assert cancelled_at[0], "the prompt was read before Cancel came"
        print(f"cancel took {1000 * (ended - cancelled_at[0]):.1f} ms")
        assert ended - cancelled_at[0] < 2  # milliseconds on a quiet machine; the whole prompt takes many seconds
        # What is in the cache afterwards is right: the same prompt gives the same answer as in a fresh engine.
        short = "the sea is near " * 100
        text, _ = write_on(backend, short)
    with loaded(larger, n_ctx=4096, n_batch=4096) as (fresh, _):
        assert write_on(fresh, short)[0] == text


def test_a_cancelled_prompt_goes_on_from_the_last_whole_batch(larger):
    prompt = "the sea is near " * 200
    with loaded(larger, n_ctx=4096, n_batch=64) as (backend, _):
        report = Recorder()
        report.on_progress = lambda phase: report.cancel() if len(report.phases) == 3 else None
        result = backend.generate(Generate(prompt=prompt, sampling=GREEDY), report)
        assert result.finish_reason == "cancelled"
        kept = len(backend._context.tokens)
        assert kept == 3 * 64
        text, again = write_on(backend, prompt)
        assert again.reused_tokens == kept
    with loaded(larger, n_ctx=4096, n_batch=64) as (fresh, _):
        assert write_on(fresh, prompt)[0] == text


def test_cancel_in_the_middle_of_an_answer(larger):
    with loaded(larger, n_ctx=2048) as (backend, _):
        report = Recorder()
        report.at = (10, report.cancel)
        started = time.perf_counter()
        result = backend.generate(Generate(prompt="the sea", sampling=Sampling(temperature=0, max_tokens=1500)), report)
        assert result.finish_reason == "cancelled"
        assert 10 <= result.tokens <= 12 and report.count == result.tokens
        assert time.perf_counter() - started < 10
        after, _ = write_on(backend, "the sea")
    with loaded(larger, n_ctx=2048) as (fresh, _):
        assert write_on(fresh, "the sea")[0] == after


def test_cancel_while_loading(larger):
    from app.backends.llama_cpp import Backend

    backend, report = Backend(), Recorder()
    report.on_progress = lambda phase: (
        report.cancel() if phase == "Reading the model" and len(report.phases) > 4 else None
    )
    with pytest.raises(WeftError) as caught:
        backend.load(Load(model=larger), report)
    assert caught.value.kind is ErrorKind.CANCELLED
    with pytest.raises(WeftError, match="No model"):
        backend.generate(Generate(prompt="x"), Recorder())


def test_characters_in_pieces_arrive_whole(tiny):
    """Every character outside of ASCII is spelt in byte tokens here."""
    wanted = "Größe 🧵 織り"
    grammar = f'root ::= "{wanted}"'
    with loaded(tiny) as (backend, _):
        report = Recorder()
        result = backend.generate(Generate(prompt="the", sampling=Sampling(temperature=0, grammar=grammar)), report)
        assert report.text == wanted and result.finish_reason == "stop"
        assert not any("�" in piece for piece in report.pieces)
        assert result.tokens > len(wanted)
        cut = Sampling(temperature=0, grammar='root ::= "🧵"', max_tokens=3)
        assert write_on(backend, "the", cut)[0] == "�"  # three of four bytes: said so, and nothing lost


def test_overflow_drops_the_oldest_turns(tiny):
    turns = [text for i in range(30) for text in (f"the sea {i} " * 3, "is near")]
    with loaded(tiny, n_ctx=512) as (backend, event):
        assert event.context == 512
        messages = (Message(role="system", content="be near"), *conversation(*turns, "and then"))
        report = Recorder()
        result = backend.generate(Generate(messages=messages, sampling=GREEDY, reserve=64), report)
        assert result.dropped_messages > 0 and result.prompt_tokens <= 512 - 32
        assert result.tokens == 32
        kept = backend._model
        text = b"".join(kept.piece(token) for token in backend._context.tokens).decode("utf-8", "replace")
        assert "be near" in text and "and then" in text and "sea 0 " not in text


def test_an_answer_ends_where_the_context_does(tiny):
    with loaded(tiny, n_ctx=256) as (backend, event):
        prompt = "the sea " * 40
        _, result = write_on(backend, prompt, Sampling(temperature=0))
        assert result.finish_reason in ("length", "stop")
        assert result.prompt_tokens + result.tokens <= event.context
        with pytest.raises(WeftError) as caught:
            write_on(backend, "the sea " * 400)
        assert caught.value.kind is ErrorKind.BAD_INPUT and caught.value.hint


def reference_nll(entry: ModelEntry, text: str, window: int, stride: int) -> tuple[float, int]:
    """Every token scored once, one token at a time, with as much before it as its window holds."""
    import numpy

    with Bare(entry.path, context=max(256, window)) as bare:
        tokens = bare.tokenize(text, special=False)
        scores: dict[int, float] = {}
        step = min(stride or window - 1, window - 1)
        end = min(window, len(tokens))
        while True:
            start = max(0, end - window)
            bare.library.llama_memory_clear(bare.library.llama_get_memory(bare.context), True)
            for i in range(start, end - 1):
                bare.decode([tokens[i]])
                logits = bare.logits().astype(numpy.float64)
                logits -= logits.max()
                scores.setdefault(i + 1, float(numpy.log(numpy.exp(logits).sum()) - logits[tokens[i + 1]]))
            if end == len(tokens):
                return sum(scores.values()) / len(scores), len(scores)
            end = min(end + step, len(tokens))


@pytest.mark.parametrize(("window", "stride"), [(64, 0), (64, 16), (32, 32), (0, 0), (500, 7)])
def test_perplexity_equals_a_plain_loop(tiny, window, stride):
    text = "the rain is on the shore and the tea is hot; 織り <s> " * 6
    expected, count = reference_nll(tiny, text, window or 2048, stride)
    with loaded(tiny, cache_type_k="f16", n_batch=96) as (backend, _):
        result = backend.score(Score(text=text, window=window, stride=stride), Recorder())
    assert result.tokens == count
    assert result.nll == pytest.approx(expected, abs=1e-3)
    assert result.perplexity == pytest.approx(math.exp(result.nll))


def test_perplexity_refuses_what_it_cannot_score_and_can_be_stopped(larger):
    with loaded(larger, n_ctx=512) as (backend, _):
        for request in (Score(text=""), Score(text="the sea " * 9, window=1), Score(text="the sea " * 9, window=600)):
            with pytest.raises(WeftError) as caught:
                backend.score(request, Recorder())
            assert caught.value.kind is ErrorKind.BAD_INPUT
        report = Recorder()
        report.on_progress = lambda _: report.cancel()
        with pytest.raises(WeftError) as caught:
            backend.score(Score(text="the sea is near " * 500, window=128), report)
        assert caught.value.kind is ErrorKind.CANCELLED
        assert write_on(backend, "the sea")[1].tokens == 32


def test_unloading_gives_the_memory_back(larger):
    import psutil

    process = psutil.Process()
    with loaded(larger, n_ctx=8192, no_mmap=True) as (backend, event):
        held = process.memory_info().rss
        backend.unload()
        assert process.memory_info().rss < held - event.memory * 0.7
        backend.unload()
        with pytest.raises(WeftError, match="No model"):
            write_on(backend, "x")
