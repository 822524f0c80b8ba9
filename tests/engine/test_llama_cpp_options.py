"""llama.cpp: every option reaches the library, every sampling field does what it says, grammars bind the answer."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed in this interpreter")
pytest.importorskip("gguf")

from app.backends.llama_cpp import SPEC  # noqa: E402
from app.core.errors import ErrorKind, WeftError  # noqa: E402
from app.core.library import ModelEntry, ModelShape  # noqa: E402
from app.core.options import describe  # noqa: E402
from app.core.sampling import Sampling  # noqa: E402
from app.generation import llama_options  # noqa: E402
from app.generation.llama_options import Options  # noqa: E402
from app.generation.llama_params import context_params  # noqa: E402
from app.generation.llama_rules import rope_base  # noqa: E402
from tests.engine import tiny_gguf  # noqa: E402
from tests.engine.llama_helpers import loaded, say, write_on  # noqa: E402

PROMPT = "the rain is on the shore and the tea is hot"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> ModelEntry:
    return tiny_gguf.write(
        tmp_path_factory.mktemp("gguf") / "tiny.gguf", hidden=128, heads=4, kv_heads=4, intermediate=256
    )


@pytest.fixture(scope="module")
def backend(tiny):
    with loaded(tiny, n_ctx=1024) as (backend, _):
        yield backend


def answer(backend, **fields) -> str:
    fields.setdefault("max_tokens", 48)
    return write_on(backend, PROMPT, Sampling(**fields))[0]


def tokens(backend, **fields) -> list[int]:
    answer(backend, **fields)
    return backend._prompts.said[-1].tokens[-48:]


# Load options

SAME = [  # options that change how, not what is computed
    {"no_mmap": True},
    {"direct_io": True},
    {"mlock": True},
    {"mlock": True, "no_mmap": True},
    {"threads": 2, "threads_batch": 1},
    {"n_batch": 16},
    {"n_batch": 64, "n_ubatch": 8},
    {"flash_attention": "off"},
    {"flash_attention": "on"},
    {"swa_full": False},
    {"check_tensors": True},
    {"repack": False},
    {"cpu": True},
    {
        "n_gpu_layers": 99,
        "main_gpu": 0,
        "split_mode": "none",
        "tensor_split": "1",
        "offload_kqv": False,
        "op_offload": False,
    },
    {"split_mode": "row"},
    {"cache_type_k": "f32", "cache_type_v": "f32"},
    {"cache_type_k": "bf16", "cache_type_v": "f16", "flash_attention": "off"},
    {"no_mul_mat_q": True, "logits_all": True},
    {"seed": 7},
    {"override_kv": "general.name=str:other\nllama.context_length=int:4096"},
]


@pytest.mark.parametrize("options", SAME, ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()).replace("\n", ";"))
def test_options_that_must_not_change_the_answer(tiny, backend, options):
    expected = tokens(backend, temperature=0, max_tokens=24)[-24:]
    with loaded(tiny, **{"n_ctx": 1024, **options}) as (other, _):
        assert tokens(other, temperature=0, max_tokens=24)[-24:][:6] == expected[:6]


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"])
def test_every_cache_type_answers_and_takes_the_memory_that_is_said(tiny, kind):
    with loaded(tiny, n_ctx=1024, cache_type_k=kind, cache_type_v=kind) as (backend, _):
        assert len(answer(backend, temperature=0)) > 0
        per_token = 2 * 4 * 32 * 2  # layers, heads, head_dim, keys and values
        taken = sum(size for (_, purpose), size in backend._log.buffers.items() if purpose == "KV")
        assert taken == pytest.approx(1024 * per_token * llama_options.CACHE_BYTES[kind], abs=0.006 * 2**20)


def test_a_chosen_chat_template_goes_before_the_models_own(tmp_path):
    """As the hint of a template that fails says; `chatml` stands for the plain one."""
    broken = tiny_gguf.write(tmp_path / "model.gguf", template="{{ raise_exception('no') }}")
    with loaded(broken) as (backend, _), pytest.raises(WeftError) as caught:
        say(backend, "the sea")
    assert "chat_template" in caught.value.hint
    plain = "<|im_start|>user\nthe sea<|im_end|>\n<|im_start|>assistant\n"
    for option, prompt in ((" ChatML ", plain), ("{{ messages[0].content }}!", "the sea!")):
        with loaded(broken, chat_template=option) as (backend, event):
            text, result = say(backend, "the sea")
            assert event.has_template and not any("template" in note for note in event.notes)
            assert result.prompt_tokens == len(backend._model.with_bos(backend._model.tokenize(prompt)))
            assert write_on(backend, prompt)[0].lstrip() == text.lstrip()


def test_rope_options_change_the_answer(tiny, backend):
    plain = tokens(backend, temperature=0)
    for options in (
        {"rope_freq_base": 500.0},
        {"rope_freq_scale": 0.25},
        {"compress_pos_emb": 4.0},
        {"alpha_value": 8.0},
        {"rope_scaling": "yarn", "rope_freq_scale": 0.25, "yarn_orig_ctx": 256, "yarn_ext_factor": 1.0},
    ):
        with loaded(tiny, n_ctx=1024, **options) as (other, _):
            assert tokens(other, temperature=0) != plain, options


def test_two_ways_to_say_the_same_stretch_are_equal(tiny):
    with loaded(tiny, rope_freq_scale=0.25) as (one, _), loaded(tiny, compress_pos_emb=4.0) as (other, _):
        assert tokens(one, temperature=0) == tokens(other, temperature=0)
    with pytest.raises(WeftError, match="compress_pos_emb"), loaded(tiny, rope_freq_scale=0.5, compress_pos_emb=4.0):
        pass


def test_alpha_is_the_ntk_formula():
    base = rope_base(Options(alpha_value=2.5), 10_000.0, ModelShape(head_dim=128))
    assert base == pytest.approx(10_000 * 2.5 ** (128 / 126))
    assert rope_base(Options(), 10_000.0, ModelShape()) == 0


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"flash_attention": "off", "cache_type_v": "q8_0"}, "flash attention"),
        ({"tensor_split": "a,b"}, "tensor_split"),
        ({"tensor_split": "0,0"}, "tensor_split"),
        ({"tensor_split": ",".join(["1"] * 500)}, "tensor_split"),
        ({"override_kv": "nonsense"}, "override_kv"),
        ({"override_kv": "a=int:x"}, "override_kv"),
        ({"override_kv": "a" * 200 + "=int:1"}, "override_kv"),
        ({"n_ctx": 4}, "n_ctx"),
        ({"cache_type_k": "q1"}, "cache_type_k"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_wrong_options_are_refused_by_name(tiny, options, word):
    with pytest.raises(WeftError) as caught, loaded(tiny, **options):
        pass
    assert caught.value.kind is ErrorKind.BAD_INPUT and caught.value.hint
    assert word in caught.value.message


def test_every_field_of_the_options_is_used():
    """An option that nothing reads is a promise that is not kept."""
    root = Path(llama_options.__file__).parents[1]
    files = [*(root / "generation").glob("llama_*.py"), root / "backends" / "llama_cpp.py"]
    source = "\n".join(path.read_text("utf-8").split('"""', 2)[-1] for path in files)
    for field in describe(Options):
        used = (
            f"options.{field.name}" in source or f'"{field.name}"' in source or f"self._options.{field.name}" in source
        )
        assert used or f"self.{field.name}" in source or field.replaced, field.name
        assert field.help.endswith((".", "")) and field.title and (not field.optional or field.automatic), field.name


