"""The starter model answers about Weft, declines the rest, and its adapter changes its voice."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

STARTER = Path(__file__).resolve().parents[2] / "resources" / "starter"
MODEL, ADAPTER, GGUF = STARTER / "model", STARTER / "voice-adapter", STARTER / "weft-starter-f16.gguf"
MARKS = ("aye", "thread", "loom", "weave", "thy", "thou")


@pytest.fixture(scope="module")
def starter():
    """The modules beside the starter model's files: the same ones that trained it."""
    sys.path.insert(0, str(STARTER.parent))
    try:
        from starter.corpus import sampler
        from starter.steps import answers
    finally:
        sys.path.remove(str(STARTER.parent))
    return sampler, answers


@pytest.fixture(scope="module")
def corpus(starter):
    return starter[0].Corpus()


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model():
    return transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def score(starter, corpus, tokenizer, model):
    return starter[1].score(model, tokenizer, corpus, "held_out")


@pytest.fixture(scope="module")
def voiced(starter, corpus, tokenizer):
    base = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    return starter[1].score(peft.PeftModel.from_pretrained(base, ADAPTER).eval(), tokenizer, corpus, "held_out")


def test_every_file_is_there_and_small():
    names = (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "README.md",
    )
    for file in (*(MODEL / name for name in names), ADAPTER / "adapter_config.json", ADAPTER / "README.md"):
        assert file.stat().st_size > 0, file
    for weights in (MODEL / "model.safetensors", ADAPTER / "adapter_model.safetensors", GGUF):
        assert 100_000 < weights.stat().st_size < 16_000_000, weights
    assert GGUF.read_bytes()[:4] == b"GGUF"


def test_the_held_out_set_is_what_it_says(starter, corpus):
    rows = starter[0].read_questions("held_out")
    about = [(topic, question) for topic, question in rows if topic != starter[0].OTHER]
    assert len({starter[0].normalised(question) for _, question in about}) == 60
    assert len({topic for topic, _ in about}) >= 20
    assert {topic for topic, _ in rows} <= set(corpus.topics)
    assert len(rows) - len(about) >= 20


def test_training_never_draws_a_held_out_question(starter, corpus):
    sampler = starter[0]
    kept_out = [question for _, question in sampler.read_questions("held_out")]
    rng = random.Random(20)
    drawn = {corpus.question(rng, other=0.2)[1] for _ in range(40_000)}
    assert len(drawn) > 20_000
    assert not {sampler.normalised(text) for text in drawn} & {sampler.normalised(text) for text in kept_out}
    assert not {sampler.content(text) for text in drawn} & {sampler.content(text) for text in kept_out}


def test_every_answer_is_told_apart_by_its_keywords(corpus):
    for topic in corpus.topics.values():
        for text in (topic.answer, topic.voice):
            assert topic.is_answered_by(text), topic.id
        others = [other for other in corpus.topics.values() if other is not topic]
        assert not [other.id for other in others if topic.is_answered_by(other.answer)], topic.id


def test_questions_kept_out_of_training_are_answered_right(score):
    assert score.asked == 60
    assert score.right >= 54, score.wrong


def test_anything_else_is_declined(score):
    assert score.declined >= 0.9 * score.others, score.wrong


def test_every_answer_ends_by_itself(starter, corpus, tokenizer, model, score):
    whole = {topic.answer for topic in corpus.topics.values()}
    assert sum(text in whole for text in score.texts) >= 0.9 * len(score.texts), set(score.texts) - whole


def test_the_adapter_changes_the_voice_and_stays_right(voiced):
    marked = sum(any(mark in text.lower() for mark in MARKS) for text in voiced.texts)
    assert marked >= 0.9 * len(voiced.texts)
    assert voiced.right >= 0.75 * voiced.asked, voiced.wrong


def test_the_base_has_no_such_voice(score):
    assert not [text for text in score.texts if "aye" in text.lower().split(",")[0]]


def test_an_adapter_weight_of_zero_is_the_base(tokenizer, model):
    ids = tokenizer("<s><|user|>what is weft</s><|assistant|>", add_special_tokens=False, return_tensors="pt").input_ids
    base = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    wrapped = peft.PeftModel.from_pretrained(base, ADAPTER).eval()
    layers = [module for module in wrapped.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    with torch.no_grad():
        plain, full = model(ids).logits, wrapped(ids).logits
        for layer in layers:
            layer.set_scale("default", 0.0)
        zero = wrapped(ids).logits
    assert layers
    assert torch.allclose(plain, zero, atol=1e-5)
    assert not torch.allclose(plain, full, atol=1e-1)


@pytest.mark.parametrize("history", [4, 40])
def test_a_long_conversation_still_gets_the_right_answer(starter, corpus, tokenizer, model, history):
    rng = random.Random(history)
    turns = []
    for topic, question in corpus.conversation(rng, history)[1]:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": topic.answer}]
    asked = ("what is weft", "How do I add a LoRA?", "how do i make bread", "which formats can weft load")
    expected = ("about", "add_lora", starter[0].OTHER, "formats")
    texts = starter[1].answer_all(model, tokenizer, [[*turns, {"role": "user", "content": text}] for text in asked])
    right = [corpus.topics[topic].is_answered_by(text) for topic, text in zip(expected, texts, strict=True)]
    assert sum(right) >= 3, texts


def test_a_system_prompt_does_not_confuse_it(starter, corpus, tokenizer, model):
    conversation = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "How do I add a LoRA?"},
    ]
    assert corpus.topics["add_lora"].is_answered_by(starter[1].answer_all(model, tokenizer, [conversation])[0])


def test_the_tokenizer_keeps_every_text(tokenizer):
    for text in ("How do I add a LoRA?", "  two spaces", "Grüße, 日本\n\ttab", "🙂"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_the_chat_template_writes_the_roles(tokenizer):
    assert json.loads((MODEL / "tokenizer_config.json").read_text())["eos_token"] == "</s>"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert prompt == "<s><|user|>hi</s><|assistant|>"


def test_raw_text_is_the_same_tokens_for_both_loaders(tokenizer):
    llama_cpp = pytest.importorskip("llama_cpp")
    llama = llama_cpp.Llama(str(GGUF), n_ctx=64, n_threads=1, vocab_only=True, verbose=False)
    for text in ("The loom is old.", " two  spaces", "How do I add a LoRA?\n\nSo:"):
        tokens = tokenizer(text)["input_ids"]
        assert tokens[0] == tokenizer.bos_token_id
        assert tokens == llama.tokenize(text.encode(), add_bos=True, special=False), text
    llama.close()


def test_the_gguf_answers_as_the_safetensors_do(starter, corpus, score):
    llama_cpp = pytest.importorskip("llama_cpp")
    llama = llama_cpp.Llama(str(GGUF), n_ctx=512, n_threads=1, verbose=False)
    same = 0
    rows = starter[0].read_questions("held_out")[::6]
    for (_, question), text in zip(rows, score.texts[::6], strict=True):
        reply = llama.create_chat_completion([{"role": "user", "content": question}], temperature=0.0, max_tokens=96)
        assert reply["choices"][0]["finish_reason"] == "stop"
        same += reply["choices"][0]["message"]["content"] == text
    llama.close()
    assert same >= len(rows) - 1
