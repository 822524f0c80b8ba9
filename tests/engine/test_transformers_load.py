"""The Transformers loader loads: every format and option, with proof that each did what it says; bad files are refused."""

# ruff: noqa: E402 (imports that need torch come after the check that it is there)

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed in this interpreter")
transformers = pytest.importorskip("transformers", reason="transformers is not installed in this interpreter")

from app.backends.transformers import SPEC, Backend
from app.core.errors import ErrorKind, WeftError
from app.core.library import ModelEntry, ModelFormat
from app.core.memory import Machine
from app.core.options import describe
from app.engine.protocol import Load
from app.generation import hf_memory, hf_plan
from app.generation.hf_memory import parse_gpu_memory
from app.generation.hf_options import Options
from tests.engine import tiny_models
from tests.engine.backend_kit import FakeReport, ask, loaded

TEXT = "The warp is held under tension while the weft is drawn through it."


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def plain(root: Path) -> ModelEntry:
    return tiny_models.make(root / "plain", seed=2)


@pytest.fixture(scope="module")
def sharded(root: Path) -> ModelEntry:
    return tiny_models.make(root / "sharded", seed=2, shards=True, num_hidden_layers=8, dtype=torch.bfloat16)


def logits(backend: Backend, text: str = TEXT) -> torch.Tensor:
    """[tokens, vocabulary] of the whole text, through the model as it is loaded."""
    ids = torch.tensor([backend._prompts.encode(text, True)])
    with torch.inference_mode():
        return backend._model(input_ids=ids).logits[0].float()


def net(model: ModelEntry, **arguments: object) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(model.path, **{"dtype": torch.float32, **arguments}).eval()


def reference(module: torch.nn.Module, backend: Backend, text: str = TEXT) -> torch.Tensor:
    ids = torch.tensor([backend._prompts.encode(text, True)])
    with torch.inference_mode():
        return module(input_ids=ids).logits[0].float()


def refused(model: ModelEntry, kind: ErrorKind, match: str, trust: bool = False, **options: object) -> WeftError:
    backend, report = Backend(), FakeReport()
    with pytest.raises(WeftError, match=match) as error:
        backend.load(Load(model=model, options=options, trust_remote_code=trust), report)  # type: ignore[arg-type]
    assert error.value.kind is kind and error.value.hint and not report.events
    assert backend._model is None and backend._stage is None
    return error.value


def copy(model: ModelEntry, to: Path) -> tuple[Path, ModelEntry]:
    shutil.copytree(model.path, to)
    files = tuple(str(to / Path(f).name) for f in model.files)
    changed = {"id": str(to), "path": str(to), "files": files}
    import msgspec

    return to, msgspec.structs.replace(model, **changed)


def edit(path: Path, change: Callable[[dict[str, object]], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


# Options ------------------------------------------------------------------------------------------

SEED = """gpu_memory cpu_memory compute_dtype quant_type alpha_value rope_freq_base compress_pos_emb cpu load_in_8bit bf16
auto_devices disk load_in_4bit trust_remote_code no_use_fast use_flash_attention_2 disable_exllama use_double_quant"""


def test_every_option_of_the_old_loader_is_here() -> None:
    fields = {f.name: f for f in describe(Options)}
    assert set(SEED.split()) <= set(fields)
    for field in fields.values():
        assert field.title and len(field.help) > 20, field.name
        assert not field.optional or field.automatic, field.name
    assert fields["no_use_fast"].replaced and fields["disable_exllama"].replaced


def test_gpu_memory_reads_what_people_write() -> None:
    assert parse_gpu_memory("10,8") == parse_gpu_memory("10GiB 8 gb") == [10.0, 8.0]
    for bad in ("", "much", "-1", "nan", "10,x"):
        with pytest.raises(WeftError, match="gpu_memory"):
            parse_gpu_memory(bad)


def test_a_load_says_what_it_did(plain: ModelEntry) -> None:
    report = FakeReport()
    backend = Backend()
    backend.load(Load(model=plain), report)
    event = report.events[0]
    assert event.context == 512 and event.device.startswith("CPU") and event.seconds > 0 and event.has_template
    assert event.notes == ()
    assert any(phase == "Loading the weights" and total > 20 and done == total for phase, done, total in report.phases)
    assert {"torch", "transformers"} <= set(backend.libraries())
    backend.unload()
    assert backend._model is None
    backend.unload()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, torch.bfloat16),
        ({"dtype": "float32"}, torch.float32),
        ({"dtype": "float16"}, torch.float16),
        ({"bf16": True}, torch.bfloat16),
        ({"cpu": True}, torch.float32),
        ({"cpu": True, "dtype": "bfloat16"}, torch.bfloat16),
    ],
)
def test_precision(sharded: ModelEntry, options: dict[str, object], expected: torch.dtype) -> None:
    with loaded(Backend(), sharded, **options) as (backend, _):  # type: ignore[arg-type]
        assert {p.dtype for p in backend._model.parameters()} == {expected}
        whole = reference(net(sharded), backend)
        close = 1e-4 if expected is torch.float32 else 0.35
        assert float((logits(backend) - whole).abs().max()) < close * float(whole.std() + 1)