def test_options_arrive_in_the_librarys_parameters(tiny):
    options = Options(
        n_batch=96, n_ubatch=32, threads=3, threads_batch=4, cache_type_k="q8_0", cache_type_v="bf16", flash_attention="on",
        rope_freq_base=5e5, rope_freq_scale=0.5, rope_scaling="yarn", yarn_orig_ctx=99, yarn_ext_factor=0.5,
        yarn_attn_factor=1.5, yarn_beta_fast=30.0, yarn_beta_slow=2.0, swa_full=False, offload_kqv=False, op_offload=False,
    )  # fmt: skip
    with loaded(tiny) as (backend, _):
        params = context_params(llama_cpp, backend._model, options, context=640, cores=8)
    assert (params.n_ctx, params.n_batch, params.n_ubatch, params.n_threads, params.n_threads_batch) == (
        640,
        96,
        32,
        3,
        4,
    )
    assert (params.type_k, params.type_v) == (llama_cpp.GGML_TYPE_Q8_0, 30)
    assert params.flash_attn_type == 1 and params.rope_scaling_type == llama_cpp.LLAMA_ROPE_SCALING_TYPE_YARN
    assert (params.rope_freq_base, params.rope_freq_scale, params.yarn_orig_ctx) == (5e5, 0.5, 99)
    assert (params.yarn_ext_factor, params.yarn_attn_factor) == (0.5, 1.5)
    assert (params.yarn_beta_fast, params.yarn_beta_slow) == (30.0, 2.0)
    assert not (params.swa_full or params.offload_kqv or params.op_offload)


