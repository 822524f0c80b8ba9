"""Memory that really runs out: the system refuses it to PyTorch's own allocator. The batch is halved, and learns the same."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from app.core.library import ModelEntry
from app.training import run_torch
from app.training.run_config import RunConfig
from app.training.trainer_data_torch import SftData
from tests import seeds
from tests.engine import fork_kit, tiny_models, training_kit
from tests.engine.launch_kit import DDP, FSDP, launched
from tests.engine.training_kit import Remembering, config, train

pytestmark = [
    pytest.mark.fault,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits private memory, as only Linux can"),
]
SEED = seeds.of(__name__, 10**6)
ROWS = 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelEntry:
    print(f"seed {SEED}")
    return tiny_models.make(tmp_path_factory.mktemp("model"), "llama", seed=SEED, max_position_embeddings=4096)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows so long that activations are most of what a step takes."""
    words = " ".join(training_kit.WORDS * 4)
    place = tmp_path_factory.mktemp("data") / "rows.jsonl"
    place.write_text("\n".join(f'{{"text": "{index} {words}"}}' for index in range(ROWS * 2)))
    return place


def settings(folder: Path, model: ModelEntry, data: Path, **train: Any) -> RunConfig:
    given = {"batch_size": ROWS, "gradient_accumulation": 1, "packing": False, "max_length": 256, "max_steps": 2}
    shape = {"chunked_loss": False, "precision": "fp32", "checkpoint_every": 1}
    return config(folder, model, data, data={"held_out": 0}, train={**given, **shape, **train})


def running(made: RunConfig, model: ModelEntry, *, spare: int | None = None, after: int = 0) -> Callable[[], Any]:
    """A run; with `spare`, only so many further bytes are granted from the step without effect on, or after a step.

    It returns losses, what was said of the batch, and the memory that the first batch took.
    """

    def work() -> dict[str, Any]:
        torch.set_num_threads(1)
        report, taken = Remembering(), [0]
        loss, try_out = SftData.loss, run_torch.try_out

        def measured(self: Any, model: Any, batch: Any) -> Any:
            before = fork_kit.private_memory()
            found = loss(self, model, batch)
            taken.append(fork_kit.private_memory() - before)
            return found

        def limited(*given: Any) -> Any:
            fork_kit.allow_only(None if after else spare)
            return try_out(*given)

        def at_step(step: int) -> None:
            if step == after:
                fork_kit.allow_only(spare)

        SftData.loss, run_torch.try_out, report.at_step = measured, limited, at_step  # type: ignore[method-assign]
        result = train(made, model, report)
        said = [(news["step"], news["text"]) for news in report.heard if news["kind"] == "split"]
        return {"losses": result.losses, "said": said, "logs": report.logs, "taken": max(taken)}

    return work


@pytest.fixture(scope="module")
def whole(model: ModelEntry, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run where memory suffices."""
    found = fork_kit.in_a_fork(running(settings(tmp_path_factory.mktemp("whole"), model, data), model))
    print(f"the batch takes {found['taken'] / 2**20:.0f} MiB")
    assert found["said"] == [] and found["taken"] > 64 * 2**20
    return found


@pytest.mark.parametrize("after", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_batch_that_does_not_fit_is_halved_and_learns_the_same(
    after: int, whole: dict[str, Any], model: ModelEntry, data: Path, tmp_path: Path
) -> None:
    """In the step without effect; and in the midst of the run, where something else has taken the memory meanwhile."""
    made = settings(tmp_path, model, data)
    found = fork_kit.in_a_fork(running(made, model, spare=whole["taken"] * 4 // 5, after=after))
    step, text = found["said"][0]  # what the first attempt took comes back in pieces: it may need another
    assert step == after and f"batches of {ROWS // 2} instead of {ROWS}" in text and "2 instead of 1 of them" in text
    assert any("Memory ran out" in line for line in found["logs"])
    assert found["losses"] == pytest.approx(whole["losses"], rel=1e-4)


def test_where_not_one_row_fits_it_is_said_and_nothing_is_left(model: ModelEntry, tmp_path: Path) -> None:
    words = " ".join(training_kit.WORDS * 40)
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(f'{{"text": "{index} {words}"}}' for index in range(2)))
    made = settings(tmp_path, model, data, batch_size=1, max_length=2048, max_steps=1)
    with pytest.raises(fork_kit.Failed, match="Not even one sequence at once fits into memory") as caught:
        fork_kit.in_a_fork(running(made, model, spare=8 * 2**20))
    assert "DefaultCPUAllocator" in str(caught.value)  # its own words, not a test's
    assert not Path(made.output.dir).exists() and not (tmp_path / "adapter.training").exists()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_memory_that_runs_out_in_one_of_two_processes(
    way: str, whole: dict[str, Any], model: ModelEntry, data: Path, tmp_path: Path
) -> None:
    """Processes that each hold the model halve the batch together; those that share it out say what helps, and end."""
    made = settings(tmp_path / "run", model, data, gradient_accumulation=2)
    one = fork_kit.in_a_fork(running(settings(tmp_path / "one", model, data, gradient_accumulation=2), model))
    events = launched(
        msgspec.structs.replace(made, model=msgspec.structs.replace(made.model, device="cpu")),
        model,
        tmp_path / "run",
        DDP if way == "ddp" else FSDP,
        fails=way == "fsdp",
        module="tests.engine.limited_process",
        WEFT_TEST_SPARE=str(whole["taken"] * 4 // 5),
    )
    if way == "fsdp":
        told = next(event for event in events if event["kind"] == "failed")
        assert (told["error"], told["process"]) == ("out_of_memory", 1) and "max_length" in told["hint"]
        return
    news = [msgspec.json.decode(event["json"]) for event in events if event["kind"] == "news"]
    assert any(f"batches of {ROWS // 2} instead of {ROWS}" in each["text"] for each in news if each["kind"] == "split")
    assert events[-1]["kind"] == "done", events[-1]
    assert events[-1]["result"]["losses"] == pytest.approx(one["losses"], rel=1e-3)
