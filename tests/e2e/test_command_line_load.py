"""`weft chat` loads as the window does: saved options, what does not fit, whose code may run, which environment serves."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from app import cli_engine
from app.core.errors import WeftError
from app.core.library import ModelEntry
from app.core.memory import Machine
from app.core.paths import default_paths, resources
from app.core.recognise import recognise_model
from app.core.stack import AdapterStack
from app.engine.environment_folders import Stamp
from app.engine.environments import Environments, variable_of
from app.store.database import Database
from app.store.library import starter
from app.store.model_settings import ModelSettings
from app.store.settings import SettingsStore
from app.workers.load_plan import LoadPlanner
from tests.e2e.command_line import weft, weft_json

GGUF = "starter (GGUF)"
SHORT = ("-p", "Hello", "--max-tokens", "2")


@pytest.fixture
def saved(home: Path) -> Iterator[ModelSettings]:
    """What the window would have remembered of each model."""
    database = Database(default_paths().database)
    yield ModelSettings(database)
    database.close()


def test_options_saved_for_a_model_are_taken_and_given_ones_come_first(saved: ModelSettings) -> None:
    saved.set(starter("starter (gguf)").id, "llama_cpp", {"n_ctx": 16_000_000})
    refused = weft("chat", GGUF, *SHORT)
    assert refused.returncode == 1
    assert "may not fit" in refused.stderr and "is free" in refused.stderr and "--anyway" in refused.stderr
    assert weft("chat", GGUF, *SHORT, "--option", "n_ctx=512").returncode == 0


def test_anyway_leaves_it_to_the_engine(saved: ModelSettings) -> None:
    here = Machine(system="linux", cpu_count=2, ram_total=2**30, ram_free=2**20)
    store = SettingsStore(default_paths().settings)
    planner = LoadPlanner(saved, store, is_ready=lambda _: True, machine=lambda: here)
    asked = argparse.Namespace(loader="", option=[], anyway=False)
    with pytest.raises(WeftError, match="may not fit"):
        cli_engine.plan_load(planner, starter("starter (gguf)"), asked, AdapterStack())
    asked.anyway = True
    plan, command = cli_engine.plan_load(planner, starter("starter (gguf)"), asked, AdapterStack())
    assert command.model == plan.entry


def test_threads_are_measured_once_on_a_machine(home: Path) -> None:
    log = default_paths().logs / "engine-llama_cpp.log"
    assert weft("chat", GGUF, *SHORT).returncode == 0
    measured = SettingsStore(default_paths().settings).settings.calibration
    if os.cpu_count() == 1:
        pytest.skip("one processor: there is nothing to choose")
    assert [name for name in measured if "/llama_cpp/threads" in name]
    assert "Measured:" in log.read_text()
    log.unlink()
    assert weft("chat", GGUF, *SHORT).returncode == 0
    assert "as measured before" in log.read_text()
    assert "Measured:" not in log.read_text()


@pytest.fixture
def own_code(tmp_path: Path) -> ModelEntry:
    """The starter under an architecture that only its own code knows."""
    folder = tmp_path / "own-code"
    shutil.copytree(resources() / "starter" / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "weft_test_cli",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'weft_test_cli'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    entry = recognise_model(folder)
    assert entry is not None and not entry.problem
    return entry


@pytest.mark.attack
def test_a_model_s_code_runs_on_the_user_s_word_alone(
    own_code: ModelEntry, saved: ModelSettings, tmp_path: Path
) -> None:
    plain = weft("chat", own_code.path, *SHORT)
    assert plain.returncode == 1 and "--option trust_remote_code=true" in plain.stderr
    saved.set(own_code.id, "transformers", {"trust_remote_code": True})  # ticked, and never reviewed
    ticked = weft("chat", own_code.path, *SHORT)
    assert ticked.returncode == 1 and "nobody has allowed" in ticked.stderr
    assert not (tmp_path / "ran").exists()
    assert weft("chat", own_code.path, *SHORT, "--option", "trust-remote-code=true").returncode == 0
    assert (tmp_path / "ran").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="stands in for the interpreter with a shell script")
def test_an_outdated_environment_serves_and_is_not_installed_again(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = os.environ.get(variable_of("llamacpp"))
    if not python:
        pytest.skip(f"{variable_of('llamacpp')} names no interpreter")
    monkeypatch.delenv(variable_of("llamacpp"))
    monkeypatch.setenv("WEFT_ENVIRONMENTS", str(tmp_path / "environments"))
    environments = Environments(tmp_path / "environments")
    interpreter = environments.interpreter("llamacpp")
    interpreter.parent.mkdir(parents=True)
    interpreter.write_text(f'#!/bin/sh\nexec {python} "$@"\n')
    interpreter.chmod(0o755)
    layers = {layer.name: "of an older Weft" for layer in environments.spec("llamacpp").layers}
    environments.write_stamp("llamacpp", msgspec.structs.replace(Stamp(), layers=layers, probed=True))
    assert environments.state("llamacpp").value == "outdated"
    (row,) = [row for row in weft_json("loaders") if row["id"] == "llama_cpp"]
    assert row["ready"] and not row["reason"]
    ended = weft("chat", GGUF, *SHORT)
    assert ended.returncode == 0
    assert "Installing" not in ended.stderr