def test_float16_on_a_processor_is_read_as_bfloat16_and_that_is_said(tmp_path: Path) -> None:
    model = tiny_models.make(tmp_path / "half", dtype=torch.float16)
    with loaded(Backend(), model) as (backend, event):
        if torch.cuda.is_available():
            pytest.skip("this machine has a graphics card, which keeps float16")
        assert backend._model.dtype is torch.bfloat16
        assert any("bfloat16" in note for note in event.notes)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention(plain: ModelEntry, attention: str) -> None:
    with loaded(Backend(), plain, attention=attention) as (backend, _):
        assert backend._model.config._attn_implementation == attention
        assert torch.allclose(logits(backend), reference(net(plain), backend), atol=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="concerns machines without a graphics card")
def test_options_that_can_do_nothing_here_say_why(plain: ModelEntry) -> None:
    options = {"use_flash_attention_2": True, "gpu_memory": "10", "disk": True, "use_double_quant": True}
    with loaded(Backend(), plain, **options) as (backend, event):  # type: ignore[arg-type]
        told = " ".join(event.notes)
        for word in ("Flash attention 2 needs", "gpu_memory has no effect", "disk has no effect", "use_double_quant"):
            assert word in told
        assert ask(backend, TEXT)[1].tokens


def test_threads(plain: ModelEntry) -> None:
    before = torch.get_num_threads()
    try:
        with loaded(Backend(), plain, threads=1) as (_, event):
            assert torch.get_num_threads() == 1 and event.device == "CPU, 1 thread"
    finally:
        torch.set_num_threads(before)


def test_bad_options_are_named(plain: ModelEntry) -> None:
    refused(plain, ErrorKind.BAD_INPUT, "load_in_8bit and load_in_4bit", load_in_4bit=True, load_in_8bit=True)
    refused(plain, ErrorKind.BAD_INPUT, "contex_length", contex_length=5)
    refused(plain, ErrorKind.BAD_INPUT, "dtype", dtype="float8")


def test_a_new_load_takes_the_place_of_the_old(plain: ModelEntry, sharded: ModelEntry) -> None:
    with loaded(Backend(), plain) as (backend, _):
        first, _ = ask(backend, TEXT)
        backend.load(Load(model=sharded), FakeReport())
        assert backend._model.config.num_hidden_layers == 8
        assert ask(backend, TEXT)[1].reused_tokens == 0
        backend.load(Load(model=plain), FakeReport())
        assert ask(backend, TEXT)[0] == first


def test_loading_can_be_cancelled(sharded: ModelEntry) -> None:
    backend = Backend()
    report = FakeReport(lambda r: any(phase == "Loading the weights" and done > 3 for phase, done, _ in r.phases))
    with pytest.raises(WeftError) as error:
        backend.load(Load(model=sharded), report)
    assert error.value.kind is ErrorKind.CANCELLED and backend._model is None