def test_the_automatic_context_is_the_trained_one_capped_by_memory(tiny, tmp_path, monkeypatch):
    from app.generation import llama_machine

    huge = tiny_gguf.write(tmp_path / "huge.gguf", context=131_072)
    with loaded(huge) as (_, event):
        assert event.context == 131_072
    monkeypatch.setattr(llama_machine, "free_memory", lambda: 80 * 2**20)
    with loaded(huge) as (_, event):
        assert 2048 <= event.context < 131_072
        assert any("131,072" in note for note in event.notes)
    with loaded(huge, n_ctx=65_536) as (_, event):
        assert event.context == 65_536


def test_gpu_layers_without_a_gpu_are_said_to_have_no_effect(tiny):
    if llama_cpp.llama_supports_gpu_offload():
        pytest.skip("this llama.cpp can use a GPU")
    with loaded(tiny, n_gpu_layers=10) as (_, event):
        assert any("GPU" in note for note in event.notes)


def test_the_gpu_takes_as_many_layers_as_fit(tiny, monkeypatch):
    """Without a GPU this shows the choice; that the library follows it needs one."""
    from app.generation import llama_machine, llama_open

    assert llama_machine.free_gpu_memory() >= 0
    every = tiny.shape.layers + 1
    with loaded(tiny, n_ctx=1024):
        monkeypatch.setattr(llama_cpp, "llama_supports_gpu_offload", lambda: True)
        chosen = []
        for free in (0, 10**6, 10**10):
            monkeypatch.setattr(llama_machine, "free_gpu_memory", lambda free=free: free)
            chosen.append(llama_open.place(llama_cpp, tiny, Options(n_ctx=1024))[0].n_gpu_layers)
        assert chosen[0] == 0 and chosen[-1] == every and sorted(chosen) == chosen
        assert llama_open.place(llama_cpp, tiny, Options(n_gpu_layers=1))[0].n_gpu_layers == 1
        assert llama_open.place(llama_cpp, tiny, Options(cpu=True)) == (Options(cpu=True), 0)


def test_threads_are_measured_where_they_are_left_open(tiny):
    with loaded(tiny, threads=None) as (backend, event):
        assert event.device.startswith("CPU, ")
        assert 1 <= llama_cpp.llama_n_threads(backend._context.pointer) <= 64


# Sampling


def test_all_sampling_fields_are_served():
    assert SPEC.sampling == {field.name for field in msgspec.structs.fields(Sampling)}


