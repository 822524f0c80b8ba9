"""`weft train --launch`: what launched processes get, and what is made of what they say."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from app import cli_train
from app.core.errors import ErrorKind, WeftError
from app.core.library import ModelEntry, ModelFormat, ModelShape
from app.engine.environments import Environments
from app.training.distribution import processes_here, uses_cards
from app.training.estimate import check_room, estimate
from app.training.run_config import RunConfig, TrainParameters

SECOND = {
    "kind": "failed",
    "error": "out_of_memory",
    "message": "Memory ran out.",
    "hint": "Take a smaller rank.",
    "process": 1,
    "machine": "loom",
}


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Launch "processes" that print lines and end with a status; returns the result and their environment."""
    monkeypatch.setenv("WEFT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(Environments, "python", lambda *_: Path(sys.executable))
    config = tmp_path / "accelerate.yaml"
    config.write_text("distributed_type: MULTI_GPU\nnum_processes: 2\n")
    place = str(tmp_path / "model")
    model = ModelEntry(
        id=place, name="model", path=place, root=str(tmp_path), format=ModelFormat.SAFETENSORS, quantization="BF16"
    )
    parameters = TrainParameters(config=RunConfig(), model=model)
    original = subprocess.Popen

    def run(lines: list[object], status: int) -> tuple[dict[str, Any], dict[str, str]]:
        seen = tmp_path / "environment.json"
        said = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
        script = f"import json, os, sys; json.dump(dict(os.environ), open({str(seen)!r}, 'w')); sys.stdout.write({said!r}); sys.exit({status})"
        monkeypatch.setattr(
            subprocess, "Popen", lambda command, **given: original([sys.executable, "-c", script], **given)
        )
        return cli_train._launch(made(), config, []), json.loads(seen.read_text())

    optimizer = ["adamw"]

    def made() -> TrainParameters:
        train = msgspec.structs.replace(parameters.config.train, optimizer=optimizer[0])
        settings = msgspec.structs.replace(parameters.config.model, device="cpu")
        replaced = msgspec.structs.replace(parameters.config, train=train, model=settings)
        return msgspec.structs.replace(parameters, config=replaced)

    run.optimizer = lambda name: optimizer.__setitem__(0, name)  # type: ignore[attr-defined]
    return run


def test_launched_processes_get_no_secret(launch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {"NCCL_SOCKET_IFNAME": "eth0", "CUDA_VISIBLE_DEVICES": "0,1", "ACCELERATE_LOG_LEVEL": "warning"}
    for name, value in {"HF_TOKEN": "hf_x", "WANDB_API_KEY": "k", **kept}.items():
        monkeypatch.setenv(name, value)
    result, environment = launch([{"kind": "done", "result": {"steps": 1}}], 0)
    assert result == {"steps": 1}
    assert not environment.keys() & {"HF_TOKEN", "WANDB_API_KEY"}
    assert kept.items() <= environment.items() and "PATH" in environment
    assert (Path(environment["PYTHONPATH"]) / "app" / "cli_train.py").is_file()


def test_a_failure_of_the_second_process_is_told_with_its_place(launch: Any) -> None:
    late = SECOND | {"message": "Something that follows from it.", "process": 0}
    noise = ["{'loss': 1.0}", "{}", '{"kind": "met{"kind"']
    with pytest.raises(WeftError, match=r"Memory ran out\. \(Process 1, on loom\.\)") as told:
        launch([*noise, {"kind": "started", "processes": 2, "distribution": "MULTI_GPU"}, SECOND, late], 1)
    assert told.value.kind is ErrorKind.OUT_OF_MEMORY and told.value.hint == SECOND["hint"]


def test_what_all_processes_say_is_told_once_and_without_a_place(launch: Any) -> None:
    with pytest.raises(WeftError) as told:
        launch([SECOND, SECOND | {"process": 0}], 1)
    assert told.value.message == SECOND["message"]


def test_silent_processes_are_a_crash_or_those_of_a_further_machine(launch: Any) -> None:
    started = {"kind": "started", "processes": 2, "distribution": "MULTI_GPU"}
    for lines, status in (([], 3), ([started], 3), ([started], 0)):
        with pytest.raises(WeftError, match=f"status {status}") as told:
            launch(lines, status)
        assert told.value.kind is ErrorKind.CRASHED
    assert launch([], 0)[0] == {}


@pytest.mark.parametrize(
    ("text", "processes", "cards"),
    [
        ("num_processes: 4\nnum_machines: 2\nuse_cpu: true\n", 2, False),
        ('{"num_machines": 2, "num_processes": 5, "use_cpu": false}', 3, True),
        ("num_processes: 8  # num_processes: 1\n", 8, True),
        ("distributed_type: NO\n", 1, True),
        ("num_processes: many\n", 1, True),
    ],
)
def test_what_a_configuration_starts_on_each_machine(text: str, processes: int, cards: bool) -> None:
    assert (processes_here(text), uses_cards(text)) == (processes, cards)


def test_each_launched_process_needs_room_for_a_paged_state(launch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[bool, int]] = []

    def no_room(*_: object, card: bool, processes: int) -> None:
        asked.append((card, processes))
        raise WeftError(ErrorKind.DISK_FULL, "No room.")

    monkeypatch.setattr(cli_train, "check_room", no_room)
    launch([{"kind": "done", "result": {}}], 0)
    assert asked == []  # its optimizer keeps no file
    launch.optimizer("paged_adamw")
    with pytest.raises(WeftError, match="No room"):
        launch([], 0)
    assert asked == [(False, 2)]


def test_the_room_that_is_asked_for_is_that_of_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = RunConfig()
    made = msgspec.structs.replace(
        made,
        train=msgspec.structs.replace(made.train, optimizer="paged_adamw"),
        output=msgspec.structs.replace(made.output, dir=str(tmp_path / "adapter")),
    )
    shape = ModelShape(layers=4, hidden=256, vocabulary=2048, heads=4, kv_heads=4, intermediate=512)
    model = ModelEntry(
        id="m", name="m", path="m", root="m", format=ModelFormat.SAFETENSORS, quantization="BF16", shape=shape
    )
    need = estimate(made, model).file
    assert need > 0
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * need))
    check_room(made, model, card=False, processes=2)
    with pytest.raises(WeftError, match="in 3 files") as told:
        check_room(made, model, card=False, processes=3)
    assert told.value.kind is ErrorKind.DISK_FULL
