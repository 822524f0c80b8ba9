"""What one process of several says and waits for, without a second one."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import random
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
import transformers
from torch import distributed

from app.core.errors import ErrorKind, WeftError
from app.core.library import ModelEntry
from app.training import distributed_torch, loss_torch, run_launched, run_torch
from app.training.batches import plan_epoch, tokens_of
from app.training.collate_torch import Collator
from app.training.data_config import DataConfig
from app.training.encode import Example
from app.training.run_config import TrainConfig, TrainParameters
from app.training.shares import Batch, deal, share
from app.training.trainer_data_torch import EpochPlan, SftData
from app.training.trainer_torch import Trainer
from tests import seeds
from tests.engine import tiny_models, training_kit

SEED = seeds.of(__name__, 10**6)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelEntry:
    print(f"seed {SEED}")
    return tiny_models.make(tmp_path_factory.mktemp("model"), "llama", seed=SEED)


class Second:
    """An Accelerator of the second process of two, as far as a run's beginning and end ask."""

    is_main_process = False
    num_processes = 2
    distributed_type = SimpleNamespace(value="MULTI_CPU")

    def __init__(self) -> None:
        self.ended = False

    def end_training(self) -> None:
        self.ended = True


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (WeftError(ErrorKind.UNSUPPORTED, "No such card.", "Take another."), "unsupported"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "out_of_memory"),
        (FileNotFoundError(2, "No such file or directory", "/data/examples.jsonl"), "not_found"),
        (RuntimeError("Connection closed by peer"), None),
    ],
)
@pytest.mark.parametrize("when", ["beginning", "running"])
def test_a_process_that_is_not_the_first_says_why_it_fails(
    when: str,
    error: Exception,
    kind: str | None,
    model: ModelEntry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        monkeypatch.setenv(name, "1")  # so that it is put back
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("RANK", "1")
    second = Second()

    def fails(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(distributed_torch, "make_accelerator", fails if when == "beginning" else lambda _: second)
    monkeypatch.setattr(run_torch, "run", fails)
    made = training_kit.config(tmp_path / "run", model, training_kit.examples(tmp_path / "examples.jsonl", SEED))
    place = tmp_path / "run.json"
    place.write_bytes(msgspec.json.encode(TrainParameters(config=made, model=model)))
    if kind is None:
        with pytest.raises(RuntimeError, match="closed by peer"):
            run_launched.main([str(place)])
        assert capsys.readouterr().out == ""
    else:
        assert run_launched.main([str(place)]) == 1
        said = capsys.readouterr()
        (event,) = (json.loads(line) for line in said.out.splitlines())  # and nothing else
        assert (event["kind"], event["error"], event["process"]) == ("failed", kind, 1)
        assert event["hint"] and event["machine"]
        assert event["message"] in said.err and event["hint"] in said.err
    assert second.ended == (when == "running")


def test_the_others_are_waited_for_less_long_once_training_goes_on() -> None:
    distributed_torch.wait_long(None, False)
    distributed_torch.wait_long(object(), False)  # no processes: nothing to set
    assert not distributed.is_initialized()
    store = distributed.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        group = distributed.group.WORLD
        assert group is not None
        options = group._get_backend(torch.device("cpu")).options
        for long, wanted in ((True, datetime.timedelta(hours=2)), (False, datetime.timedelta(minutes=30))):
            distributed_torch.wait_long(object(), long)
            assert options._timeout == wanted
    finally:
        distributed.destroy_process_group()


# Sharing a step out -----------------------------------------------------------------------------------


def examples_of(parts: Sequence[Batch]) -> list[int]:
    return sorted(number for part in parts for row in part for number in row)


@pytest.mark.parametrize("packing", ["fit", "sequential", "off"])
def test_each_process_has_work_where_a_step_has_examples_enough(packing: str) -> None:
    """Default batch and accumulation, rows so short that packing makes one batch a step of them."""
    rng = random.Random(SEED)
    lengths = [rng.randint(5, 60) for _ in range(50)]
    plan = plan_epoch(
        lengths,
        DataConfig(packing=packing),
        epoch=0,
        rows=2,
        accumulation=8,
        packing=True,  # type: ignore[arg-type]
    )
    assert packing == "off" or all(len(step) == 1 for step in plan)
    for step, world in itertools.product(plan, (1, 2, 3, 5, 16)):
        many = len(examples_of(step))

        def size(part: Batch) -> float:
            return float(sum(lengths[number] for number in examples_of([part])))

        parts = deal(step, world, size)
        assert examples_of(parts) == examples_of(step)
        assert max(tokens_of(part, lengths) for part in parts) <= max(tokens_of(part, lengths) for part in step)
        if world == 1:
            assert parts == list(step)
        mine = [share(parts, SimpleNamespace(num_processes=world, process_index=rank))[0] for rank in range(world)]
        assert len({len(each) for each in mine}) == 1  # they wait for each other in each
        weighted = [sum(weight for _, weight in each) for each in mine]
        assert sum(weighted) == len(parts)
        assert min(weighted) > 0 or many < world
        assert len(parts) % world == 0 or len(parts) == many


class OneOf:
    """An accelerator of one process of several, without the others: what they add up is added up by the test."""

    device = torch.device("cpu")
    is_main_process = True
    is_fsdp2 = False

    def __init__(self, rank: int, world: int) -> None:
        self.process_index, self.num_processes = rank, world
        self.no_sync = lambda _: contextlib.nullcontext()
        self.backward = torch.Tensor.backward

    def unwrap_model(self, model: Any) -> Any:
        return model

    def reduce(self, tensor: torch.Tensor, _: str) -> torch.Tensor:
        return tensor


def test_processes_that_share_one_packed_batch_learn_what_one_learns(model: ModelEntry) -> None:
    """The mean of their gradients is one process's, and none of them works for nothing."""
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    net = transformers.AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32)
    examples: list[Example] = []
    for _ in range(7):
        ids = array("i", (rng.randrange(3, net.config.vocab_size) for _ in range(rng.randint(6, 20))))
        examples.append(Example(ids, ids[:], 0, 0, b""))
    places = range(len(examples))
    sft = SftData(Collator(examples, 0, mode="positions"), places, examples, torch.device("cpu"), chunked=False)
    packed: Batch = (tuple(places),)

    def learnt(accelerator: Any) -> tuple[float, list[torch.Tensor]]:
        net.zero_grad()
        nothing: Any = None
        plan: Any = SimpleNamespace(total=1)
        control: Any = SimpleNamespace(cancelled=False, stopping=False)
        trainer = Trainer(TrainConfig(), net, nothing, sft, plan, None, control, nothing, accelerator=accelerator)
        loss, _, weight, _ = trainer.backward([packed])
        assert weight == sft.weight(packed)
        return loss, [p.grad.clone() for p in net.parameters() if p.grad is not None]

    loss, whole = learnt(None)
    for world in (2, 3):
        parts = [learnt(OneOf(rank, world)) for rank in range(world)]
        assert sum(each for each, _ in parts) == pytest.approx(loss, rel=1e-5)
        assert all(each > 0 for each, _ in parts)
        for want, *got in zip(whole, *(gradients for _, gradients in parts), strict=True):
            assert torch.allclose(sum(got) / world, want, rtol=1e-3, atol=1e-6)  # type: ignore[operator]


def test_what_else_is_shown_counts_the_pairs_of_all_processes() -> None:
    """Each adds its own to what the others have; one that only repeats others' work adds nothing."""
    net = torch.nn.Linear(1, 1)

    class Pairs:
        def weight(self, batch: Batch) -> float:
            return float(len(batch))

        def loss(self, model: Any, batch: Batch) -> tuple[torch.Tensor, int, dict[str, float]]:
            return model.weight.sum() * len(batch), 10 * len(batch), {"accuracy": float(len(batch)), "margin": 0.5}

    nothing: Any = None
    further: list[dict[str, float]] = []
    for rank in range(4):
        one = OneOf(rank, 4)
        one.reduce = lambda tensor, _: tensor + 100  # type: ignore[method-assign]
        control: Any = SimpleNamespace(cancelled=False, stopping=False)
        plan: Any = SimpleNamespace(total=1)
        pairs: Any = Pairs()
        trainer = Trainer(TrainConfig(), net, nothing, pairs, plan, None, control, nothing, accelerator=one)
        further.append(trainer.backward([((0,), (1,), (2,))])[3])
    assert [list(each) for each in further] == [["accuracy", "margin"]] * 4
    assert [each["accuracy"] for each in further] == [101, 101, 101, 100]


def test_the_time_that_is_told_is_that_of_the_plan_s_turns() -> None:
    """A step of one batch is no faster in eight processes than its longest example is."""
    lengths = [40, 10, 30, 20]
    data, train = DataConfig(packing="off"), TrainConfig(batch_size=2, gradient_accumulation=2)
    plan = EpochPlan(lengths, data, train, packing=False)
    size = lambda part: float(sum(lengths[n] for n in examples_of([part])))  # noqa: E731
    assert plan.work(1, 1, size) == (2 * 40 + 2 * 20, 2 * 40 + 2 * 20)
    assert plan.work(1, 2, size) == (2 * 40 + 2 * 20, 2 * 40)
    assert plan.work(1, 4, size) == plan.work(1, 8, size) == plan.work(2, 8, size) == (100, 40)
    assert plan.work(1, 3, size)[1] < 2 * 40

    heard: list[dict[str, Any]] = []
    run: Any = SimpleNamespace(
        config=SimpleNamespace(train=train),
        accelerator=SimpleNamespace(num_processes=8),
        main=True,
        control=SimpleNamespace(tell=lambda _, **said: heard.append(said)),
        _note=lambda text: heard.append({"note": text}),
    )
    counters = SimpleNamespace(split=1, step=1)
    trainer: Any = SimpleNamespace(counters=counters, objective=SimpleNamespace(weight=size))
    run_torch.Run._tell_time(run, plan, trainer, 10.0)
    assert heard[0]["values"]["seconds"] == pytest.approx((plan.total - 1) * 40 / 10)
    assert "(25 tokens a second)" in heard[0]["text"] and "of 8 processes 4 repeat" in heard[1]["note"]
    run.accelerator = None
    run_torch.Run._tell_time(run, plan, trainer, 10.0)
    assert heard[2]["values"]["seconds"] == pytest.approx((plan.total - 1) * 120 / 10) and len(heard) == 3


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("own", [True, False])
def test_all_processes_take_the_first_one_s_verdict_on_the_head(
    first: bool, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = torch.nn.Linear(2, 2)
    made.get_output_embeddings = lambda: made  # type: ignore[assignment]
    monkeypatch.setattr(loss_torch, "_finish", lambda _: None)
    monkeypatch.setattr(loss_torch, "_agrees", lambda *_: own)
    asked: list[object] = []

    def shared(accelerator: object, value: object) -> object:
        asked.append((accelerator, value))
        return first

    monkeypatch.setattr(loss_torch, "shared", shared)
    accelerator = object()
    loss_torch.try_head(made, [1, 2, 3], accelerator)
    assert asked == [(accelerator, own)]
    assert loss_torch._known[made] is first