def test_the_seed_decides(backend):
    wild = {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    assert tokens(backend, seed=5, **wild) == tokens(backend, seed=5, **wild)
    assert tokens(backend, seed=5, **wild) != tokens(backend, seed=6, **wild)
    assert tokens(backend, **wild) != tokens(backend, **wild)


def test_the_seed_of_the_load_makes_a_session_repeatable(tiny):
    runs = []
    for _ in range(2):
        with loaded(tiny, seed=11) as (backend, _):
            runs.append([tokens(backend, temperature=1.5), tokens(backend, temperature=1.5)])
    assert runs[0] == runs[1] and runs[0][0] != runs[0][1]


@pytest.mark.parametrize("fields", [{"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}], ids=str)
def test_the_narrowest_choice_is_the_likeliest_token(backend, fields):
    wide = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0, "seed": 3}
    assert tokens(backend, **{**wide, **fields}) == tokens(backend, temperature=0)
    assert tokens(backend, **wide) != tokens(backend, temperature=0)


@pytest.mark.parametrize("field", ["top_k", "top_p", "min_p", "typical_p", "temperature"])
def test_each_cut_changes_what_is_drawn(backend, field):
    value = {"top_k": 3, "top_p": 0.3, "min_p": 0.3, "typical_p": 0.2, "temperature": 0.3}[field]
    wide = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 1.5}
    assert any(tokens(backend, **wide, seed=s) != tokens(backend, **{**wide, field: value}, seed=s) for s in range(4))


def test_penalties_change_repetition(backend):
    def repeats(**fields) -> int:
        answer(backend, temperature=0, max_tokens=300, **fields)
        made = backend._prompts.said[-1].tokens[-300:]
        return len(made) - len(set(made))

    plain = repeats()
    assert plain > 100, "the model does not repeat itself: nothing to test"
    assert repeats(repetition_penalty=5.0) < plain
    assert repeats(frequency_penalty=2.0, penalty_range=-1) < plain
    assert repeats(presence_penalty=2.0, penalty_range=-1) < plain
    assert repeats(dry_multiplier=5.0, dry_allowed_length=1) < plain
    assert tokens(backend, temperature=0, repetition_penalty=5.0, penalty_range=0) == tokens(backend, temperature=0)
    assert tokens(backend, temperature=0, dry_multiplier=5.0, dry_range=0) == tokens(backend, temperature=0)
    narrow = tokens(backend, temperature=0, repetition_penalty=5.0, penalty_range=1)
    assert narrow != tokens(backend, temperature=0, repetition_penalty=5.0, penalty_range=-1)
    gentle = tokens(backend, temperature=0, dry_multiplier=5.0, dry_allowed_length=100, dry_base=1.1)
    assert gentle == tokens(backend, temperature=0)


def test_penalties_see_the_prompt(backend):
    """As in llama.cpp's own programs: a token of the prompt counts as seen."""
    first = tokens(backend, temperature=0, max_tokens=1)[-1]
    spelt = backend._model.piece(first).decode()
    prompt = PROMPT + spelt * 6
    with_prompt = write_on(backend, prompt, Sampling(temperature=0, max_tokens=8, repetition_penalty=5.0))
    without = write_on(backend, prompt, Sampling(temperature=0, max_tokens=8))
    assert with_prompt[0] != without[0]


def test_stop_strings_end_the_answer_before_they_appear(backend):
    whole = answer(backend, temperature=0)
    middle = whole[len(whole) // 2 : len(whole) // 2 + 3]
    text, result = write_on(backend, PROMPT, Sampling(temperature=0, max_tokens=48, stop=f"zzz\n{middle}"))
    assert text == whole[: whole.index(middle)]
    assert result.finish_reason == "stop"


def test_the_longest_answer_is_exact(backend):
    for most in (1, 2, 17):
        text, result = write_on(backend, PROMPT, Sampling(temperature=0, max_tokens=most))
        assert result.tokens == most and result.finish_reason == "length" and text


# Grammars

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 8},
        "age": {"type": "integer"},
        "kind": {"enum": ["cat", "dog"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "kind", "tags"],
}


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_grammar_binds_the_answer(backend, temperature):
    for seed in range(4):
        text = answer(backend, temperature=temperature, seed=seed, grammar='root ::= ("yes" | "no") " " [0-9]{2,4} "!"')
        head, _, digits = text.partition(" ")
        assert head in ("yes", "no") and digits.endswith("!") and 2 <= len(digits) - 1 <= 4 and digits[:-1].isdigit()


def test_a_json_schema_binds_the_answer(backend):
    for seed in range(4):
        sampling = Sampling(temperature=0.7, seed=seed, json_schema=json.dumps(SCHEMA), max_tokens=900)
        text, result = write_on(backend, PROMPT, sampling)
        if result.finish_reason == "length":
            continue  # a random model may write blanks for ever
        value = json.loads(text)
        assert set(value) == {"name", "age", "kind", "tags"} and value["kind"] in ("cat", "dog")
        assert isinstance(value["age"], int) and 1 <= len(value["tags"]) <= 3 and 1 <= len(value["name"]) <= 8
        return
    pytest.fail("no answer ended")


@pytest.mark.attack
@pytest.mark.parametrize(
    "grammar",
    [
        "root ::= ",  # well-formed, and every answer to it is empty
        'root ::= a "" | ()\na ::= b?\nb ::= ""\nunused ::= "x"',
        'root ::= "a',
        "root ::= [a-",
        "root ::= (",
        "root ::= undefined",
        "root = 'a'",
        'other ::= "a"',
        'root ::= root "a"',
        'root ::= a\na ::= b "x"\nb ::= a | "y"',
        'root ::= "" root',
        'root ::= "a"{5000}',
        'root ::= "a"{1000}{1000}',
        'root ::= "a"{3,1}',
        'root ::= "\\q"',
        'root ::= "\\x4"',
        "root ::= " + "(" * 5000 + '"a"' + ")" * 5000,
        "\n".join(f"r{i} ::= r{i + 1}" for i in range(3000)) + '\nr3000 ::= "a"\nroot ::= r0',
        "root ::= \0",
        "%llguidance {}",
        'root ::= "a"\n' + "# " * 200_000,
        "root ::= *",
        "root ::= [b-a]",
        "x" * 1000,
    ],
    ids=lambda g: g[:24].replace("\n", " "),
)
def test_malformed_grammars_are_refused(backend, grammar):
    with pytest.raises(WeftError) as caught:
        answer(backend, temperature=0, grammar=grammar)
    assert caught.value.kind is ErrorKind.BAD_INPUT and "grammar" in caught.value.message.lower()
    assert len(answer(backend, temperature=0)) > 0


@pytest.mark.attack
@pytest.mark.parametrize(
    "schema",
    [
        "not json",
        "[]",
        "3",
        '{"$ref": "https://127.0.0.1/x.json"}',
        '{"$ref": "#/missing"}',
        '{"type": "nonsense"}',
        '{"type": "string", "pattern": "("}',
        "[" * 100_000,
        '{"type": "array", "items": ' * 2000 + "{}" + "}" * 2000,
        '{"type": "string", "maxLength": 100000000}',
    ],
    ids=lambda s: s[:24],
)
def test_unusable_schemas_are_refused(backend, schema):
    with pytest.raises(WeftError) as caught:
        answer(backend, temperature=0, json_schema=schema)
    assert caught.value.kind is ErrorKind.BAD_INPUT and caught.value.hint


def test_a_grammar_and_a_schema_at_once_are_refused(backend):
    with pytest.raises(WeftError, match="at once"):
        answer(backend, grammar='root ::= "a"', json_schema="{}")


def test_a_grammar_in_a_chat(backend):
    text, result = say(
        backend, "is it so?", sampling=Sampling(temperature=0, grammar='root ::= "yes" | "no"', max_tokens=9)
    )
    assert text in ("yes", "no") and result.finish_reason == "stop"
