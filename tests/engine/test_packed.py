"""GPTQ, AWQ and HQQ folders on the Transformers loader: the numbers that the files stand for, adapters on them, training, damage."""

# ruff: noqa: E402 (imports that need torch come after the check that it is there)

from __future__ import annotations

import contextlib
import copy
import json
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed in this interpreter")
transformers = pytest.importorskip("transformers", reason="transformers is not installed in this interpreter")

from safetensors.torch import load_file, save_file

from app.adapters import hqq_quantize
from app.adapters.base_torch import weight_of
from app.adapters.hf_stack import ModelStack
from app.adapters.merge_files import BaseFiles
from app.adapters.merge_packed_torch import PackedFiles
from app.adapters.packed_grid import Grid, gptq
from app.adapters.packed_linear import PackedLinear, fits_int4
from app.adapters.packed_load import PackedConfig, Stored, table_of
from app.backends.transformers import Backend
from app.core.errors import ErrorKind, WeftError
from app.core.library import ModelEntry
from app.core.merge_plan import MergePlan
from app.core.sampling import Sampling
from app.core.stack import AdapterStack, StackedAdapter
from app.engine.protocol import BatchRow, GenerateBatch, Score
from app.generation import hf_files, hf_load
from app.tasks.merge import run as merge
from tests.engine import packed_kit
from tests.engine.adapter_kit import any_weight, merged_logits, random_adapter
from tests.engine.backend_kit import FakeReport, ask, loaded
from tests.engine.merge_kit import Report
from tests.engine.packed_kit import Packed

EXACT = 5e-5  # of the largest logit: float32 sums in another order, with adapters beside the base instead of in it
FAST = 0.03  # of the spread of the logits, beyond three times what bfloat16 itself loses
SEED = random.randrange(1 << 30)
IDS = torch.arange(5, 29)[None]


@pytest.fixture(autouse=True)
def told() -> None:
    print("seed", SEED)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_kit.make(tmp_path_factory.mktemp("packed") / "base", SEED)


@pytest.fixture(scope="module", params=["gptq", "awq", "hqq"])
def packed(request: pytest.FixtureRequest, base: Path) -> Packed:
    """One folder of each, 4 bits."""
    return packed_kit.pack(
        base, base.parent / request.param, request.param, act_order=request.param == "gptq", seed=SEED
    )


@pytest.fixture(scope="module")
def adapters(base: Path) -> tuple[Path, Path]:
    """A LoRA and a DoRA, whose gains are of the weights that it meets."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora = random_adapter(base.parent / "lora", "llama", model, SEED, r=8)
    return lora, random_adapter(base.parent / "dora", "llama", model, SEED + 1, use_dora=True)


@pytest.fixture(scope="module")
def engine(packed: Packed) -> Iterator[Backend]:
    """The loader with each of them, in 32 bits."""
    with loaded(Backend(), packed.entry, dtype="float32") as (backend, _):
        assert isinstance(backend, Backend)
        yield backend


@contextmanager
def opened(entry: ModelEntry, dtype: torch.dtype = torch.float32, **how: Any) -> Iterator[Any]:
    """A model loaded as the loader does it. `how` goes into PackedConfig; a 16-bit folder has to be told `bits`."""
    folder = Path(entry.path)
    lone = Path(entry.files[0]) if "bits" not in how else None
    with contextlib.closing(hf_files.Stage(folder, "safetensors", lone)) as stage:
        plan = hf_load.Plan(folder=stage.path, weights=stage.weights, dtype=dtype, device_map={"": "cpu"})
        stored = None if "bits" in how else Stored(stage.weights, table_of(stage.config, folder))
        plan.packing = PackedConfig(stored, **how)
        yield hf_load.load_model(hf_load.read_config(stage.path, False), plan, lambda _: None, lambda: False)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return getattr(model, "_model", model)(input_ids=IDS).logits.float()


def modules(model: Any) -> dict[str, PackedLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear)}


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference as a part of the largest number."""
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())


def spread(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).pow(2).mean().sqrt() / wanted.std())


def stack(*pairs: tuple[Path, float]) -> AdapterStack:
    return AdapterStack(adapters=tuple(StackedAdapter(path=str(path), weight=weight) for path, weight in pairs))


LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    *[("gptq", {"bits": bits}) for bits in (2, 3, 8)],
    ("gptq", {"bits": 4, "act_order": True}),
    ("gptq", {"bits": 3, "act_order": True}),
    ("gptq", {"bits": 4, "group": -1}),
    ("gptq", {"bits": 4, "version": 2}),
    ("gptq", {"bits": 4, "group": 16, "biases": True}),
    ("awq", {}),
    ("awq", {"group": -1}),
    *[("hqq", {"bits": bits, "group": 64}) for bits in (8, 4, 3, 2, 1)],
    ("hqq", {"bits": 4, "group": 64, "axis": 0}),
]
NAMES = [f"{method} {' '.join(f'{k}={v}' for k, v in how.items())}" for method, how in LAYOUTS]


@pytest.mark.parametrize(("method", "how"), LAYOUTS, ids=NAMES)
def test_every_layout_is_read_as_the_numbers_it_stands_for(
    tmp_path: Path, base: Path, method: str, how: dict[str, Any]
) -> None:
    made = packed_kit.pack(base, tmp_path / "model", method, seed=SEED, **how)
    assert made.entry.format.value == method
    with opened(made.entry) as model:
        found = modules(model)
        assert set(found) == set(made.weights) and {m.layout for m in found.values()} == {"exact"}
        for name, wanted in made.weights.items():
            assert torch.equal(weight_of(found[name]), wanted), name
        assert off(logits(model), logits(made.reference)) < EXACT
        grids = [(module, stored_grid(made, name)) for name, module in found.items()]
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(SEED)).bfloat16()
    for module, grid in grids[:3]:
        if fits_int4(grid, torch.bfloat16):  # the fast kernel: as far off as bfloat16 numbers are
            fast = PackedLinear(*grid.shape[::-1], bias=False, dtype=torch.bfloat16)
            fast.take(grid, "int4")
            wanted = x.float() @ module.unpacked().T
            rounded = spread((x @ module.unpacked().bfloat16().T).float(), wanted)
            with torch.no_grad():
                assert spread(fast(x).float(), wanted) < 3 * rounded + 0.005


def stored_grid(made: Packed, name: str) -> Grid:
    path = Path(made.entry.files[0])
    tensors = {k.rpartition(".")[2]: v for k, v in load_file(path).items() if k.startswith(f"{name}.")}
    config = json.loads((path.parent / "config.json").read_text("utf-8"))
    out, inputs = made.weights[name].shape
    return Stored([path], table_of(config, path.parent)).grid(name, tensors, (out, inputs))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zeros_are_read_as_either_program_writes_them(bits: int) -> None:
    """GPTQModel takes the ones from whole words, AutoGPTQ from code by code: one and the same unless a zero is 0."""
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(SEED))
    parts, back = packed_kit.gptq_parts(weight, bits, 32, 1, None)
    codes = packed_kit.rounded(packed_kit.one_sided(weight, 32), bits, 32)[2]
    assert (codes == 0).any()
    assert torch.equal(gptq("m", parts, 96).weight(), back)
    parts["qzeros"] = packed_kit.words_of(codes.clamp(min=1) - 1, bits).T.contiguous()
    second = {**parts, "qzeros": packed_kit.words_of(codes.clamp(min=1), bits).T.contiguous()}
    assert torch.equal(gptq("m", parts, 96).weight(), gptq("m", second, 96, version=2).weight())


def test_a_g_idx_that_nobody_filled_in_counts_as_absent() -> None:
    weight = torch.randn(32, 96, generator=torch.Generator().manual_seed(SEED))
    parts, back = packed_kit.gptq_parts(weight, 4, 32, 1, None)
    parts["g_idx"].zero_()
    assert torch.equal(gptq("m", parts, 96).weight(), back)


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_bits_that_exist_in_planes_only_are_refused(bits: int) -> None:
    parts, _ = packed_kit.gptq_parts(torch.ones(32, 64), bits, 32, 2, None)
    with pytest.raises(WeftError, match="gptq_p") as refused:
        gptq("m", parts, 64, version=2)
    assert refused.value.kind is ErrorKind.UNSUPPORTED


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_packed_experts_answer_and_take_adapters(tmp_path: Path, method: str) -> None:
    base = packed_kit.make(tmp_path / "base", SEED, "mixtral")
    made = packed_kit.pack(base, tmp_path / "m", method, seed=SEED)
    lora = random_adapter(tmp_path / "lora", "mixtral", made.reference, SEED, r=4)
    with opened(made.entry) as model:
        assert sum(".experts." in name for name in modules(model)) == 2 * 3 * 3
        assert off(logits(model), logits(made.reference)) < EXACT
        ModelStack(model).set(stack((lora, 0.7)), lambda *_: None)
        assert off(logits(model), merged_logits(made.reference, [(lora, 0.7)], IDS)) < EXACT


