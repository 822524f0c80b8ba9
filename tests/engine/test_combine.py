"""Combining adapters: against the definition in float64, and against PEFT's own where that is right."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any, get_args

import peft
import pytest
import torch
from peft.utils import merge_utils
from safetensors.torch import load_file

from app.adapters import combine_torch
from app.adapters.combine_files import combine_adapters
from app.adapters.combine_torch import Pair, combine
from app.core.combine_plan import METHODS, CombinePlan, Method
from app.core.errors import ErrorKind, WeftError
from app.core.stack import AdapterStack, StackedAdapter
from app.tasks.combine import run
from tests import seeds
from tests.engine.adapter_kit import FAMILIES, differences, logits, merged_logits, random_adapter, random_model, tokens
from tests.engine.backend_kit import FakeReport

SEED = seeds.of(__name__, 1 << 30)
print(f"seed {SEED}")


def stack(*given: tuple[Path, float]) -> AdapterStack:
    return AdapterStack(adapters=tuple(StackedAdapter(path=str(p), weight=w, name=p.name) for p, w in given))


def two(tmp_path: Path, family: str, model: Any, **second: Any) -> tuple[Path, Path]:
    first = random_adapter(tmp_path / "one", family, model, SEED + 1)
    return first, random_adapter(tmp_path / "two", family, model, SEED + 2, **second)


def in_peft(model: Any, adapter: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(copy.deepcopy(model), adapter).eval()


def of_peft(model: Any, given: list[tuple[Path, float]], **how: Any) -> dict[str, torch.Tensor]:
    """B·A of PEFT's combination, by module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(model), given[0][0], adapter_name="a0")
        for number, (path, _) in enumerate(given[1:], 1):
            wrapped.load_adapter(path, adapter_name=f"a{number}")
        names = [f"a{number}" for number in range(len(given))]
        wrapped.add_weighted_adapter(names, [w for _, w in given], "new", **how)
    found = {}
    for name, module in wrapped.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer) and "new" in module.lora_A:
            found[name] = module.lora_B["new"].weight @ module.lora_A["new"].weight * module.scaling["new"]
    return {name: value.detach() for name, value in found.items()}


def products(folder: Path) -> dict[str, torch.Tensor]:
    file = {k.removeprefix("base_model.model."): v for k, v in load_file(folder / "adapter_model.safetensors").items()}
    ends = (".lora_A.weight", ".lora_B.weight")
    return {
        name.removesuffix(ends[0]): file[name.replace(*ends)] @ value
        for name, value in file.items()
        if name.endswith(ends[0])
    }


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize(
    "second", [{}, {"r": 7, "lora_alpha": 3}, {"r": 2, "use_rslora": True}], ids=["same", "rank", "rslora"]
)
def test_cat_is_exact_for_any_ranks_and_loads_in_peft(family: str, second: dict[str, Any], tmp_path: Path) -> None:
    model = random_model(family, SEED)
    first, other = two(tmp_path, family, model, **second)
    given = [(other, -0.6), (first, 1.3)]
    made = combine_adapters(CombinePlan(adapters=stack(*given), to=str(tmp_path / "new")))
    ids = tokens(SEED)
    wanted = merged_logits(model, given, ids)
    assert (logits(in_peft(model, tmp_path / "new"), ids) - wanted).abs().max() < 1e-4
    assert made.rank == 4 + second.get("r", 4) and made.energy == 1.0
    base = {name: w for path, weight in given for name, w in differences(model, path).items()}
    assert set(differences(model, tmp_path / "new")) == set(base)


def test_adapters_of_different_modules_biases_and_embeddings_combine_exactly(tmp_path: Path) -> None:
    model = random_model("llama", SEED)
    one = random_adapter(tmp_path / "one", "llama", model, SEED + 1, target_modules=["q_proj", "embed_tokens"])
    two_ = random_adapter(
        tmp_path / "two", "llama", model, SEED + 2, target_modules=["q_proj", "down_proj"], r=3, lora_bias=True
    )
    given = [(one, 0.5), (two_, 0.8)]
    combine_adapters(CombinePlan(adapters=stack(*given), to=str(tmp_path / "new")))
    ids = tokens(SEED)
    # PEFT itself does not know a bias beside an embedding: the difference is compared.
    ours, wanted = differences(model, tmp_path / "new"), {}
    for path, weight in given:
        for name, value in differences(model, path).items():
            wanted[name] = wanted.get(name, 0) + weight * value
    assert set(wanted) <= set(ours)
    for name, value in ours.items():
        assert (value - wanted.get(name, torch.zeros_like(value))).abs().max() < 1e-5, name
    assert ids.shape == (2, 12)