# Formats ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [False, True])
def test_bin_files_give_the_same_model(tmp_path: Path, shards: bool) -> None:
    one = tiny_models.make(tmp_path / "a", seed=4, shards=shards)
    two = tiny_models.make(tmp_path / "b", seed=4, shards=shards, form="bin")
    assert two.format is ModelFormat.TORCH_BIN and (len(two.files) > 1) == shards
    with loaded(Backend(), one) as (backend, _):
        expected = logits(backend)
    with loaded(Backend(), two) as (backend, _):
        assert torch.equal(logits(backend), expected)


@pytest.mark.parametrize("options", [{"load_in_8bit": True}, {"load_in_4bit": True}, {"load_in_4bit": True, "quant_type": "fp4"},
                                     {"load_in_4bit": True, "use_double_quant": True, "compute_dtype": "bfloat16"}])  # fmt: skip
def test_bitsandbytes_quantizes_and_stays_close(tmp_path: Path, options: dict[str, object]) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed in this interpreter")
    model = tiny_models.make(
        tmp_path / "m", seed=2, hidden_size=256, intermediate_size=512, num_attention_heads=8, initializer_range=0.05
    )
    with loaded(Backend(), model, **options) as (backend, event):  # type: ignore[arg-type]
        layer = backend._model.model.layers[0].mlp.up_proj
        wanted = "Linear8bitLt" if "load_in_8bit" in options else "Linear4bit"
        assert type(layer).__name__ == wanted and event.notes == ()
        assert layer.weight.dtype in (torch.int8, torch.uint8)
        assert layer.weight.numel() * layer.weight.element_size() <= 256 * 512 * (
            1 if "load_in_8bit" in options else 0.5
        )
        if wanted == "Linear4bit":
            assert layer.weight.quant_type == options.get("quant_type", "nf4")
            assert layer.weight.quant_state.nested == bool(options.get("use_double_quant"))
            assert layer.compute_dtype is (torch.bfloat16 if "compute_dtype" in options else torch.float32)
        exact = reference(dequantized(backend, net(model)), backend)
        whole = reference(net(model), backend)
        for _ in range(2):  # the second time with weights that the first may have repacked
            found = logits(backend)
            # Against the very weights that it stores: only the arithmetic's rounding (bf16 or int8 activations) is left.
            assert distance(found, exact) < (0.06 if wanted == "Linear8bitLt" else 0.04)
            # Against the weights it was made from: what quantization costs on random weights.
            assert distance(found, whole) < {"Linear8bitLt": 0.06}.get(
                wanted, 0.5 if options.get("quant_type") == "fp4" else 0.35
            )
        text, done = ask(backend, TEXT, max_tokens=8)
        assert done.tokens == 8 and text == ask(backend, TEXT, max_tokens=8)[0]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Root mean square difference in standard deviations of `b`."""
    return float((a - b).pow(2).mean().sqrt() / b.std())


def dequantized(backend: Backend, module: torch.nn.Module) -> torch.nn.Module:
    """`module` with the weights that the backend really stores. Before its first forward pass repacks them."""
    import bitsandbytes as bnb

    for name, layer in backend._model.named_modules():
        target = module.get_submodule(name)
        if isinstance(layer, bnb.nn.Linear4bit):
            target.weight.data.copy_(bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state))
        elif isinstance(layer, bnb.nn.Linear8bitLt):
            weight = layer.weight
            target.weight.data.copy_(weight.data.float() * weight.SCB.float()[:, None] / 127)
    return module


def test_a_model_saved_by_bitsandbytes_loads(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed in this interpreter")
    model = tiny_models.make(tmp_path / "m", seed=2, hidden_size=256, intermediate_size=512, num_attention_heads=8)
    quantized = net(
        model, quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    )
    folder, entry = copy(model, tmp_path / "saved")
    (folder / "model.safetensors").unlink()
    quantized.save_pretrained(folder)
    import msgspec

    entry = msgspec.structs.replace(entry, format=ModelFormat.BITSANDBYTES)
    with loaded(Backend(), entry, load_in_8bit=True) as (backend, event):
        assert type(backend._model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
        assert any("no effect" in note for note in event.notes)
        with loaded(Backend(), model, load_in_4bit=True) as (fresh, _):
            assert torch.equal(logits(backend), logits(fresh))


def test_another_quantization_is_left_to_its_loader(plain: ModelEntry, tmp_path: Path) -> None:
    folder, entry = copy(plain, tmp_path / "gptq")
    edit(folder / "config.json", lambda c: c.update(quantization_config={"quant_method": "gptq", "bits": 4}))
    refused(entry, ErrorKind.UNSUPPORTED, "gptq")


# Memory limits and disk ---------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_what_does_not_fit_goes_to_disk_and_answers_the_same(tmp_path: Path, form: str) -> None:
    model = tiny_models.make(tmp_path / "m", seed=2, shards=True, num_hidden_layers=8, form=form)
    with loaded(Backend(), model) as (backend, _):
        expected, _ = ask(backend, TEXT)
        whole = logits(backend)
    limit = model.weight_bytes / 2**30 / 2
    folder = tmp_path / "offload"
    with loaded(Backend(), model, cpu_memory=limit, disk=True, offload_folder=str(folder)) as (backend, event):
        places = backend._model.hf_device_map
        assert {"cpu", "disk"} == set(places.values())
        assert any(p.is_meta for p in backend._model.parameters())
        assert event.device.endswith("+ disk") and any("disk" in note for note in event.notes)
        assert torch.allclose(logits(backend), whole, atol=1e-5)
        text, done = ask(backend, TEXT)
        assert text == expected
        assert ask(backend, TEXT + text, max_tokens=1)[1].reused_tokens >= done.prompt_tokens - 1


def test_a_limit_without_disk_says_what_is_missing(sharded: ModelEntry) -> None:
    error = refused(sharded, ErrorKind.OUT_OF_MEMORY, "limits allow", cpu_memory=0.0005)
    assert "disk" in error.hint


def test_a_limit_that_is_large_enough_changes_nothing(sharded: ModelEntry) -> None:
    with loaded(Backend(), sharded, cpu_memory=2.0, disk=True) as (backend, event):
        assert not any(p.is_meta for p in backend._model.parameters()) and "disk" not in event.device


# Context ------------------------------------------------------------------------------------------


def by_hand(model: ModelEntry, theta: float, factor: float) -> torch.nn.Module:
    """A model whose rotary frequencies are written by hand."""
    module = net(model)
    config = module.config
    dim = config.hidden_size // config.num_attention_heads
    frequencies = torch.tensor([theta ** (-2 * i / dim) / factor for i in range(dim // 2)])
    module.model.rotary_emb.inv_freq.copy_(frequencies)
    return module


@pytest.mark.parametrize(
    ("options", "theta", "factor"),
    [
        ({"alpha_value": 2.5}, 10000 * 2.5 ** (64 / 63), 1),
        ({"rope_freq_base": 1e6}, 1e6, 1),
        ({"rope_freq_base": 1e6, "alpha_value": 2.0}, 1e6, 1),
        ({"compress_pos_emb": 4.0}, 10000, 4),
        ({"compress_pos_emb": 2.0, "alpha_value": 1.75}, 10000 * 1.75 ** (64 / 63), 2),
    ],
)
def test_rope_options_equal_a_model_made_by_hand(
    plain: ModelEntry, options: dict[str, float], theta: float, factor: float
) -> None:
    with loaded(Backend(), plain, **options) as (backend, event):
        parameters = backend._model.config.rope_parameters
        assert parameters["rope_theta"] == pytest.approx(theta)
        assert parameters.get("factor", 1) == factor
        expected = reference(by_hand(plain, theta, factor), backend)
        assert torch.allclose(logits(backend), expected, atol=1e-4)
        assert not torch.allclose(logits(backend), reference(net(plain), backend), atol=1e-3)
        assert event.context == 512 * factor


def test_alpha_starts_from_the_models_own_base(tmp_path: Path) -> None:
    model = tiny_models.make(tmp_path / "m", rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    with loaded(Backend(), model, alpha_value=2.0) as (backend, _):
        assert backend._model.config.rope_parameters["rope_theta"] == pytest.approx(500000 * 2 ** (64 / 63))


def test_a_model_without_rope_says_so_and_keeps_its_positions(tmp_path: Path) -> None:
    model = tiny_models.make(tmp_path / "gpt2", "gpt2", context=64)
    with loaded(Backend(), model, alpha_value=2.0, context_length=100) as (backend, event):
        assert event.context == 64
        assert any("no rotary embedding" in n for n in event.notes) and any("64 positions" in n for n in event.notes)
        _, done = ask(backend, TEXT, max_tokens=None)
        assert done.prompt_tokens + done.tokens <= 64


def test_context_beyond_the_training_is_allowed_and_said(plain: ModelEntry) -> None:
    with loaded(Backend(), plain, context_length=700) as (_, event):
        assert event.context == 700 and any("trained for 512" in n for n in event.notes)


def test_a_context_that_nobody_chose_is_what_memory_allows_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_models.make(tmp_path / "long", context=65_536)
    per_token = 2 * 3 * 2 * 16 * 4  # keys and values, layers, heads, elements, bytes
    ram = model.weight_bytes + hf_memory.PROCESS + hf_memory._activation_bytes(model, 4, 0) + 2 * 4096 * per_token
    for free, expected in (((ram, []), 4096), ((2**40, []), 65_536), ((1, []), 2048)):
        monkeypatch.setattr(hf_plan, "free_memory", lambda _, free=free: free)
        with loaded(Backend(), model) as (_, event):
            assert event.context == expected
            said = [note for note in event.notes if "since memory is short" in note]
            assert bool(said) == (expected < 65_536) and all(f"{expected:,} of them" in note for note in said)
            machine = Machine(system="linux", cpu_count=2, ram_total=2**40, ram_free=free[0])
            estimate = hf_memory.estimate(model, Options(), machine)
            assert estimate.cache == expected * per_token  # what is announced is what is used
        with loaded(Backend(), model, context_length=50_000) as (_, event):
            assert event.context == 50_000


# Damaged and hostile files ------------------------------------------------------------------------


@pytest.mark.fault
def test_a_truncated_file_is_named(sharded: ModelEntry, tmp_path: Path) -> None:
    folder, entry = copy(sharded, tmp_path / "m")
    victim = folder / Path(entry.files[3]).name
    data = victim.read_bytes()
    for size in (len(data) - 1, len(data) // 2, 20, 4, 0):
        victim.write_bytes(data[:size])
        assert victim.name in refused(entry, ErrorKind.CORRUPT, "damaged|complete|trunc|short|cut|ends|bytes").message
    victim.unlink()
    assert victim.name in refused(entry, ErrorKind.NOT_FOUND, "missing").message


@pytest.mark.fault
def test_a_truncated_bin_is_refused(tmp_path: Path) -> None:
    model = tiny_models.make(tmp_path / "m", form="bin")
    victim = Path(model.files[0])
    data = victim.read_bytes()
    for size in (len(data) - 30, len(data) // 2, 10):
        victim.write_bytes(data[:size])
        refused(model, ErrorKind.CORRUPT, victim.name)


@pytest.mark.fault
def test_random_weights_never_answer(plain: ModelEntry, tmp_path: Path) -> None:
    """transformers fills what is missing with random numbers and goes on; Weft does not."""
    from safetensors.torch import load_file, save_file

    folder, entry = copy(plain, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    lost = {k: v for k, v in tensors.items() if "layers.1.mlp.up_proj" not in k}
    save_file(lost, folder / "model.safetensors", metadata={"format": "pt"})
    assert "layers.1.mlp.up_proj" in refused(entry, ErrorKind.CORRUPT, "lack weights").message
    renamed = {k.replace("mlp.up_proj", "mlp.upper"): v for k, v in tensors.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    refused(entry, ErrorKind.CORRUPT, "lack weights")
    wrong = {k: v[:, :32].contiguous() if "q_proj" in k else v for k, v in tensors.items()}
    save_file(wrong, folder / "model.safetensors", metadata={"format": "pt"})
    refused(entry, ErrorKind.CORRUPT, "shape|fit")


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    model = tiny_models.make(tmp_path / "m", "qwen2")
    from safetensors import safe_open

    with safe_open(model.files[0], "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    with loaded(Backend(), model) as (backend, _):
        assert torch.allclose(logits(backend), reference(net(model), backend), atol=1e-4)


MARKED = "from pathlib import Path\nPath(__file__).with_name('owned').touch()\nraise SystemExit('ran')\n"


@pytest.mark.attack
@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("where", ["config", "nested", "tokenizer", "attention", "generate"])
def test_a_models_code_does_not_run(plain: ModelEntry, tmp_path: Path, where: str, trust: bool) -> None:
    """Whether or not the request allows it: the option must be on as well."""
    folder, entry = copy(plain, tmp_path / "m")
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py"):
        (folder / name).write_text(MARKED)
    everything = {
        "AutoConfig": "configuration_evil.Evil",
        "AutoModelForCausalLM": "modeling_evil.Evil",
        "AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"],
    }
    if where == "config":
        edit(folder / "config.json", lambda c: c.update(auto_map=everything, trust_remote_code=True))
    elif where == "nested":
        inner = {"auto_map": everything, "trust_remote_code": True, "_attn_implementation_internal": "evil/kernel"}
        edit(
            folder / "config.json",
            lambda c: c.update(text_config=inner, rope_parameters={**c["rope_parameters"], **inner}),
        )  # type: ignore[dict-item]
    elif where == "tokenizer":
        edit(folder / "tokenizer_config.json", lambda c: c.update(auto_map=everything, trust_remote_code=True))
    elif where == "attention":
        edit(
            folder / "config.json",
            lambda c: c.update(
                _attn_implementation_internal="evil/kernel@main:run",
                attn_implementation="evil/kernel",
                _attn_implementation="evil/kernel",
            ),
        )
    else:
        (folder / "custom_generate").mkdir()
        (folder / "custom_generate" / "generate.py").write_text(MARKED)
        (folder / "custom_generate" / "requirements.txt").write_text("evil\n")
    backend, report = Backend(), FakeReport()
    try:
        backend.load(Load(model=entry, trust_remote_code=trust), report)
        assert ask(backend, TEXT)[1].tokens
        assert backend._model.config._attn_implementation == "sdpa"
    except WeftError as error:
        assert error.hint
    finally:
        backend.unload()
    assert not list(tmp_path.rglob("owned"))


def test_allowed_code_runs(plain: ModelEntry, tmp_path: Path) -> None:
    folder, entry = copy(plain, tmp_path / "m")
    (folder / "modeling_own.py").write_text(
        "import transformers\n\n\nclass OwnConfig(transformers.LlamaConfig):\n    model_type = 'own_llama'\n\n\n"
        "class OwnModel(transformers.LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    names = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    edit(folder / "config.json", lambda c: c.update(auto_map=names, model_type="own_llama"))
    refused(entry, ErrorKind.UNSUPPORTED, "own_llama")
    refused(entry, ErrorKind.UNSUPPORTED, "own_llama", trust=True)
    backend = Backend()
    backend.load(Load(model=entry, options={"trust_remote_code": True}, trust_remote_code=True), FakeReport())
    assert type(backend._model).__name__ == "OwnModel" and ask(backend, TEXT)[1].tokens
    backend.unload()
    edit(folder / "config.json", lambda c: c.update(auto_map={"AutoConfig": "other/repo--modeling_own.OwnConfig"}))
    refused(entry, ErrorKind.HOSTILE, "another repository", trust=True, trust_remote_code=True)


@pytest.mark.attack
@pytest.mark.parametrize(
    "name", ["../../secret.safetensors", "/etc/passwd", "..\\x.safetensors", "sub/x.safetensors", "x.py", ""]
)
def test_an_index_that_names_other_files_is_refused(sharded: ModelEntry, tmp_path: Path, name: str) -> None:
    folder, entry = copy(sharded, tmp_path / "m")
    edit(folder / "model.safetensors.index.json", lambda c: c["weight_map"].update({"lm_head.weight": name}))  # type: ignore[union-attr]
    refused(entry, ErrorKind.HOSTILE, "not a weight file beside it")


@pytest.mark.attack
def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    import pickle

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "owned",))

    model = tiny_models.make(tmp_path / "m", form="bin")
    torch.save({"lm_head.weight": Evil()}, model.files[0])
    refused(model, ErrorKind.HOSTILE, "pytorch_model.bin")
    Path(model.files[0]).write_bytes(pickle.dumps(Evil()))
    refused(model, ErrorKind.HOSTILE, "pytorch_model.bin")
    assert not (tmp_path / "owned").exists()


@pytest.mark.attack
def test_files_beside_the_weights_are_not_read(plain: ModelEntry, tmp_path: Path) -> None:
    """An adapter, a pickle and a distributed checkpoint that merely lie there change nothing."""
    folder, entry = copy(plain, tmp_path / "m")
    (folder / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "base_model_name_or_path": "../../elsewhere", "r": 4}'
    )
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    (folder / ".metadata").write_bytes(b"\x80\x04cos\nsystem\n")
    (folder / "__0_0.distcp").write_bytes(b"x")
    (folder / "generation_config.json").write_text('{"eos_token_id": 1, "custom_generate": "evil/repo"}')
    with loaded(Backend(), entry) as (backend, _):
        assert torch.allclose(logits(backend), reference(net(plain), backend), atol=1e-4)
        assert ask(backend, TEXT)[1].tokens


@pytest.mark.attack
@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**9},
        {"model_type": "no_such"},
        {"vocab_size": -4},
        {"hidden_size": "wide"},
        {"num_attention_heads": 0},
    ],
)
def test_absurd_configs_end_in_an_error(plain: ModelEntry, tmp_path: Path, change: dict[str, object]) -> None:
    folder, entry = copy(plain, tmp_path / "m")
    edit(folder / "config.json", lambda c: c.update(change))
    with pytest.raises(WeftError) as error:
        Backend().load(Load(model=entry), FakeReport())
    assert error.value.kind in (ErrorKind.CORRUPT, ErrorKind.UNSUPPORTED) and error.value.hint


@pytest.mark.fault
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_damaged_json_is_named(plain: ModelEntry, tmp_path: Path, name: str) -> None:
    folder, entry = copy(plain, tmp_path / "m")
    (folder / name).write_text('{"a": ')
    with pytest.raises(WeftError) as error:
        Backend().load(Load(model=entry), FakeReport())
    assert error.value.kind is ErrorKind.CORRUPT and ("token" in str(error.value) or name in str(error.value))


def test_no_folder_is_left_behind(plain: ModelEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with loaded(Backend(), plain, cpu_memory=0.0001, disk=True):
        assert len(list(tmp_path.iterdir())) == 2
    assert not list(tmp_path.iterdir())


def test_the_spec_claims_what_is_tested() -> None:
    packed = {ModelFormat.BITSANDBYTES, ModelFormat.GPTQ, ModelFormat.AWQ, ModelFormat.HQQ}  # test_packed.py
    assert SPEC.formats == {ModelFormat.SAFETENSORS, ModelFormat.TORCH_BIN} | packed
    assert SPEC.environment == "core"
