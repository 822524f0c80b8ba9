"""DoRA with `ephemeral_gpu_offload` through PEFT's own path, with a stand-in for the card. On a real one: tests/gpu."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_any, tree_map

from app.core.errors import WeftError
from app.core.library import ModelEntry
from app.training import methods_torch
from tests import seeds
from tests.engine import tiny_models, training_kit
from tests.engine.training_kit import Remembering, config, in_plain_peft, train

SEED = seeds.of(__name__, 10**6)


class OnCard(torch.Tensor):
    """A tensor that says it lies on a card, and refuses company from main memory as one there does. The processor computes it."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnCard:
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device="cuda:0")  # type: ignore[attr-defined]
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def lies_elsewhere(value: Any) -> bool:
            return isinstance(value, torch.Tensor) and not isinstance(value, OnCard) and value.dim() > 0

        given = (args, kwargs or {})
        if tree_any(lies_elsewhere, given):
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"
            )
        args, kwargs = tree_map(lambda value: value.held if isinstance(value, OnCard) else value, given)
        found = function(*args, **{name: value for name, value in kwargs.items() if name != "device"})
        return tree_map(lambda value: OnCard(value) if isinstance(value, torch.Tensor) else value, found)


class Card(TorchFunctionMode):
    """`Tensor.to` there and back, counted: shapes that went, shapes that came."""

    def __init__(self) -> None:
        super().__init__()
        self.went: list[tuple[int, ...]] = []
        self.came: list[tuple[int, ...]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.to and len(args) == 2 and isinstance(args[1], str | torch.device):
            tensor, there = args[0], torch.device(args[1]).type == "cuda"
            if there and not isinstance(tensor, OnCard):
                self.went.append(tuple(tensor.shape))
                return OnCard(tensor.detach().clone())
            if not there and isinstance(tensor, OnCard):
                self.came.append(tuple(tensor.shape))
                return tensor.held.clone()
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelEntry:
    print(f"seed {SEED}")
    return tiny_models.make(tmp_path_factory.mktemp("model"), "llama", seed=SEED)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training_kit.examples(tmp_path_factory.mktemp("data") / "examples.jsonl", SEED)


Begun = tuple[Card, dict[str, torch.Tensor], list[tuple[int, ...]]]


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[Begun]:
    """Of each adapter that a run made: the card beside it, its magnitudes, and the shapes of B, A and base of each module."""
    found: list[Begun] = []
    original = methods_torch.inject

    def inject(*given: Any, **named: Any) -> Any:
        with Card() as card:
            wrapped = original(*given, **named)
        magnitudes = {
            name: parameter.detach().clone()
            for name, parameter in wrapped.named_parameters()
            if "lora_magnitude_vector" in name
        }
        shapes = [
            tuple(weight.shape)
            for _, module in methods_torch.layers(wrapped)
            for weight in (
                module.lora_B["default"].weight,
                module.lora_A["default"].weight,
                module.get_base_layer().weight,
            )
        ]
        assert {parameter.device.type for parameter in wrapped.parameters()} == {"cpu"}
        assert not any(isinstance(parameter.data, OnCard) for parameter in wrapped.parameters())
        found.append((card, magnitudes, shapes))
        return wrapped

    monkeypatch.setattr(methods_torch, "inject", inject)
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a graphics card here: tests/gpu sends tensors to it")
def test_base_and_adapter_make_the_trip_and_the_run_learns_what_it_learns_without(
    model: ModelEntry, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: list[Begun]
) -> None:
    # A and B random at first ("off"), so that the magnitudes depend on all three.
    method = {"dora": True, "init": "off"}
    settings: dict[str, Any] = {"model": {"device": "cpu"}, "train": {"max_steps": 16, "checkpoint_every": 2}}
    plain = train(config(tmp_path / "a", model, data, method=method, **settings), model)
    monkeypatch.setattr(methods_torch, "cards", lambda: 1)
    method["dora_offload"] = True
    result = train(config(tmp_path / "b", model, data, method=method, **settings), model)
    (none, without, _), (card, there, shapes) = begun
    assert len(there) == 7 * 3 and there.keys() == without.keys()
    assert (none.went, none.came) == ([], [])
    assert card.went == shapes  # in PEFT's order
    assert card.came == [tuple(value.shape) for value in there.values()]
    for name, value in there.items():
        assert torch.allclose(value, without[name], rtol=1e-5), name
    assert result.losses == pytest.approx(plain.losses, rel=1e-4)
    assert result.held_out_loss is not None and result.base_held_out_loss is not None
    assert result.held_out_loss < result.base_held_out_loss - 0.2
    in_plain_peft(Path(model.path), Path(result.adapter))

    broken, report = config(tmp_path / "c", model, data, method=method, **settings), Remembering()
    report.at_step = lambda now: report.cancel() if now == 13 else None
    with pytest.raises(WeftError):
        train(broken, model, report)
    assert train(broken, model, resume="yes").losses == pytest.approx(result.losses, rel=1e-4)
    assert begun[-1][0].went == shapes  # a resumed run makes its adapter anew


def test_a_card_refuses_what_lies_in_main_memory() -> None:
    """The stand-in is none if it lets PEFT leave the base where it was."""
    with Card() as card:
        there = torch.ones(2, 2).to("cuda")
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.ones(2, 2)
        assert torch.equal((there + there).to("cpu"), torch.full((2, 2), 2.0))
    assert (card.went, card.came) == ([(2, 2)], [(2, 2)])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a graphics card here")
@pytest.mark.parametrize("change", [{}, {"dora": False}])
def test_without_a_card_or_dora_peft_is_not_asked(change: dict[str, Any], model: ModelEntry, tmp_path: Path) -> None:
    made = config(tmp_path, model, tmp_path, method={"dora": True, "dora_offload": True, **change})
    assert methods_torch.runtime(made) == {}
