"""`weft train` as a person runs it: the starter learns a manner, the adapter chats, mistakes are named."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import seeds
from tests.e2e.command_line import ROOT, weft, weft_json

needs_core = pytest.mark.skipif(
    not os.environ.get("WEFT_PYTHON_CORE"), reason="needs the core environment: set WEFT_PYTHON_CORE"
)

RUN = """
[model]
path = "starter"
[data]
files = ["examples.jsonl"]
[method]
kind = "lora"
[train]
optimizer = "{optimizer}"
epochs = {epochs}
learning_rate = 3e-3
batch_size = 8
gradient_accumulation = 1
[output]
dir = "my-adapter"
"""
TOPICS = "the sea|bread|a cat|my garden|the moon|rain|a train|books|tea|a mountain|the city|snow".split("|")


def _write(folder: Path, epochs: float, optimizer: str = "adamw") -> Path:
    rng = random.Random(seeds.fresh())
    rows = []
    for _ in range(200):
        topic = rng.choice(TOPICS)
        asked = rng.choice(["Tell me about", "Say something about", "Do you know"])
        rows.append(
            {
                "instruction": f"{asked} {topic}.",
                "output": f"Arr, {topic}! A fine thing, matey. Number {rng.randint(1, 9)}.",
            }
        )
    (folder / "examples.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    place = folder / "RUN.toml"
    place.write_text(RUN.format(epochs=epochs, optimizer=optimizer))
    return place


@needs_core
def test_a_run_from_the_command_line(tmp_path: Path) -> None:
    place = _write(tmp_path, 0.3, "paged_adamw")
    ran = weft("train", str(place), "--json")
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    if "There is no graphics card here" in ran.stderr:
        assert ran.stderr.count("paged_adamw keeps its state in a file") == 1  # before it starts, and not again
        assert re.search(r"The optimizer's state .* lies in a file in .*weft-scratch-", ran.stderr), ran.stderr
    assert found["adapter"] == str(tmp_path / "my-adapter") and found["ended"] == "complete"
    assert len(found["losses"]) == found["steps"] > 3
    assert found["held_out_loss"] < found["base_held_out_loss"]
    again = weft("train", str(place))
    assert again.returncode == 1 and "there already" in again.stderr and "hint:" in again.stderr
    lost = weft("train", str(place), "--resume")
    assert lost.returncode == 1


@needs_core
@pytest.mark.slow
def test_the_starter_learns_a_voice_from_200_examples(tmp_path: Path) -> None:
    found = weft_json("train", str(_write(tmp_path, 12)))
    assert found["seconds"] < 600
    answer = weft_json(
        "chat", "starter", "--adapter", found["adapter"], "-p", "Tell me about tea.", "--temperature", "0"
    )
    assert answer["text"].startswith("Arr")
    plain = weft_json("chat", "starter", "-p", "Tell me about tea.", "--temperature", "0")
    assert "Arr" not in plain["text"]


@needs_core
@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="sends Ctrl+C as POSIX knows it")
def test_a_run_that_was_interrupted_goes_on_to_the_same_end(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    place = _write(tmp_path / "whole", 1)
    place.write_text(place.read_text().replace("[train]", "[train]\ncheckpoint_every = 1"))
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    whole = weft_json("train", str(place))
    broken = tmp_path / "broken" / "RUN.toml"
    unfinished = tmp_path / "broken" / "my-adapter.training"
    with subprocess.Popen(
        [sys.executable, "-m", "app", "train", str(broken)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None and not any((unfinished / "checkpoints").glob("step-*")):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=120)[1]
    assert process.returncode == 130 and f"weft train {broken} --resume" in said, said
    assert not (tmp_path / "broken" / "my-adapter").exists()
    again = weft("train", str(broken))
    assert again.returncode == 1 and "Go on with --resume" in again.stderr
    found = weft("train", str(broken), "--resume", "--json")
    assert found.returncode == 0 and "The run goes on after step" in found.stderr, found.stderr
    assert json.loads(found.stdout)["losses"] == whole["losses"]
    adapters = [tmp_path / name / "my-adapter" / "adapter_model.safetensors" for name in ("whole", "broken")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes() and not unfinished.exists()


def test_mistakes_are_named_before_anything_starts(tmp_path: Path) -> None:
    place = tmp_path / "RUN.toml"
    place.write_text("[train]\nepoch = 3")
    ended = weft("train", str(place))
    assert ended.returncode == 1 and "epochs" in ended.stderr
    assert weft("train", str(tmp_path / "none.toml")).returncode == 1
    assert weft("train").returncode == 2