def test_a_file_of_another_name_without_metadata_loads(tmp_path: Path, base: Path) -> None:
    made = packed_kit.pack(
        base, tmp_path / "m", "gptq", bits=8, metadata=False, name="llama-8bit-32g.safetensors", seed=SEED
    )
    with loaded(Backend(), made.entry, dtype="float32", wbits=8, groupsize=32) as (backend, _):
        assert off(logits(backend), logits(made.reference)) < EXACT
        assert ask(backend, "Over and under", max_tokens=4)[1].finish_reason


def test_live_stacks_are_the_merged_model(engine: Backend, packed: Packed, adapters: tuple[Path, Path]) -> None:
    rng = random.Random(SEED)
    lora, dora = adapters
    plain = logits(engine)
    for pairs in (
        [(lora, any_weight(rng))],
        [(lora, any_weight(rng)), (dora, any_weight(rng))],
        [(dora, 1.0), (lora, any_weight(rng))],
    ):
        engine.set_adapters(stack(*pairs), FakeReport())
        wanted = merged_logits(packed.reference, pairs, IDS)
        assert off(logits(engine), wanted) < EXACT
        assert off(plain, wanted) > 50 * EXACT  # they do something
    engine.set_adapters(AdapterStack(), FakeReport())
    assert torch.equal(logits(engine), plain)
    report = FakeReport()
    engine.set_adapters(stack((lora, 1.0)), report, baked=True)  # there is nothing to write into
    assert "quantized" in " ".join(report.logs)
    assert off(logits(engine), merged_logits(packed.reference, [(lora, 1.0)], IDS)) < EXACT
    engine.set_adapters(AdapterStack(), FakeReport())


def test_the_fast_kernel_takes_adapters_after_answers(packed: Packed, adapters: tuple[Path, Path]) -> None:
    lora, dora = adapters
    with opened(packed.entry, torch.bfloat16) as model:
        before = {name: weight_of(module) for name, module in modules(model).items()}
        noise = spread(logits(copy.deepcopy(packed.reference).bfloat16()), logits(packed.reference))
        assert spread(logits(model), logits(packed.reference)) < 3 * noise + FAST
        live = ModelStack(model)
        for pairs in ([(lora, 0.5), (dora, 1.0)], [(dora, -0.5)]):
            live.set(stack(*pairs), lambda *_: None)
            wanted = merged_logits(packed.reference, pairs, IDS).float()
            assert spread(logits(model), wanted) < 4 * noise + FAST
        for name, module in modules(model).items():
            assert torch.equal(weight_of(module), before[name])
            wanted = packed.weights[name]
            assert (before[name] - wanted).abs().max() < 0.01 * wanted.abs().max()  # scales in bfloat16


def test_answers_batches_and_perplexity(engine: Backend, packed: Packed, adapters: tuple[Path, Path]) -> None:
    lora, dora = adapters
    text = "The warp is held under tension while the weft is drawn through it. " * 3
    rows = tuple(BatchRow(prompt="Over", adapters=stack(*pairs)) for pairs in ([], [(lora, 1.0)], [(dora, 0.7)]))
    report = FakeReport()
    together = engine.generate_batch(GenerateBatch(rows=rows, sampling=Sampling(temperature=0, max_tokens=4)), report)
    assert len(together.rows) == 3 and "one after the other" not in " ".join(report.logs)
    engine.set_adapters(stack((lora, 0.8)), FakeReport())
    found = engine.score(Score(text=text), FakeReport())
    assert engine._prompts is not None
    tokens = torch.tensor([engine._prompts.encode(text, True)])
    wanted = merged_logits(packed.reference, [(lora, 0.8)], tokens)[0, :-1].log_softmax(-1)
    expected = -wanted.gather(1, tokens[0, 1:, None]).mean()
    assert found.nll == pytest.approx(float(expected), rel=1e-4)
    engine.set_adapters(AdapterStack(), FakeReport())


