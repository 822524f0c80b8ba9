"""GPTQ's and AWQ's arithmetic against written-out references, and the walk through layers against the model itself."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from app.adapters import awq_folds_torch as folds
from app.adapters import awq_quantize, calibrate_awq_torch, calibrate_gptq_torch, packed_grid, packed_write
from app.adapters.gptq_quantize import Rounded, curvature, quantize
from app.adapters.layer_inputs_torch import Matrix, hear, stages
from app.adapters.layer_walk_torch import ForeignError, LayerPass, first, walk
from app.adapters.merge_files import BaseFiles
from app.adapters.packed_load import PackedConfig, Stored
from app.adapters.quantize_model_torch import QuantizableModel
from app.adapters.quantize_shapes_torch import check_shapes, shapes_of
from app.core.errors import ErrorKind, WeftError
from app.core.quantize_plan import QuantizePlan
from app.generation.hf_files import Stage
from app.tasks.quantize import run
from tests import seeds
from tests.engine import tiny_models
from tests.engine.adapter_kit import FAMILIES, VOCABULARY
from tests.engine.merge_kit import Report, load, make_base

PIECES, LENGTH = 3, 40  # longer than the sliding windows of the tiny models
MORE = {
    "gemma2": transformers.Gemma2Config,
    "qwen3_moe": transformers.Qwen3MoeConfig,
    "qwen2_moe": transformers.Qwen2MoeConfig,
    "gpt_neox": transformers.GPTNeoXConfig,
    "opt": transformers.OPTConfig,
    "falcon": transformers.FalconConfig,
}


def make(folder: Path, family: str, seed: int) -> None:
    """A random bfloat16 model of a family, hidden size 64 or 32."""
    if family in FAMILIES:
        make_base(folder, family, seed, "bfloat16")
        return
    small: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.2,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": VOCABULARY - 1,  # a row that no text uses
    }
    small |= {
        "gemma2": {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 24},
        "qwen3_moe": {"num_key_value_heads": 2, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1},
        "qwen2_moe": {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "decoder_sparse_step": 1},
        "opt": {"ffn_dim": 96, "word_embed_proj_dim": 32},
    }.get(family, {})  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(MORE[family](**small)).to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder)


def opened(folder: Path, seed: int) -> tuple[QuantizableModel, list[list[int]]]:
    with contextlib.closing(Stage(folder, "safetensors")) as stage, BaseFiles(stage.weights) as files:
        model = QuantizableModel(stage.path, files, torch.bfloat16)
    chance = random.Random(seed)
    return model, [[chance.randrange(VOCABULARY) for _ in range(LENGTH)] for _ in range(PIECES)]


# Dbrx keeps its experts in one tensor: refused, below.
@pytest.mark.parametrize("family", [*(family for family in FAMILIES if family != "dbrx"), *MORE])
def test_layer_by_layer_is_the_model_and_a_scale_taken_up_changes_nothing(tmp_path: Path, family: str) -> None:
    """The walk's last outputs are the model's; every fold that is found keeps each layer's output, whatever scale is put in."""
    seed = seeds.given()
    make(tmp_path, family, seed)
    model, pieces = opened(tmp_path, seed)
    exact = load(tmp_path, "bfloat16").float()
    seen: list[torch.Tensor] = []
    place = exact.get_submodule(model.layers[-1][0])
    hook = place.register_forward_hook(lambda _m, _a, made: seen.append(first(made)))
    with torch.no_grad():
        for piece in pieces:
            exact(torch.tensor([piece]), use_cache=False)
    hook.remove()
    generator = torch.Generator().manual_seed(seed)
    sources: list[set[str]] = []

    def each(layer: LayerPass) -> None:
        matrices = model.matrices(layer.index)
        found, heard = folds.find_folds(layer, matrices)
        sources.append({fold.source for fold in found})
        for fold in found:
            width = fold.targets[0].weight.shape[1]
            folds.apply(fold, torch.rand(width, generator=generator) * 1.5 + 0.5)
        after = hear(layer, {}).made
        assert (after - heard.made).norm() < 1e-5 * heard.made.norm(), found
        layer.advance(lambda: None)

    made = walk(model.model, pieces, each)
    for ours, theirs in zip(made, seen, strict=True):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()
    # Every architecture here has a norm before its attention; nothing would be shown if no fold were found.
    assert all(sources), sources