@pytest.mark.parametrize("method", ["svd", "linear", "ties", "ties_svd", "magnitude_prune", "magnitude_prune_svd"])
@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_methods_without_chance_equal_pefts(method: Method, sign: Any, tmp_path: Path) -> None:
    model = random_model("llama", SEED)
    given = list(zip(two(tmp_path, "llama", model), (0.7, -1.2), strict=True))
    how = {"density": 0.4, "majority_sign_method": sign}
    wanted = of_peft(model, given, combination_type=method, **how)
    combine_adapters(
        CombinePlan(adapters=stack(*given), to=str(tmp_path / "new"), method=method, density=0.4, sign=sign)
    )
    ours = products(tmp_path / "new")
    assert set(ours) == set(wanted)
    for name, value in wanted.items():
        assert (ours[name] - value).abs().max() < 2e-5 * max(1.0, float(value.abs().max())), name


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_dare_equals_pefts_with_the_same_chance(method: Method) -> None:
    torch.manual_seed(SEED)
    pairs = [Pair(torch.randn(4, 24), torch.randn(32, 4), 0.5, w) for w in (1.4, -0.6, 0.9)]
    plan = CombinePlan(adapters=stack((Path("a"), 1.0)), to="/x", method=method, density=0.6)
    torch.manual_seed(SEED + 1)
    made = combine(pairs, plan, 32)
    torch.manual_seed(SEED + 1)
    name = method.removesuffix("_svd")
    function = getattr(merge_utils, name)
    if method.endswith("_svd"):
        deltas = [p.b @ p.a * p.scale for p in pairs]
        wanted = function(deltas, torch.tensor([p.weight for p in pairs]), 0.6)
    else:
        roots = torch.tensor([abs(p.factor) ** 0.5 for p in pairs])
        signs = torch.tensor([1.0 if p.factor >= 0 else -1.0 for p in pairs])
        a = function([p.a for p in pairs], roots * signs, 0.6)
        wanted = function([p.b for p in pairs], roots, 0.6) @ a
    assert (made.b @ made.a - wanted).abs().max() < 1e-4


def test_dare_repeats_with_its_seed_and_differs_with_another(tmp_path: Path) -> None:
    model = random_model("llama", SEED)
    given = [(path, 1.0) for path in two(tmp_path, "llama", model)]
    found = []
    for number, seed in enumerate((3, 3, 4)):
        plan = CombinePlan(adapters=stack(*given), to=str(tmp_path / f"new{number}"), method="dare_linear", seed=seed)
        combine_adapters(plan)
        found.append((tmp_path / f"new{number}" / "adapter_model.safetensors").read_bytes())
    assert found[0] == found[1] != found[2]


def test_resizing_keeps_the_most_that_a_rank_can(tmp_path: Path) -> None:
    model = random_model("llama", SEED)
    adapter = random_adapter(tmp_path / "one", "llama", model, SEED, r=12)
    wanted = differences(model, adapter)
    made = combine_adapters(
        CombinePlan(adapters=stack((adapter, 1.0)), to=str(tmp_path / "five"), method="svd", rank=5)
    )
    kept = total = 0.0
    for name, value in differences(model, tmp_path / "five").items():
        _, s, _ = torch.linalg.svd(wanted[name])
        kept, total = kept + float((s[:5] ** 2).sum()), total + float((s**2).sum())
        assert torch.linalg.matrix_rank(value, tol=1e-5) == 5
        assert abs(float(((value - wanted[name]) ** 2).sum()) - float((s[5:] ** 2).sum())) < 1e-4
    assert made.energy == pytest.approx(kept / total, abs=1e-5) and made.lowest <= made.energy < 1
    whole = combine_adapters(
        CombinePlan(adapters=stack((adapter, 1.0)), to=str(tmp_path / "all"), method="svd", rank=20)
    )
    assert whole.energy == pytest.approx(1.0, abs=1e-9) and whole.rank == 12


