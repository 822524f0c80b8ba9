"""What the table of loaders claims, executed: every loader × format × capability, against numbers.

A ✅ of `weft loaders` is a claim in a loader's SPEC. For each of its formats a tiny real model is made together with a plain float32
model that holds the same numbers, and every claimed capability is run through the contract of a backend and compared with that.
A loader or format that this file does not know fails: so nothing can be claimed without being run.
"""

# ruff: noqa: E402 (imports that need torch come after the check that it is there)

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed in this interpreter")
transformers = pytest.importorskip("transformers", reason="transformers is not installed in this interpreter")

from app.backends import backend_class, specs
from app.backends.base import Backend, Capability
from app.core.library import ModelEntry, ModelFormat
from app.core.stack import AdapterStack, StackedAdapter
from app.engine.protocol import Score
from tests import seeds
from tests.engine import packed_kit, tiny_gguf, tiny_models, training_kit
from tests.engine.adapter_kit import merged, random_adapter
from tests.engine.backend_kit import FakeReport, loaded
from tests.engine.test_merged_copies import EXACT, transformed
from tests.engine.test_perplexity_stacks import apart, plain

TEXT = "the rain is on the shore, the weft goes over and under the warp"
WINDOW, STRIDE = 40, 16
# Options under which a loader's numbers are as near to the definition as it can bring them, and how near that is, in nats.
EXACTLY: dict[str, tuple[dict[str, Any], float]] = {
    "transformers": ({"dtype": "float32"}, 1e-4),
    "llama_cpp": (EXACT, 1e-3),
}
# What bitsandbytes' own kernels lose on a processor: they compute in bfloat16. Adapters beside them are exact.
ROUGH = {ModelFormat.BITSANDBYTES: 0.2}


class Made(NamedTuple):
    """A model on disk, and a plain one in float32 with the same numbers."""

    entry: ModelEntry
    reference: Any


def whole(folder: Path, seed: int, form: str) -> Made:
    entry = tiny_models.make(folder, seed=seed, form=form)
    return Made(entry, transformers.AutoModelForCausalLM.from_pretrained(entry.path, dtype=torch.float32).eval())


def packed(folder: Path, seed: int, method: str) -> Made:
    base = packed_kit.make(folder / "base", seed)
    return Made(*packed_kit.pack(base, folder / method, method, seed=seed))


def bitsandbytes(folder: Path, seed: int) -> Made:
    functional = pytest.importorskip(
        "bitsandbytes.functional", reason="bitsandbytes is not installed in this interpreter"
    )
    base = tiny_models.make(folder / "base", seed=seed, hidden_size=128, intermediate_size=192)
    how = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(base.path, quantization_config=how, dtype=torch.float32)
    reference = transformers.AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, module in model.named_modules():
            if type(module).__name__ == "Linear4bit":
                weight = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
                reference.get_submodule(name).weight.copy_(weight)
    model.save_pretrained(folder / "packed")
    for path in Path(base.path).iterdir():
        if not (folder / "packed" / path.name).exists() and path.suffix != ".safetensors":
            (folder / "packed" / path.name).write_bytes(path.read_bytes())
    return Made(packed_kit.entry_of(folder / "packed"), reference)


def gguf(folder: Path, seed: int) -> Made:
    folder.mkdir(parents=True)
    entry = tiny_gguf.write(folder / "base.gguf", seed=seed)
    return Made(entry, transformed(Path(entry.path), False))


MAKE: dict[ModelFormat, Callable[[Path, int], Made]] = {
    ModelFormat.SAFETENSORS: lambda folder, seed: whole(folder, seed, "safetensors"),
    ModelFormat.TORCH_BIN: lambda folder, seed: whole(folder, seed, "bin"),
    ModelFormat.GPTQ: lambda folder, seed: packed(folder, seed, "gptq"),
    ModelFormat.AWQ: lambda folder, seed: packed(folder, seed, "awq"),
    ModelFormat.HQQ: lambda folder, seed: packed(folder, seed, "hqq"),
    ModelFormat.BITSANDBYTES: bitsandbytes,
    ModelFormat.GGUF: gguf,
}


@pytest.fixture(scope="module")
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    seed = seeds.of(f"{__name__} {request.param}")  # not of the test that comes first
    print(f"seed {seed}")
    return MAKE[request.param](tmp_path_factory.mktemp("model") / "made", seed)


