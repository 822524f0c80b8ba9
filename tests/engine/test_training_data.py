"""Masks against references written by hand, for every format and the templates of common families; previews; packs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest

from app.core.errors import ErrorKind, WeftError
from app.tasks import preview_data
from app.training.batches import plan_epoch, split
from app.training.data_config import DataConfig, PreviewParameters
from app.training.encode import MASKED, Encoded, encode
from app.training.preview import spans
from app.training.preview_text import render
from app.training.rows import load_rows
from app.training.templates import NAMED
from app.training.tokenizer import load_tokenizer
from tests import seeds
from tests.engine import tiny_models
from tests.engine.backend_kit import FakeReport

STARTER = Path(__file__).resolve().parents[2] / "resources/starter/model"
WORDS = "the warp holds Zwölf größe 織り機 🧵 threads, and weft! (42) naïve def f(x): ok".split()
MARKS = """<|im_start|> <|im_end|> <|start_header_id|> <|end_header_id|> <|eot_id|> <start_of_turn> <end_of_turn>
<|user|> <|assistant|> <|system|> <|end|> <|endoftext|> <think> </think> <|User|> <|Assistant|>""".split()

# Templates as the families ship them, cut down to text messages.
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (  # v0.3: the system prompt stands before the last question, wherever that is
    "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}"
    "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}{{- bos_token }}"
    "{%- for message in loop_messages %}{%- if message['role'] == 'user' %}"
    "{%- if loop.last and system_message is defined %}{{- '[INST] ' + system_message + '\\n\\n' + message['content'] + '[/INST]' }}"
    "{%- elif loop.index0 == loop_messages|length - 2 and system_message is defined %}"
    "{{- '[INST] ' + system_message + '\\n\\n' + message['content'] + '[/INST]' }}"
    "{%- else %}{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}"
    "{%- else %}{{- ' ' + message['content'] + eos_token }}{%- endif %}{%- endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
PHI_3 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
DEEPSEEK_R1 = (  # drops reasoning of all turns, and opens it for the next
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{% set content = m['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}{{ '<|Assistant|>' + content + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}"
)
QWEN_3 = (  # keeps the reasoning of the last turn only, and writes an empty one where there is none
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}{% if m.role == 'assistant' %}{% set content = m.content %}{% set reasoning = '' %}"
    "{% if '</think>' in content %}{% set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.last %}{{ '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{% else %}{{ content }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GENERATION = (
    "{%- for m in messages %}\n    {%- if m.role == 'assistant' %}\n        {{- '<|im_start|>assistant\n' }}"
    "{%- generation -%}{{ m.content + '<|im_end|>' }}{%- endgeneration -%}\n        {{- '\n' }}\n"
    "    {%- else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GENERATION_SHORT = GENERATION.replace(
    "{{ m.content + '<|im_end|>' }}{%- endgeneration -%}", "{{ m.content }}{%- endgeneration -%}{{ '<|im_end|>' }}"
)


def words(rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 8)))


def tokenizer(template: str | None, kind: str = "byte") -> Any:
    made = tiny_models.byte_tokenizer() if kind == "byte" else tiny_models.sentencepiece_tokenizer()
    made.add_special_tokens({"additional_special_tokens": MARKS[:-4]})
    made.add_tokens(MARKS[-4:])
    made.chat_template = template
    return made


def encoded(tmp_path: Path, records: list[dict[str, Any]], made: Any, **options: Any) -> Encoded:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = DataConfig(files=(str(path),), **options)
    return encode(load_rows(config), made, config)


def shown(made: Any, data: Encoded, number: int = 0) -> list[tuple[str, bool]]:
    """Text and whether it is trained; masked and trained pieces take turns."""
    example = data.examples[number]
    assert all(label in (MASKED, token) for token, label in zip(example.input_ids, example.labels, strict=True))
    pieces, _ = spans(made, list(example.input_ids), [label != MASKED for label in example.labels])
    return [(piece.text, piece.trained) for piece in pieces]


def reference(text: str) -> list[tuple[str, bool]]:
    """`masked⟦trained⟧masked` as pieces."""
    found = []
    for part in text.split("⟦"):
        inside, closed, outside = part.partition("⟧")
        found += [(inside, True), (outside, False)] if closed else [(part, False)]
    return [piece for piece in found if piece[0]]


T = "<think>\nhm\n</think>\n\n"
CASES: dict[str, tuple[str, str, str]] = {
    # name: template, two turns with a system prompt (s, q, a, q2, b), by hand
    "chatml": (
        tiny_models.CHATML,
        "<|im_start|>system\n{s}<|im_end|>\n<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n⟦{a}<|im_end|>⟧\n"
        "<|im_start|>user\n{q2}<|im_end|>\n<|im_start|>assistant\n⟦{b}<|im_end|>⟧\n",
        "",
    ),
    "llama 2": (
        LLAMA_2,
        "<s>[INST] <<SYS>>\n{s}\n<</SYS>>\n\n{q} [/INST]⟦ {a} </s>⟧<s>[INST] {q2} [/INST]⟦ {b} </s>⟧",
        "",
    ),
    "llama 3": (
        LLAMA_3,
        "<s><|start_header_id|>system<|end_header_id|>\n\n{s}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{q}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦{a}<|eot_id|>⟧<|start_header_id|>user<|end_header_id|>\n\n{q2}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦{b}<|eot_id|>⟧",
        "",
    ),
    "mistral": (MISTRAL, "<s>[INST] {q}[/INST]⟦ {a}</s>⟧[INST] {s}\n\n{q2}[/INST]⟦ {b}</s>⟧", ""),
    "gemma": (
        GEMMA,
        "<s><start_of_turn>user\n{s}\n\n{q}<end_of_turn>\n<start_of_turn>model\n⟦{a}<end_of_turn>⟧\n"
        "<start_of_turn>user\n{q2}<end_of_turn>\n<start_of_turn>model\n⟦{b}<end_of_turn>⟧\n",
        "no system prompt",
    ),
    "phi 3": (
        PHI_3,
        "<|system|>\n{s}<|end|>\n<|user|>\n{q}<|end|>\n<|assistant|>\n⟦{a}<|end|>⟧\n<|user|>\n{q2}<|end|>\n"
        "<|assistant|>\n⟦{b}<|end|>⟧\n</s>",
        "",
    ),
    "generation tag": (
        GENERATION,
        "<|im_start|>system\n{s}<|im_end|>\n<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n⟦{a}<|im_end|>⟧\n"
        "<|im_start|>user\n{q2}<|im_end|>\n<|im_start|>assistant\n⟦{b}<|im_end|>⟧\n",
        "",
    ),
    "generation tag without the end": (
        GENERATION_SHORT,
        "<|im_start|>system\n{s}<|im_end|>\n<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n⟦{a}<|im_end|>⟧\n"
        "<|im_start|>user\n{q2}<|im_end|>\n<|im_start|>assistant\n⟦{b}<|im_end|>⟧\n",
        "",
    ),
    "named llama-2": (
        NAMED["llama-2"],
        "<s>[INST] <<SYS>>\n{s}\n<</SYS>>\n\n{q} [/INST]⟦ {a} </s>⟧<s>[INST] {q2} [/INST]⟦ {b} </s>⟧",
        "",
    ),
    "named mistral": (NAMED["mistral"], "<s>[INST] {s}\n\n{q} [/INST]⟦ {a}</s>⟧[INST] {q2} [/INST]⟦ {b}</s>⟧", ""),
    "named vicuna": (NAMED["vicuna"], "<s>{s}\n\nUSER: {q} ASSISTANT:⟦ {a}</s>⟧USER: {q2} ASSISTANT:⟦ {b}</s>⟧", ""),
    "named alpaca": (
        NAMED["alpaca"],
        "<s>{s}\n\n### Instruction:\n{q}\n\n### Response:\n⟦{a}</s>⟧\n\n### Instruction:\n{q2}\n\n### Response:\n⟦{b}</s>⟧\n\n",
        "",
    ),
    "named zephyr": (
        NAMED["zephyr"],
        "<|system|>\n{s}</s>\n<|user|>\n{q}</s>\n<|assistant|>\n⟦{a}</s>⟧\n<|user|>\n{q2}</s>\n<|assistant|>\n⟦{b}</s>⟧\n",
        "",
    ),
    "named chatml": (
        NAMED["chatml"],
        "<|im_start|>system\n{s}<|im_end|>\n<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n⟦{a}<|im_end|>⟧\n"
        "<|im_start|>user\n{q2}<|im_end|>\n<|im_start|>assistant\n⟦{b}<|im_end|>⟧\n",
        "",
    ),
    "named llama-3": (
        NAMED["llama-3"],
        "<s><|start_header_id|>system<|end_header_id|>\n\n{s}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{q}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦{a}<|eot_id|>⟧<|start_header_id|>user<|end_header_id|>\n\n{q2}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦{b}<|eot_id|>⟧",
        "",
    ),
    "named gemma": (
        NAMED["gemma"],
        "<s><start_of_turn>user\n{s}\n\n{q}<end_of_turn>\n<start_of_turn>model\n⟦{a}<end_of_turn>⟧\n"
        "<start_of_turn>user\n{q2}<end_of_turn>\n<start_of_turn>model\n⟦{b}<end_of_turn>⟧\n",
        "no system prompt",
    ),
    "named phi-3": (
        NAMED["phi-3"],
        "<|system|>\n{s}<|end|>\n<|user|>\n{q}<|end|>\n<|assistant|>\n⟦{a}<|end|>⟧\n<|user|>\n{q2}<|end|>\n"
        "<|assistant|>\n⟦{b}<|end|>⟧\n",
        "",
    ),
}
assert {f"named {name}" for name in NAMED} <= set(CASES), "a template without a reference"


@pytest.fixture
def rng() -> random.Random:
    seed = seeds.fresh(1 << 32)
    print(f"seed {seed}")
    return random.Random(seed)


@pytest.mark.parametrize("kind", ["byte", "sentencepiece"])
@pytest.mark.parametrize("name", list(CASES))
def test_masks_of_a_conversation_equal_the_reference(tmp_path: Path, rng: random.Random, name: str, kind: str) -> None:
    template, wanted, notes = CASES[name]
    made = tokenizer(template, kind)

    def plain(pieces: list[tuple[str, bool]]) -> list[tuple[str, bool]]:
        if kind == "byte":
            return pieces
        # This tokenizer puts a blank behind special tokens, which its text shows.
        return [("".join(text.split()), trained) for text, trained in pieces if text.strip()]

    for _ in range(2):
        texts = {key: words(rng) for key in ("s", "q", "a", "q2", "b")}
        roles = ("system", "user", "assistant", "user", "assistant")
        record = {"messages": [{"role": r, "content": c} for r, c in zip(roles, texts.values(), strict=True)]}
        data = encoded(tmp_path, [record], made)
        assert plain(shown(made, data)) == plain(reference(wanted.format(**texts)))
        assert notes in " ".join(data.report.notes)
        assert data.report.trained_tokens == sum(label != MASKED for label in data.examples[0].labels)


@pytest.mark.parametrize(
    ("template", "answers", "wanted"),
    [
        (DEEPSEEK_R1, (T + "a", T + "b"), "<s><|User|>q<|Assistant|>⟦\n\na</s>⟧<|User|>q<|Assistant|>⟦\n\nb</s>⟧"),
        (
            QWEN_3,
            (T + "a", T + "b"),
            "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n⟦a<|im_end|>⟧\n<|im_start|>user\nq<|im_end|>\n"
            f"<|im_start|>assistant\n⟦{T}b<|im_end|>⟧\n",
        ),
        (
            QWEN_3,
            ("b",),
            "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nb<|im_end|>⟧\n",
        ),
    ],
)
def test_templates_that_rewrite_reasoning(tmp_path: Path, template: str, answers: tuple[str, ...], wanted: str) -> None:
    """What stands there is trained as it stands there; where that cannot be known for sure, the row or the turn is left out."""
    made = tokenizer(template)
    spoken = [m for a in answers for m in ({"role": "user", "content": "q"}, {"role": "assistant", "content": a})]
    data = encoded(tmp_path, [{"messages": spoken}], made)
    got = shown(made, data)
    if data.report.notes:  # only the last answer: then the earlier ones are masked, and it is said
        assert "only the last answer" in data.report.notes[0]
        assert [p for p in got if p[1]] == [p for p in reference(wanted) if p[1]][-1:]
    else:
        assert got == reference(wanted)


ALPACA = {"instruction": "q", "input": "i", "output": "a", "system": "s", "history": [["h", "b"]]}
C = "<|im_start|>{}\n{}<|im_end|>\n".format


@pytest.mark.parametrize(
    ("record", "wanted", "options"),
    [
        (
            ALPACA,
            C("system", "s") + C("user", "h") + "<|im_start|>assistant\n⟦b<|im_end|>⟧\n" + C("user", "q\ni")
            + "<|im_start|>assistant\n⟦a<|im_end|>⟧\n",
            {},
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            C("system", "default") + C("user", "q") + "<|im_start|>assistant\n⟦a<|im_end|>⟧\n",
            {"system": "default"},
        ),
        ({"prompt": "q", "completion": "a"}, C("user", "q") + "<|im_start|>assistant\n⟦a<|im_end|>⟧\n", {}),
        ({"prompt": "q", "completion": " a"}, "q⟦ a</s>⟧", {"plain_prompts": True}),
        ({"text": "the warp"}, "⟦the warp</s>⟧", {}),
        ({"prompt": "q", "completion": "a"}, C("user", "⟦q") + "<|im_start|>assistant\na<|im_end|>\n⟧", {"response_only": False}),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0},
                          {"role": "user", "content": "r"}, {"role": "assistant", "content": "b"}]},
            C("user", "q") + C("assistant", "a") + C("user", "r") + "<|im_start|>assistant\n⟦b<|im_end|>⟧\n",
            {},
        ),
    ],
)  # fmt: skip
def test_masks_of_every_format_equal_the_reference(
    tmp_path: Path, record: dict[str, Any], wanted: str, options: dict[str, Any]
) -> None:
    made = tokenizer(tiny_models.CHATML)
    got = shown(made, encoded(tmp_path, [record], made, **options))
    if options.get("response_only") is False:  # everything but the first token, which nothing predicts
        assert got[0] == ("<|im_start|>", False) and got[1][1] and len(got) == 2
    elif "text" in record:
        # nothing predicts the first token
        assert "".join(text for text, _ in got) == "the warp</s>" and got[-1][1] and not got[0][1] and len(got) == 2
    else:
        assert got == reference(wanted)


def test_the_starters_own_template(tmp_path: Path) -> None:
    made = load_tokenizer(STARTER)
    data = encoded(tmp_path, [ALPACA], made)
    wanted = "<s><|system|>s</s><|user|>h</s><|assistant|>⟦b</s>⟧<|user|>q\ni</s><|assistant|>⟦a</s>⟧"
    assert shown(made, data) == reference(wanted)
    assert data.report.template == "the model's own"


@pytest.mark.parametrize("kind", ["byte", "sentencepiece"])
def test_without_offsets_the_masks_are_the_same(
    tmp_path: Path, rng: random.Random, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tokenizer(tiny_models.CHATML, kind)
    record = {"prompt": words(rng), "completion": words(rng)}
    fast = shown(made, encoded(tmp_path, [record], made))
    monkeypatch.setattr(type(made), "is_fast", False)
    slow = shown(made, encoded(tmp_path, [record], made))
    assert [(t.strip(), flag) for t, flag in slow] == [(t.strip(), flag) for t, flag in fast]


def test_no_token_is_lost_at_the_edge_of_an_answer(tmp_path: Path) -> None:
    """A blank that grows together with the first word must not take the word out of the loss."""
    made = tokenizer(
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        "sentencepiece",
    )
    data = encoded(tmp_path, [{"prompt": "the warp", "completion": "weft threads"}], made)
    trained = "".join(text for text, flag in shown(made, data) if flag)
    assert "weft threads" in trained


def test_a_template_that_hides_answers_is_refused_row_by_row(tmp_path: Path) -> None:
    made = tokenizer("{% for m in messages | reverse %}{{ m.content }}{% endfor %}")
    with pytest.raises(WeftError, match="cannot be found") as caught:
        encoded(
            tmp_path,
            [{"messages": [{"role": "assistant", "content": "abc"}, {"role": "assistant", "content": "d"}]}],
            made,
        )
    assert caught.value.kind == ErrorKind.BAD_INPUT and "data.jsonl:1" in caught.value.message


def test_a_chosen_template_wins_and_unknown_names_are_refused(tmp_path: Path) -> None:
    made = tokenizer(tiny_models.CHATML)
    data = encoded(tmp_path, [{"prompt": "q", "completion": "a"}], made, template="zephyr")
    assert shown(made, data) == reference("<|user|>\nq</s>\n<|assistant|>\n⟦a</s>⟧\n")
    with pytest.raises(WeftError, match="zephir"):
        encoded(tmp_path, [{"prompt": "q", "completion": "a"}], made, template="zephir")


# Lengths, raw text, preferences -----------------------------------------------------------------------


def test_long_rows_are_counted_and_cut_or_dropped(tmp_path: Path, rng: random.Random) -> None:
    made = tokenizer(tiny_models.CHATML)
    records = [
        {"prompt": "q", "completion": "a"},
        {"prompt": "q", "completion": "warp " * 200},
        {"prompt": "warp " * 200, "completion": "a"},
    ]
    data = encoded(tmp_path, records, made, max_length=40)
    assert (data.report.too_long, data.report.too_long_dropped) == (2, 1)  # of the third no answer is left
    assert [len(e.input_ids) for e in data.examples][1] == 40 and data.report.longest > 200
    data = encoded(tmp_path, records, made, max_length=40, too_long="drop")
    assert len(data.examples) == 1 and data.report.too_long_dropped == 2
    assert sum(count for _, count in data.report.histogram) == 1


def test_raw_text_is_trained_once_with_overlap_as_context(tmp_path: Path, rng: random.Random) -> None:
    made = tokenizer(None)
    text = " ".join(words(rng) for _ in range(60))
    (tmp_path / "book.txt").write_text(text)
    for _ in range(5):
        length, overlap = rng.randint(8, 100), rng.randint(0, 40)
        config = DataConfig(files=(str(tmp_path / "book.txt"),), max_length=length, overlap=overlap)
        data = encode(load_rows(config), made, config)
        learnt, before = [data.examples[0].input_ids[0]], None
        for example in data.examples:
            assert len(example.input_ids) <= length
            learnt += [label for label in example.labels if label != MASKED]
            if before is not None:
                overlapping = min(overlap, length // 2)
                first = next((n for n, label in enumerate(example.labels) if label != MASKED), 0)
                if overlapping:
                    assert first == overlapping
                    assert example.input_ids[:overlapping] == before[-overlapping:]
            before = example.input_ids
        whole = made(text)["input_ids"] + [made.eos_token_id]
        missing = (
            0 if min(overlap, length // 2) else len(data.examples) - 1
        )  # without overlap nothing predicts a block's first token
        assert len(learnt) == len(whole) - missing
        if not missing:
            assert learnt == whole


def test_preferences_share_their_prompt(tmp_path: Path) -> None:
    made = tokenizer(tiny_models.CHATML)
    records: list[dict[str, Any]] = [
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}],
         "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "bad"}]},
    ]  # fmt: skip
    data = encoded(tmp_path, records, made)
    assert data.preference and not data.examples
    for pair in data.pairs:
        assert made.decode(pair.prompt_ids) == C("user", "q") + "<|im_start|>assistant\n"
        assert made.decode(pair.chosen_ids) == "good<|im_end|>"
        assert made.decode(pair.rejected_ids) == "bad<|im_end|>"
    data = encoded(tmp_path, records[:1], made, plain_prompts=True)
    assert made.decode(data.pairs[0].prompt_ids) == "q"
    assert made.decode(data.pairs[0].chosen_ids) == "good</s>"
    with pytest.raises(WeftError, match="preferences"):
        (tmp_path / "other").mkdir()
        (tmp_path / "other/b.jsonl").write_text('{"prompt": "q", "completion": "a"}\n')
        (tmp_path / "other/a.jsonl").write_text(json.dumps(records[0]))
        config = DataConfig(files=(str(tmp_path / "other"),))
        encode(load_rows(config), made, config)


def test_held_out_files_are_the_held_out_side(tmp_path: Path) -> None:
    made = tokenizer(tiny_models.CHATML)
    (tmp_path / "held.jsonl").write_text(
        '{"prompt": "q", "completion": "a"}\n{"prompt": "r", "completion": "a"}\n{bad\n'
    )
    data = encoded(
        tmp_path,
        [{"prompt": "q", "completion": "a"}, {"prompt": "x", "completion": "a"}],
        made,
        held_out_files=(str(tmp_path / "held.jsonl"),),
    )
    config = DataConfig(held_out_files=("x",))
    assert split(data, config) == ([1], [2, 3])  # the row that is held out too is not trained on
    assert data.report.bad_rows[0].file.endswith("held.jsonl") and len(data.report.files) == 2
    assert data.report.files[data.examples[3].file].file.endswith("held.jsonl")


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="the core environment's layer for training is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")

    spoken = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    table = pyarrow.Table.from_pylist([{"messages": spoken}, {"messages": []}, {"messages": spoken}])
    parquet.write_table(table, tmp_path / "x.parquet")
    config = DataConfig(files=(str(tmp_path / "x.parquet"),))
    made = tokenizer(tiny_models.CHATML)
    data = encode(load_rows(config), made, config)
    assert shown(made, data) == reference(C("user", "q") + "<|im_start|>assistant\n⟦a<|im_end|>⟧\n")
    assert [(bad.line, bad.reason) for bad in data.report.bad_rows] == [(2, "messages is missing or empty.")]
    (tmp_path / "x.parquet").write_bytes((tmp_path / "x.parquet").read_bytes()[:-20])
    rows = load_rows(config)
    assert list(rows) == [] and "Parquet" in rows.report.files[0].problem


@pytest.mark.attack
def test_a_book_as_a_conversation_is_a_bad_row(tmp_path: Path) -> None:
    made = tokenizer(tiny_models.CHATML)
    records = [
        {"prompt": "q", "completion": "a"},
        {"prompt": "q", "completion": "a " * 3_000_000},
        {"prompt": "r", "completion": "a"},
    ]
    data = encoded(tmp_path, records, made)
    assert [example.line for example in data.examples] == [1, 3]
    assert "6,000,001 characters" in data.report.bad_rows[0].reason and data.report.bad_rows[0].line == 2
    assert (data.report.kept, data.report.bad) == (2, 1)


@pytest.mark.attack
@pytest.mark.parametrize(
    ("template", "kind"),
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
            ErrorKind.HOSTILE,
        ),
        ("{{ messages[0].content.__class__.__mro__ }}", ErrorKind.HOSTILE),
        ("{% for m in messages %}", ErrorKind.CORRUPT),
        ("{{ raise_exception('no') }}", ErrorKind.BAD_INPUT),
    ],
)
def test_templates_that_attack_fail_or_refuse(tmp_path: Path, template: str, kind: ErrorKind) -> None:
    with pytest.raises(WeftError) as caught:
        encoded(tmp_path, [{"prompt": "q", "completion": "a"}] * 3, tokenizer(template))
    assert caught.value.kind == kind and caught.value.hint


def test_many_rows_in_a_row_give_what_each_gives_alone(tmp_path: Path, rng: random.Random) -> None:
    """Rendering ahead, in one go, changes nothing; a row that the template refuses spoils no other."""
    made = tokenizer(LLAMA_2)
    records = []
    for _ in range(300):
        turns = rng.randint(1, 3)
        spoken = [
            m
            for _ in range(turns)
            for m in ({"role": "user", "content": words(rng)}, {"role": "assistant", "content": words(rng)})
        ]
        records.append({"messages": spoken[rng.random() < 0.1 :]})
    data = encoded(tmp_path, records, made, max_length=100_000)
    for number in rng.sample(range(len(data.examples)), 4):
        alone = encoded(tmp_path, [records[data.examples[number].line - 1]], made, max_length=100_000)
        assert alone.examples[0].input_ids == data.examples[number].input_ids
        assert alone.examples[0].labels == data.examples[number].labels


# Preview ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["byte", "sentencepiece"])
def test_preview_spans_join_to_the_tokenizers_text(rng: random.Random, kind: str) -> None:
    """Wherever learning begins and ends, also inside a character."""
    made = tokenizer(None, kind)
    for _ in range(60):
        ids = made(words(rng))["input_ids"]
        trained = [rng.random() < 0.5 for _ in ids]
        pieces, cut = spans(made, ids, trained)
        assert "".join(piece.text for piece in pieces) == made.decode(ids)
        assert not any("\ufffd" in piece.text for piece in pieces) and not cut
        shortened, cut = spans(made, ids, trained, longest=5)
        assert sum(len(piece.text) for piece in shortened) <= 5 and cut == (len(made.decode(ids)) > 5 or len(ids) > 5)


def test_preview_task(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"Question {n}", "completion": f"Answer {n}"}) for n in range(40)]
    (tmp_path / "x.jsonl").write_text("\n".join([*lines, "{bad", lines[0]]))
    parameters = PreviewParameters(
        data=DataConfig(files=(str(tmp_path / "x.jsonl"),)), model=str(STARTER), first=3, wanted=(39, 77, 1)
    )
    report = FakeReport()
    result = preview_data.run(msgspec.json.decode(msgspec.json.encode(parameters), type=PreviewParameters), report)
    assert [example.number for example in result.examples] == [0, 1, 2, 39]
    assert [span.text for span in result.examples[3].spans if span.trained] == ["Answer 39</s>"]
    assert result.examples[3].line == 40
    assert (result.report.rows, result.report.kept, result.report.bad, result.report.duplicates) == (42, 41, 1, 1)
    assert result.report.held_out >= 2
    text = render(result)
    assert "⟦Answer 39</s>⟧" in text and "x.jsonl:41: It is not JSON" in text
    (tmp_path / "x.jsonl").write_text("{bad\n")
    result = preview_data.run(parameters, report)
    assert result.examples == () and result.report.bad == 1


def test_preview_shows_no_control_characters_to_a_terminal() -> None:
    from app.training.data_config import DataReport, PreviewExample, PreviewResult, PreviewSpan

    example = PreviewExample(
        number=0, file="x", line=1, tokens=1, trained_tokens=1, spans=(PreviewSpan("\x1b[2J a", True),)
    )
    assert "\x1b" not in render(PreviewResult(examples=(example,), report=DataReport()))


def test_reading_can_be_cancelled(tmp_path: Path) -> None:
    made = tokenizer(tiny_models.CHATML)
    (tmp_path / "x.jsonl").write_text('{"prompt": "q", "completion": "a"}\n' * 200)
    config = DataConfig(files=(str(tmp_path / "x.jsonl"),))
    with pytest.raises(WeftError) as caught:
        encode(load_rows(config), made, config, cancelled=lambda: True)
    assert caught.value.kind == ErrorKind.CANCELLED


def test_steps_cover_encoded_examples(tmp_path: Path, rng: random.Random) -> None:
    made = tokenizer(tiny_models.CHATML)
    data = encoded(tmp_path, [{"prompt": words(rng), "completion": words(rng)} for _ in range(50)], made)
    train, held = split(data, DataConfig())
    lengths = [len(data.examples[n].input_ids) for n in train]
    steps = plan_epoch(lengths, DataConfig(max_length=256), epoch=0, rows=2, accumulation=4, packing=True)
    assert len(train) + len(held) == 50 and len(steps) == -(-len(train) // 8)