def test_matrices_of_one_input_are_heard_once_and_in_order(tmp_path: Path) -> None:
    seed = seeds.given()
    make(tmp_path, "qwen3_moe", seed)
    model, pieces = opened(tmp_path, seed)
    orders: list[list[list[list[str]]]] = []

    def each(layer: LayerPass) -> None:
        matrices = model.matrices(layer.index)
        heard = hear(layer, {matrix.name: matrix.module for matrix in matrices})
        orders.append([[[m.name for m in s.members] for s in stage] for stage in stages(matrices, heard)])
        layer.advance(lambda: None)

    walk(model.model, pieces, each)
    for order in orders:
        assert order[0] == [[f"self_attn.{name}_proj" for name in "qkv"]] and order[1] == [["self_attn.o_proj"]]
        experts = [sorted(each) for each in order[2]]
        assert experts == [[f"mlp.experts.{n}.gate_proj", f"mlp.experts.{n}.up_proj"] for n in range(4)]
        assert order[3] == [[f"mlp.experts.{n}.down_proj"] for n in range(4)] and len(order) == 4
    assert model.kept() == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"], "routers stay as they are"


# GPTQ ---------------------------------------------------------------------------------------------


def inputs(rows: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """Correlated, and of very different sizes."""
    mixed = torch.randn(width, width, generator=generator) * 0.15 + torch.eye(width)
    return torch.randn(rows, width, generator=generator) @ mixed * torch.rand(width, generator=generator).pow(2) * 3


def brain_surgeon(weight: torch.Tensor, hessian: torch.Tensor, made: Rounded, order: list[int]) -> torch.Tensor:
    """Codes by the paper's recursion itself, in float64: after each column its row and column leave the inverse Hessian."""
    work, middle = weight.double().clone(), int(made.zeros.max())
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(len(hessian)).double()
    inverse = torch.linalg.inv(damped)
    codes = torch.zeros_like(weight, dtype=torch.uint8)
    for column in order:
        scale = made.scales[:, int(made.owner[column])].double()
        code = (work[:, column] / scale).round().add(middle).clamp(0, 2 * middle - 1)
        codes[:, column] = code.to(torch.uint8)
        error = (work[:, column] - (code - middle) * scale) / inverse[column, column]
        work -= torch.outer(error, inverse[column])
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return codes


@pytest.mark.parametrize("by_importance", [False, True], ids=["in order of groups", "by importance"])
@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 64), (4, 128), (8, 256)])
def test_gptq_is_the_papers_recursion(bits: int, group: int, by_importance: bool) -> None:
    seed = seeds.given()
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(48, 256, generator=generator)
    x = inputs(1500, 256, generator)
    hessian = x.T @ x
    made = quantize(weight, curvature(hessian, group, by_importance=by_importance), bits)
    size = hessian.diagonal()
    if by_importance:
        order = size.argsort(descending=True, stable=True).tolist()
    else:  # the groups with the most important column first, and within each its columns
        best = size.reshape(-1, group).amax(1).argsort(descending=True, stable=True).tolist()
        order = [g * group + int(i) for g in best for i in size.reshape(-1, group)[g].argsort(descending=True, stable=True)]  # fmt: skip
    assert sorted(set(made.owner.tolist())) == list(range(256 // group))
    wanted = brain_surgeon(weight, hessian, made, order)
    # A code on the edge between two may fall otherwise in float32, and then errors go on from there in its row.
    rows = (made.codes == wanted).all(1)
    assert rows.float().mean() > 0.9, f"{int(rows.sum())} of {len(rows)} rows"
    error = ((made.weight() - weight) @ x.T).norm()
    nearest = nearest_of(weight, bits, group)
    assert error < 0.85 * ((nearest - weight) @ x.T).norm()


def nearest_of(weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Each weight to the nearest of a symmetric grid over its group's range."""
    middle = 1 << bits - 1
    rows = weight.reshape(len(weight), -1, group)
    scale = rows.abs().amax(2, keepdim=True) / (middle - 0.5)
    return ((rows / scale).round().clamp(-middle, middle - 1) * scale).reshape(weight.shape)


def test_inputs_that_never_came_are_rounded_plainly() -> None:
    generator = torch.Generator().manual_seed(seeds.given())
    weight = torch.randn(32, 128, generator=generator)
    nearest = nearest_of(weight, 8, 32) - weight
    made = quantize(weight, curvature(torch.zeros(128, 128), 32), 8)
    assert (made.weight() - weight).norm() <= 1.01 * nearest.norm()
    x = inputs(400, 128, generator)
    x[:, 32:64] = 0  # a group
    some = quantize(weight, curvature(x.T @ x, 32), 8)
    assert (some.weight() - weight)[:, 32:64].norm() <= 1.01 * nearest[:, 32:64].norm()


# AWQ ----------------------------------------------------------------------------------------------


def test_awq_spares_what_its_inputs_weigh_most() -> None:
    generator = torch.Generator().manual_seed(seeds.given())
    weight, x = torch.randn(64, 256, generator=generator), inputs(600, 256, generator)
    x[:, :4] *= 100  # as real models have a few channels that are much larger than all others
    scale = awq_quantize.best_scales([weight], x[:300], x.abs().mean(0), 64)

    def error(made: torch.Tensor) -> float:
        return float(((made - weight) @ x.T).norm())

    plain = error(awq_quantize.round_to_grid(weight, 64).weight())
    scaled = error(awq_quantize.round_to_grid(weight * scale, 64).weight() / scale)
    cut = awq_quantize.clipped(weight * scale, x[:300] / scale, 64)
    clipped = error(awq_quantize.round_to_grid(cut, 64).weight() / scale)
    assert scaled < 0.95 * plain and clipped < 1.02 * scaled
    assert (cut.abs() <= (weight * scale).abs() + 1e-6).all() and torch.equal(cut.sign(), (weight * scale).sign())


def test_no_scale_is_taken_where_none_is_better() -> None:
    """Inputs of one size, and a grid that the weights lie on already."""
    generator = torch.Generator().manual_seed(seeds.given())
    codes = torch.randint(0, 16, (32, 64), generator=generator).float()
    codes[:, 0], codes[:, 32], codes[:, 1], codes[:, 33] = 0, 0, 15, 15
    weight = (codes - 8) * 0.25
    x = torch.ones(50, 64) * torch.randn(50, 1, generator=generator)
    assert torch.equal(awq_quantize.best_scales([weight], x, x.abs().mean(0), 32), torch.ones(64))
    assert torch.equal(awq_quantize.round_to_grid(weight, 32).weight(), weight)


# What is written ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_what_is_packed_is_read_back(bits: int) -> None:
    generator = torch.Generator().manual_seed(seeds.given())
    out, width, group = 64, 96, 32
    codes = torch.randint(0, 1 << bits, (out, width), generator=generator).to(torch.uint8)
    zeros = torch.randint(1, 1 << bits, (out, width // group), generator=generator).to(torch.uint8)
    scales = (torch.rand(out, width // group, generator=generator) + 0.1).to(torch.float16)
    owner = torch.randperm(width, generator=generator) % (width // group)
    made = Rounded(codes, scales, zeros, owner.to(torch.int32))
    assert torch.equal(packed_grid.gptq("m", packed_write.gptq(made, bits), width).weight(), made.weight())
    if bits == 4:
        zeros[0, 0] = 0
        made = Rounded(codes, scales, zeros, (torch.arange(width) // group).to(torch.int32))
        assert torch.equal(packed_grid.awq("m", packed_write.awq(made), width).weight(), made.weight())


# Whole folders of other architectures than Llama: fused matrices, GPT-2's transposed ones, norms of 1 + weight, experts.
@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("family", ["mixtral", "gpt2", "gemma2", "phi"])
def test_other_architectures_come_out_whole(tmp_path: Path, family: str, method: str) -> None:
    seed = seeds.given()
    changes = {} if family == "gpt2" else {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.12}
    tiny_models.make(tmp_path / "model", family, seed=seed, dtype=torch.bfloat16, **changes)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(tiny_models.CORPUS) * 8, "utf-8")
    settings: dict[str, Any] = {"method": method, "group_size": 32, "samples": 12, "length": 64, "device": "cpu"}
    made = run(
        QuantizePlan(
            model=str(tmp_path / "model"), target=str(tmp_path / "made"), calibration=str(text), bits=4, **settings
        ),
        Report(),
    )
    files = sorted((tmp_path / "made").glob("*.safetensors"))
    stored = Stored(files, {"quant_method": method})
    exact = load(tmp_path / "model", "float32")
    assert len(stored.parts) == made.matrices
    ids = torch.tensor([random.Random(seed).choices(range(300), k=50) for _ in range(4)])
    with torch.inference_mode():
        wanted = exact(ids).logits.log_softmax(-1)
    losses: dict[str, float] = {}
    for name, model in (("4 bits", packed_model(tmp_path / "made")), ("3 bits, plain", rounded_to_3_bits(exact))):
        with torch.inference_mode():
            losses[name] = float((wanted.exp() * (wanted - model(ids).logits.float().log_softmax(-1))).sum(-1).mean())
    print(seed, family, method, losses)
    # Three bits lose about four times as much; a scale, an expert or a group in the wrong place loses everything.
    assert 0 < losses["4 bits"] < 0.7 * losses["3 bits, plain"]


def packed_model(folder: Path) -> Any:
    """A packed folder as Weft loads it, exact in float32."""
    with contextlib.closing(Stage(folder, "safetensors")) as stage:
        config = transformers.AutoConfig.from_pretrained(stage.path)
        table = config.quantization_config
        del config.quantization_config
        packed = PackedConfig(Stored(stage.weights, table), kernel="exact")
        return transformers.AutoModelForCausalLM.from_pretrained(
            stage.path, config=config, dtype=torch.float32, quantization_config=packed
        ).eval()


def rounded_to_3_bits(model: Any) -> Any:
    """Every matrix of the layers to the nearest of eight values a group."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2 or not any(part.isdecimal() for part in name.split(".")):
                continue
            conv = type(model.get_submodule(name.rpartition(".")[0])).__name__ == "Conv1D"
            for matrix in parameter if parameter.dim() == 3 else [parameter]:
                matrix.copy_(nearest_of(matrix.T, 3, 32).T if conv else nearest_of(matrix, 3, 32))
    return model


# What cannot be walked -----------------------------------------------------------------------------


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.beside = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, hidden: torch.Tensor, more: torch.Tensor | None = None) -> torch.Tensor:
        """Reads the weight of one of its two matrices."""
        made = self.linear(hidden) + hidden @ self.beside.weight.T
        return made if more is None else made + more


class Model(torch.nn.Module):
    """As much of a model of transformers as a walk uses. between: what is done before each layer but the first."""

    base_model_prefix = "nothing"

    def __init__(self, between: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]) -> None:
        super().__init__()
        self.embed, self.between = torch.nn.Embedding(10, 8), between
        self.layers = torch.nn.ModuleList([Layer(), Layer(), Layer()])

    def get_input_embeddings(self) -> Any:
        return self.embed

    def get_output_embeddings(self) -> None: ...

    def forward(self, inputs_embeds: torch.Tensor, use_cache: bool) -> torch.Tensor:
        hidden: tuple[torch.Tensor, ...] = (inputs_embeds,)
        for number, layer in enumerate(self.layers):
            hidden = (layer(*(self.between(hidden[0], inputs_embeds) if number else hidden)),)
        return hidden[0]


@pytest.mark.parametrize(
    "between",
    [lambda hidden, embedded: (hidden, embedded), lambda hidden, _: (hidden / 2,), lambda hidden, _: (hidden, hidden.abs())],
    ids=["the text itself", "work between layers", "what comes of hidden states"],
)  # fmt: skip
def test_layers_that_get_more_than_hidden_states_are_refused(between: Any) -> None:
    with pytest.raises(WeftError, match="more of the text"):
        walk(Model(between), [[1, 2], [3, 4], [5, 6]], lambda layer: layer.advance(lambda: None))
    assert not [thread for thread in threading.enumerate() if thread.name == "second carrier"]


@pytest.mark.parametrize("pieces", [[[1, 2]], [[1, 2], [3, 4]], [[1, 2], [3, 4], [5, 6]]], ids=len)
def test_a_matrix_whose_weight_is_read_stays_as_it_is(pieces: list[list[int]]) -> None:
    results: list[Any] = []

    def each(layer: LayerPass) -> None:
        matrices = [Matrix(name, layer.module.get_submodule(name), False) for name in ("linear", "beside")]
        ways: list[Any] = [lambda: layer_gptq(layer, matrices), lambda: layer_awq(layer, matrices)]
        results.append(ways[layer.index % 2]())

    walk(Model(lambda hidden, _: (hidden,)), pieces, each)
    assert [(list(made.matrices), made.left) for made in results] == [(["linear"], ("beside",))] * 3


def layer_gptq(layer: LayerPass, matrices: list[Matrix]) -> Any:
    more: dict[str, Any] = {"check": lambda: None, "done": lambda _: None}
    return calibrate_gptq_torch.calibrate(layer, matrices, bits=4, group=8, by_importance=False, **more)


def layer_awq(layer: LayerPass, matrices: list[Matrix]) -> Any:
    more: dict[str, Any] = {"check": lambda: None, "done": lambda _: None}
    return calibrate_awq_torch.calibrate(layer, matrices, group=8, dtype=torch.float32, **more)


def test_what_a_models_own_code_raises_is_told_from_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyError):
        walk(Model(lambda hidden, _: (hidden,)), [[1], [2]], lambda _: {}["a bug of ours"])

    def fails(*_: Any) -> None:
        raise ValueError("so it is")

    monkeypatch.setattr(Layer, "forward", fails)
    with pytest.raises(ForeignError, match="so it is"):
        walk(Model(lambda hidden, _: (hidden,)), [[1], [2]], lambda layer: layer.advance(lambda: None))


def test_numbers_that_are_not_finite_are_refused() -> None:
    model = Model(lambda hidden, _: (hidden,))
    with torch.no_grad():
        model.layers[1].linear.weight[0, 0] = float("nan")
    with pytest.raises(WeftError, match="Layer 1 .* not finite"):
        walk(model, [[1, 2], [3, 4]], lambda layer: layer.advance(lambda: None))


def test_awq_hears_of_the_whole_piece_however_many_there_are() -> None:
    """Few rows of each of many pieces: not always the first, which are unlike all others."""
    seen = calibrate_awq_torch._Seen(4, torch.device("cpu"))
    for _ in range(600):
        seen.add(torch.arange(256.0)[:, None].expand(256, 4), 1)
    places = seen.rows()[:, 0]
    assert len(places) == 600 and places.unique().numel() > 150 and 90 < places[:256].mean() < 170


@pytest.mark.parametrize(("family", "method", "said"), [("dbrx", "gptq", "kept together"), ("gpt_neox", "awq", "GPTQ"), ("bloom", "awq", "GPTQ")])  # fmt: skip
def test_what_readers_would_not_read_is_refused_beforehand(tmp_path: Path, family: str, method: str, said: str) -> None:
    make(tmp_path, family, seeds.given())
    plan = QuantizePlan(model=str(tmp_path), target=str(tmp_path / "made"), method=method, group_size=32)
    with contextlib.closing(Stage(tmp_path, "safetensors")) as stage, pytest.raises(WeftError, match=said) as refused:
        check_shapes(plan, shapes_of(stage.path, stage.config), family)
    assert refused.value.kind is ErrorKind.UNSUPPORTED


def test_readers_are_told_what_is_not_quantized(tmp_path: Path) -> None:
    seed = seeds.given()
    make(tmp_path / "moe", "qwen2_moe", seed)
    model, _ = opened(tmp_path / "moe", seed)
    assert model.kept()[:2] == [f"model.layers.0.mlp.{name}" for name in ("gate", "shared_expert_gate")]
    blocks = model.blocks()
    assert ["mlp.shared_expert.up_proj"] in blocks and ["mlp.shared_expert_gate"] not in blocks
    make(tmp_path / "opt", "opt", seed)
    model, _ = opened(tmp_path / "opt", seed)
    assert model.kept() == [f"model.decoder.project_{way}" for way in ("out", "in")] and model.blocks() == []