def summed(model: Any, given: list[tuple[Path, float]]) -> dict[str, torch.Tensor]:
    """The sum of w·D in float64, by the names of the model's parameters."""
    found: dict[str, torch.Tensor] = {}
    for path, weight in given:
        for name, value in differences(model, path).items():
            found[name] = found.get(name, 0) + weight * value
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "mixtral"])
def test_doras_are_brought_near_through_their_base_and_the_energy_kept_is_told(family: str, tmp_path: Path) -> None:
    """Names on disk, transposed and fused matrices, an embedding and a tied head among them."""
    model = random_model(family, SEED, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    modules, embedding = FAMILIES[family][2], FAMILIES[family][3]
    first = random_adapter(
        tmp_path / "one", family, model, SEED + 1, r=3, use_dora=True, target_modules=[*modules, embedding]
    )
    given = [(first, 0.7), (random_adapter(tmp_path / "two", family, model, SEED + 2, use_rslora=True), -0.9)]
    wanted = summed(model, given)
    for rank in (64, 5):
        to = tmp_path / f"rank{rank}"
        made = run(CombinePlan(adapters=stack(*given), to=str(to), method="svd", rank=rank, base=str(tmp_path / "base")), FakeReport())  # fmt: skip
        ours = differences(model, to)
        assert set(ours) == set(wanted)
        kept = whole = 0.0
        for name, value in wanted.items():
            s = torch.linalg.svdvals(value)
            kept, whole = kept + float((s[:rank] ** 2).sum()), whole + float((s**2).sum())
            lost = float(((ours[name] - value) ** 2).sum())
            assert lost <= float((s[rank:] ** 2).sum()) + 1e-4, name  # the best that this rank can do
        assert made.energy == pytest.approx(kept / whole, abs=1e-4)
    # TIES elects signs over the whole differences: what it makes of two of the same is the one.
    again = CombinePlan(
        adapters=stack((first, 1.0), (first, 1.0)), to=str(tmp_path / "ties"), method="ties_svd", density=1.0, rank=64,
        base=str(tmp_path / "base"),
    )  # fmt: skip
    run(again, FakeReport())
    ours = differences(model, tmp_path / "ties")
    for name, value in differences(model, first).items():
        assert (ours[name] - value).abs().max() < 1e-4, name


def test_a_dora_without_its_base_is_refused_with_the_way(tmp_path: Path) -> None:
    model = random_model("llama", SEED)
    model.save_pretrained(tmp_path / "base")
    other = random_model("llama", SEED, hidden_size=48, num_attention_heads=4, head_dim=8)
    other.save_pretrained(tmp_path / "other")
    dora = random_adapter(tmp_path / "dora", "llama", model, SEED, use_dora=True)
    for method, base, words in (
        ("svd", "", "is a DoRA"),
        ("cat", "base", "cat cannot combine it"),
        ("svd", "other", "does not fit"),
        ("svd", "nowhere", "no model folder"),
    ):
        plan = CombinePlan(adapters=stack((dora, 1.0)), to=str(tmp_path / "new"), method=method, base=base and str(tmp_path / base))  # type: ignore[arg-type]  # fmt: skip
        with pytest.raises(WeftError, match=words) as caught:
            run(plan, FakeReport())
        assert caught.value.hint and not (tmp_path / "new").exists()


def test_large_differences_are_cut_by_projections_that_lose_hardly_more(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(SEED)
    monkeypatch.setattr(combine_torch, "_EXACT", 8)
    monkeypatch.setattr(combine_torch, "_SPARE", 16)
    matrix = torch.randn(160, 12) @ torch.randn(12, 200) + torch.randn(160, 200)
    u, s, v = combine_torch._largest_values(matrix, 12, SEED)
    assert s.shape[0] == 28, "not taken apart whole"
    best = float((torch.linalg.svdvals(matrix)[:12] ** 2).sum())
    assert float((s[:12] ** 2).sum()) > 0.999 * best
    near = (u[:, :12] * s[:12]) @ v[:12]
    lost = float(((matrix - near) ** 2).sum())
    assert lost == pytest.approx(float((matrix**2).sum() - (s[:12] ** 2).sum()), rel=1e-4), (
        "what is told is what is lost"
    )


def test_clamping_cuts_outliers_and_says_what_it_costs(tmp_path: Path) -> None:
    model = random_model("llama", SEED)
    given = [(path, 1.0) for path in two(tmp_path, "llama", model)]

    def run(name: str, clamp: float) -> tuple[Any, dict[str, torch.Tensor]]:
        plan = CombinePlan(adapters=stack(*given), to=str(tmp_path / name), method="svd", rank=4, clamp=clamp)
        return combine_adapters(plan), load_file(tmp_path / name / "adapter_model.safetensors")

    whole, free = run("free", 1.0)
    made, cut = run("cut", 0.95)
    assert whole.energy is not None and made.energy is not None and made.energy < whole.energy
    total = products(tmp_path / "free")
    lost = kept = 0.0
    for name in total:
        prefix = f"base_model.model.{name}"
        a, b = free[f"{prefix}.lora_A.weight"], free[f"{prefix}.lora_B.weight"]
        # PEFT's rule, on the same singular vectors: their signs are free, and the quantile depends on them.
        limit = torch.quantile(torch.cat([b.flatten(), a.flatten()]), 0.95)
        assert torch.allclose(cut[f"{prefix}.lora_A.weight"], a.clamp(-limit, limit), atol=1e-6)
        assert torch.allclose(cut[f"{prefix}.lora_B.weight"], b.clamp(-limit, limit), atol=1e-6)
        exact = sum(differences(model, path)[f"{name}.weight"] for path, _ in given)
        ours = (cut[f"{prefix}.lora_B.weight"] @ cut[f"{prefix}.lora_A.weight"]).double()
        rank4 = (b @ a).double()
        lost += float(((exact - rank4) ** 2).sum() + ((rank4 - ours) ** 2).sum())
        kept += float((exact**2).sum())
    assert made.energy == pytest.approx(1 - lost / kept, abs=1e-4)


@pytest.mark.parametrize("method", [m for m in get_args(Method) if m != "cat"])
def test_every_method_writes_what_peft_loads(method: Method, tmp_path: Path) -> None:
    model = random_model("qwen2", SEED)
    given = [(path, 0.5) for path in two(tmp_path, "qwen2", model)]
    made = combine_adapters(CombinePlan(adapters=stack(*given), to=str(tmp_path / "new"), method=method))
    config = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert config["r"] == made.rank == config["lora_alpha"]
    assert set(METHODS) == set(get_args(Method))
    file = products(tmp_path / "new")
    inside = in_peft(model, tmp_path / "new").base_model.model
    for name, value in file.items():
        layer = inside.get_submodule(name)
        assert torch.equal(layer.get_delta_weight("default"), value)
    assert "Combined by Weft" in (tmp_path / "new" / "README.md").read_text()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1, 2]}, "trained tokens"),
        ({"layer_replication": [(0, 2), (1, 2)]}, "repeats layers"),
    ],
)
def test_what_is_no_pair_is_refused_and_nothing_is_written(
    settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    model = random_model("llama", SEED)
    first, other = two(tmp_path, "llama", model, **settings)
    with pytest.raises(WeftError) as caught:
        combine_adapters(CombinePlan(adapters=stack((first, 1), (other, 1)), to=str(tmp_path / "new")))
    assert words in caught.value.message and caught.value.kind is ErrorKind.UNSUPPORTED and caught.value.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_a_gguf_adapter_is_refused_with_the_way_out(tmp_path: Path) -> None:
    given = stack((tmp_path / "some.gguf", 1.0))
    with pytest.raises(WeftError, match="GGUF adapter") as caught:
        combine_adapters(CombinePlan(adapters=given, to=str(tmp_path / "new")))
    assert "Convert" in caught.value.hint and not list(tmp_path.iterdir())


def test_bad_plans_are_refused_in_words(tmp_path: Path) -> None:
    model = random_model("llama", SEED)
    first, other = two(tmp_path, "llama", model, r=6)
    with pytest.raises(WeftError, match="needs adapters of the same rank"):
        combine_adapters(CombinePlan(adapters=stack((first, 1), (other, 1)), to=str(tmp_path / "new"), method="linear"))
    with pytest.raises(WeftError, match="exists already"):
        combine_adapters(CombinePlan(adapters=stack((first, 1)), to=str(other)))
    for wrong in ({"method": "ties", "density": 0.0}, {"rank": 3}, {"rank": -1}, {"clamp": 2.0}, {"method": "mean"}):
        with pytest.raises(WeftError) as caught:
            CombinePlan(adapters=stack((first, 1)), to="/x", **wrong).check()
        assert caught.value.kind is ErrorKind.BAD_INPUT and caught.value.hint
    bigger = random_adapter(tmp_path / "three", "llama", random_model("llama", SEED, hidden_size=64), SEED)
    with pytest.raises(WeftError, match="different models"):
        combine_adapters(CombinePlan(adapters=stack((first, 1), (bigger, 1)), to=str(tmp_path / "new")))
    assert not (tmp_path / "new").exists()