@pytest.mark.parametrize("kernel", ["exact", "int4"])
def test_every_lora_parameter_gets_the_gradient_of_the_plain_model(packed: Packed, kernel: str) -> None:
    """What training on a packed base rests on, through PEFT's own modules."""
    import peft

    def gradients(model: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(SEED)
        settings = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        wrapped = peft.get_peft_model(model, settings)
        wrapped(input_ids=IDS, labels=IDS).loss.backward()
        found = {n: p.grad for n, p in wrapped.named_parameters() if "lora_" in n}
        assert len(found) == 8 and all(g is not None and g.abs().max() > 0 for g in found.values())
        wrapped.unload()
        return {name: gradient.clone() for name, gradient in found.items()}

    exact = kernel == "exact"
    with opened(packed.entry, torch.float32 if exact else torch.bfloat16, kernel=kernel) as model:
        assert {m.layout for m in modules(model).values()} == {kernel}
        found = gradients(model)
    packed.reference.requires_grad_(False)
    for name, wanted in gradients(packed.reference).items():
        # What bfloat16 does to a gradient depends on the random model: there only the direction is asked for.
        if exact:
            assert spread(found[name], wanted) < 1e-3, name
        else:
            assert torch.cosine_similarity(found[name].flatten().float(), wanted.flatten(), 0) > 0.9, name


# HQQ while loading ------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
def test_a_16_bit_model_is_packed_while_it_is_loaded(base: Path, bits: int) -> None:
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with opened(packed_kit.entry_of(base), bits=bits) as model:
        found = modules(model)
        assert len(found) == 14 and "lm_head" not in found
        for name, module in found.items():
            weight = plain.get_submodule(name).weight.detach()
            values = weight.reshape(-1, 64)
            low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
            step = (high - low) / (2**bits - 1)
            nearest = (((values - low) / step).round() * step + low).reshape(weight.shape)
            ours = (weight_of(module) - weight).abs().mean()
            assert ours < 1.01 * (nearest - weight).abs().mean(), name  # the half-quadratic steps lose less
        if bits == 8:
            assert spread(logits(model), logits(plain)) < 3 * FAST


def test_hqq_is_an_option_of_the_loader(base: Path) -> None:
    entry = packed_kit.entry_of(base)
    with loaded(Backend(), entry, load_in_hqq="4-bit", hqq_group_size=32) as (backend, _):
        assert {module.bits for module in modules(backend._model).values()} == {4}
        assert ask(backend, "Over and under", max_tokens=4)[1].finish_reason
    with pytest.raises(WeftError) as refused, loaded(Backend(), entry, load_in_hqq="4-bit", load_in_4bit=True):
        pass
    assert refused.value.kind is ErrorKind.BAD_INPUT


def test_hqq_loses_no_more_than_its_authors_program() -> None:
    """Mean errors of hqq 0.2.8 on this matrix, groups of 64 along the inputs, float32."""
    k = torch.arange(96 * 128, dtype=torch.float64)
    weight = (torch.sin(k * 1.7) * torch.cos(k * k * 0.013) * 0.1).float().reshape(96, 128)
    for bits, lost in ((8, 1.7531e-4), (4, 2.98718e-3), (3, 6.4155e-3), (2, 1.518752e-2), (1, 4.344807e-2)):
        grid = hqq_quantize.quantize(weight, bits)
        assert float((grid.weight() - weight).abs().mean()) < 1.005 * lost, bits


@pytest.mark.parametrize("bits", [8, 4, 1])
@pytest.mark.parametrize("level", [1e4, -1e4, 9.0, -0.3])
def test_a_group_that_hardly_varies_stays_finite(bits: int, level: float) -> None:
    noise = torch.randn(8, 64, generator=torch.Generator().manual_seed(SEED)) * 3e-4
    weight = torch.cat([level + noise, noise])
    found = hqq_quantize.quantize(weight, bits).weight()
    assert ((found - weight).abs() <= 1e-3 * weight.abs() + 2e-3).all()


def test_numbers_that_no_grid_holds_are_refused_while_loading(tmp_path: Path, base: Path) -> None:
    for bad in (float("nan"), float("inf"), 1e30):
        with pytest.raises(WeftError, match="HQQ"):
            hqq_quantize.quantize(torch.full((2, 64), bad).index_fill_(1, torch.tensor([0]), 0.0), 4)
    folder = shutil.copytree(base, tmp_path / "m")
    damage(folder, lambda t: t["model.layers.1.mlp.down_proj.weight"][3, 5].fill_(torch.nan))
    with pytest.raises(WeftError, match="HQQ") as refused, opened(packed_kit.entry_of(folder), bits=4):
        pass
    assert refused.value.kind is ErrorKind.BAD_INPUT and refused.value.hint


# Damage -----------------------------------------------------------------------------------------


def damage(folder: Path, change: Any) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


Q = "model.layers.1.mlp.down_proj."


@pytest.mark.parametrize(
    ("method", "change", "said"),
    [
        ("gptq", lambda t: t[Q + "g_idx"].fill_(99), "g_idx"),
        ("gptq", lambda t: t[Q + "g_idx"].fill_(-1), "g_idx"),
        ("gptq", lambda t: t[Q + "g_idx"].masked_fill_(t[Q + "g_idx"] == 2, 1), "g_idx"),
        ("gptq", lambda t: t.update({Q + "qweight": t[Q + "qweight"][:-1].clone()}), "qweight"),
        ("gptq", lambda t: t.update({Q + "qzeros": t[Q + "qzeros"][:-1].clone()}), "qzeros"),
        ("gptq", lambda t: t.pop(Q + "scales"), "scales"),
        ("gptq", lambda t: t.update({Q + "qzeros": t[Q + "qzeros"][:0].clone()}), "qzeros"),
        ("gptq", lambda t: [t.pop(Q + k) for k in ("qweight", "qzeros", "scales", "g_idx")], "lack weights"),
        ("awq", lambda t: t.update({Q + "qweight": t[Q + "qweight"].T.contiguous()}), "layout of AWQ"),
        ("hqq", lambda t: t[Q + "nbits"].fill_(2), "W_q"),
        ("hqq", lambda t: t.update({Q + "nbits": torch.tensor([4, 4])}), "nbits"),
        ("hqq", lambda t: t.update({Q + "axis": torch.tensor([1, 1])}), "axis"),
        ("hqq", lambda t: t.update({Q + "scale": t[Q + "scale"][:-1].clone()}), "scale"),
        ("hqq", lambda t: t.update({Q + "W_q": t[Q + "W_q"][:-1].clone()}), "W_q"),
    ],
)
@pytest.mark.fault
def test_damage_is_named_and_never_answered_from(
    tmp_path: Path, base: Path, method: str, change: Any, said: str
) -> None:
    made = packed_kit.pack(base, tmp_path / "m", method, seed=SEED)
    damage(tmp_path / "m", change)
    with pytest.raises(WeftError, match=said) as refused, opened(made.entry):
        pass
    assert refused.value.kind in (ErrorKind.CORRUPT, ErrorKind.UNSUPPORTED) and refused.value.hint


# Merging ----------------------------------------------------------------------------------------


def test_merging_unpacks_on_demand_only(tmp_path: Path, packed: Packed, adapters: tuple[Path, Path]) -> None:
    lora, dora = adapters
    pairs = [(lora, 0.7), (dora, -0.4)]
    plan = MergePlan(model=packed.entry.path, stack=stack(*pairs), target=str(tmp_path / "out"), dtype="float32")
    with pytest.raises(WeftError, match="quantized") as refused:
        merge(plan, Report())
    assert "16bit" in refused.value.hint and not (tmp_path / "out").exists()
    changed = MergePlan(**{**{k: getattr(plan, k) for k in plan.__struct_fields__}, "packed": "16bit"})
    made = merge(changed, Report())
    assert any("what that had lost" in note for note in made.notes)
    config = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
    assert not config.get("quantization_config")
    result, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.inference_mode():
        assert off(result(input_ids=IDS).logits, merged_logits(packed.reference, pairs, IDS)) < 1e-3
    # Without an adapter it unpacks.
    merge(
        MergePlan(model=packed.entry.path, stack=AdapterStack(), target=str(tmp_path / "plain"), packed="16bit"),
        Report(),
    )
    for name, wanted in packed.weights.items():
        (stored,) = [load_file(p)[f"{name}.weight"] for p in (tmp_path / "plain").glob("*.safetensors")]
        assert stored.dtype is torch.float16 and torch.equal(stored, wanted.half())


def test_names_are_gone_through_a_few_times_however_many_matrices(
    packed: Packed, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = 0

    class Counted(dict[str, Any]):
        def __iter__(self) -> Iterator[str]:
            nonlocal passes
            passes += 1
            return super().__iter__()

    plain = BaseFiles.__init__

    def counted(self: BaseFiles, files: Any) -> None:
        plain(self, files)
        self.tensors = Counted(self.tensors)

    monkeypatch.setattr(BaseFiles, "__init__", counted)
    table = table_of(json.loads((Path(packed.entry.path) / "config.json").read_text("utf-8")), Path(packed.entry.path))
    files = PackedFiles([Path(path) for path in packed.entry.files], table, "llama", "float16")
    files.close()
    assert {name for name in files.tensors if ".layers." in name and "norm" not in name} == {
        f"{name}.weight" for name in packed.weights
    }
    assert passes < 5 < len(packed.weights)


@pytest.fixture(autouse=True)
def unchanged(base: Path) -> Iterator[None]:
    """No test writes into the folders that all share."""
    before = sorted((p.name, p.stat().st_mtime_ns) for p in base.iterdir())
    yield
    assert sorted((p.name, p.stat().st_mtime_ns) for p in base.iterdir()) == before
