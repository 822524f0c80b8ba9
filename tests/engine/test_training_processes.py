"""What one process of several says and waits for, without a second one."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from torch import distributed

from app.core.errors import ErrorKind, WeftError
from app.core.library import ModelEntry
from app.training import distributed_torch, loss_torch, run_launched, run_torch
from app.training.run_config import TrainParameters
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
