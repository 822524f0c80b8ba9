"""Training runs under `accelerate launch`, as their lines tell."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec
import psutil

import app
from app.core.library import ModelEntry
from app.training.run_config import RunConfig, TrainParameters

ROOT = Path(app.__file__).parents[1]


def environment(root: Path) -> dict[str, str]:
    """Of a child that imports from there."""
    return {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


DDP = """compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
use_cpu: true
num_machines: 1
num_processes: 2
mixed_precision: 'no'
"""
FSDP = f"""{DDP.replace("MULTI_GPU", "FSDP")}fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_reshard_after_forward: true
"""


def launched(
    made: RunConfig,
    model: ModelEntry,
    folder: Path,
    how: str,
    resume: str = "no",
    *,
    kill_at: int = 0,
    fails: bool = False,
    cards: bool = False,
    module: str = "app.training.run_launched",
    **variables: str,
) -> list[dict[str, Any]]:
    """The events of a run under `accelerate launch`. kill_at: it is killed after that step's checkpoint.
    fails: it may end with an error. cards: it may use them. module: what each process runs; with these variables."""
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_bytes(
        msgspec.json.encode(TrainParameters(config=made, model=model, resume=resume))  # type: ignore[arg-type]
    )
    (folder / "accelerate.yaml").write_text(how)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate.yaml"]
    command += ["--main_process_port", str(random.randint(20000, 60000)), "-m", module, "run.json"]
    given = environment(ROOT) if cards else {**environment(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    given |= variables
    events: list[dict[str, Any]] = []
    with (
        (folder / "errors").open("w+") as errors,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=given,
            cwd=folder,
        ) as process,
    ):
        assert process.stdout is not None
        watch = threading.Timer(300, _end, (process.pid,))  # processes that wait for each other wait for ever
        watch.start()
        for line in process.stdout:
            if line.startswith("{"):
                events.append(json.loads(line))
                news = json.loads(events[-1]["json"]) if events[-1]["kind"] == "news" else {}
                if news.get("kind") == "checkpoint" and news["step"] == kill_at:
                    _end(process.pid)
        process.wait(60)
        watch.cancel()
        watch.join()
        errors.seek(0)
        assert kill_at or fails or process.returncode == 0, f"{errors.read()[-3000:]}{events[-3:]}"
    return events


def _end(launcher: int) -> None:
    """Kill a launcher and all that it started."""
    for each in [*psutil.Process(launcher).children(recursive=True), psutil.Process(launcher)]:
        each.kill()