def claims() -> list[Any]:
    """(loader, format, capability), in an order in which a model is made once for all that is done with it."""
    return [
        pytest.param(form, loader, capability, id=f"{loader}-{form.value}-{capability.value}")
        for form in ModelFormat
        for loader, spec in specs().items()
        for capability in sorted(spec.capabilities)
        if form in spec.formats
    ]


@pytest.mark.parametrize(("made", "loader", "capability"), claims(), indirect=["made"])
def test_a_claim_holds(
    made: Made, loader: str, capability: Capability, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path / "cache"))
    if specs()[loader].needs_cuda and not torch.cuda.is_available():
        pytest.skip(f"{specs()[loader].title} needs an NVIDIA graphics card, and there is none")
    {
        Capability.LORA: _holds_one_adapter,
        Capability.MULTI_LORA: _holds_several_adapters,
        Capability.PERPLEXITY: _scores,
        Capability.TRAIN: _learns,
    }[capability](made, loader, tmp_path)


def _exactly(made: Made, loader: str) -> tuple[dict[str, Any], float]:
    options, near = EXACTLY[loader]
    return options, max(near, ROUGH.get(made.entry.format, 0.0))


def _nll(backend: Backend) -> float:
    return backend.score(Score(text=TEXT, window=WINDOW, stride=STRIDE), FakeReport()).nll


def _tokens(backend: Any) -> list[int]:
    if hasattr(backend._model, "with_bos"):
        return backend._model.with_bos(backend._model.tokenize(TEXT, special=False))
    return backend._prompts.encode(TEXT, True)


def _scores(made: Made, loader: str, folder: Path) -> None:
    options, near = _exactly(made, loader)
    with loaded(backend_class(loader)(), made.entry, **options) as (backend, _):
        assert _nll(backend) == pytest.approx(plain(made.reference, _tokens(backend), WINDOW, STRIDE)[0], abs=near)


def _holds_one_adapter(made: Made, loader: str, folder: Path) -> None:
    lora = random_adapter(folder / "lora", "llama", made.reference, seeds.fresh(), r=4)
    _stacks(made, loader, [[(lora, 1.0)], [(lora, -0.6)]])


def _holds_several_adapters(made: Made, loader: str, folder: Path) -> None:
    """Of different ranks and kinds, each with a weight, changed without another load."""
    kinds: list[dict[str, Any]] = [{"r": 4}, {"r": 7, "use_rslora": True}, {"r": 3, "use_dora": True}]
    first, second, third = (
        random_adapter(folder / str(number), "llama", made.reference, seeds.fresh(), **kind)
        for number, kind in enumerate(kinds)
    )
    _stacks(
        made, loader, [[(first, 0.8), (second, 0.5)], [(first, 0.8), (second, -0.4), (third, 0.9)], [(second, 1.2)]]
    )


def _stacks(made: Made, loader: str, stacks: list[list[tuple[Path, float]]]) -> None:
    options, near = _exactly(made, loader)
    with loaded(backend_class(loader)(), made.entry, **options) as (backend, _):
        tokens, base = _tokens(backend), _nll(backend)
        for pairs in stacks:
            chosen = tuple(StackedAdapter(path=str(path), weight=weight) for path, weight in pairs)
            backend.set_adapters(AdapterStack(adapters=chosen), FakeReport())
            wanted = merged(made.reference, pairs)
            assert _nll(backend) == pytest.approx(plain(wanted, tokens, WINDOW, STRIDE)[0], abs=near), pairs
            assert apart(wanted, made.reference, tokens), "the adapters do something"
        backend.set_adapters(AdapterStack(), FakeReport())
        assert _nll(backend) == base, "without them it is the base again, exactly"


def _learns(made: Made, loader: str, folder: Path) -> None:
    """A short run lowers the loss on what is held out, and its adapter is one that the loader takes."""
    file = training_kit.examples(folder / "data.jsonl", seeds.fresh())
    report = training_kit.Remembering()
    result = training_kit.train(training_kit.config(folder, made.entry, file), made.entry, report)
    losses = [values["held_out_loss"] for _, values in report.metrics if "held_out_loss" in values]
    assert losses[-1] < losses[0], losses
    options, _ = _exactly(made, loader)
    with loaded(backend_class(loader)(), made.entry, **options) as (backend, _):
        base = _nll(backend)
        stack = AdapterStack(adapters=(StackedAdapter(path=result.adapter, weight=1.0),))
        backend.set_adapters(stack, FakeReport())
        assert _nll(backend) != base
