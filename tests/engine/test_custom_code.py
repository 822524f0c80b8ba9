"""A model that brings its own Python code, from the library's entry to an answer: refused, allowed, changed again."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed in this interpreter")
pytest.importorskip("transformers", reason="transformers is not installed in this interpreter")

from app.core.errors import ErrorKind, WeftError
from app.core.library import ModelEntry
from app.core.memory import Machine
from app.core.recognise import recognise_model
from app.core.sampling import Sampling
from app.engine.client import EngineClient
from app.engine.protocol import Done, Generate, Generated, Load, Loaded
from app.store.database import Database
from app.store.model_settings import ModelSettings
from app.store.settings import SettingsStore
from app.workers.load_plan import LoadPlanner
from tests.engine import tiny_models
from tests.engine.backend_kit import user

CONFIGURATION = """
from transformers import LlamaConfig

class WeftTestConfig(LlamaConfig):
    model_type = "weft_test_of_own_code"
"""
MODELING = """
from pathlib import Path
from transformers import LlamaForCausalLM
from .configuration_own import WeftTestConfig
from .helper_own import RAN

Path(RAN).write_text("ran")

class WeftTestForCausalLM(LlamaForCausalLM):
    config_class = WeftTestConfig
"""


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """Exists once the model's code has run."""
    return tmp_path / "ran"


@pytest.fixture
def model(tmp_path: Path, ran: Path) -> ModelEntry:
    folder = tmp_path / "own-code"
    tiny_models.make(folder, seed=3)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "weft_test_of_own_code",
        "architectures": ["WeftTestForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_own.WeftTestConfig",
            "AutoModelForCausalLM": "modeling_own.WeftTestForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_own.py").write_text(CONFIGURATION)
    (folder / "modeling_own.py").write_text(MODELING)
    (folder / "helper_own.py").write_text(f"RAN = {str(ran)!r}\n")
    entry = recognise_model(folder)
    assert entry is not None and not entry.problem
    return entry


@pytest.fixture
def planner(tmp_path: Path) -> Iterator[LoadPlanner]:
    database = Database(tmp_path / "weft.sqlite")
    here = Machine(system="linux", cpu_count=2, ram_total=2**35, ram_free=2**34)
    yield LoadPlanner(
        ModelSettings(database),
        SettingsStore(tmp_path / "settings.toml"),
        is_ready=lambda _: True,
        machine=lambda: here,
    )
    database.close()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[EngineClient]:
    client = EngineClient(
        python=Path(sys.executable),
        backend="transformers",
        log_path=tmp_path / "engine.log",
        environment={"HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    client.start()
    yield client
    client.shutdown(timeout=10)


def load(engine: EngineClient, command: Load) -> Generated:
    """Load, and have it answer. Raises what the engine says."""
    assert any(isinstance(event, Loaded) for event in list(engine.call(command)))
    asked = Generate(messages=(user("Hello"),), sampling=Sampling(temperature=0, max_tokens=4))
    done = list(engine.call(asked))[-1]
    assert isinstance(done, Done) and isinstance(done.result, Generated)
    return done.result


def test_own_code_runs_when_it_was_allowed_and_only_then(
    planner: LoadPlanner, model: ModelEntry, ran: Path, engine: EngineClient
) -> None:
    plan = planner.plan(model)
    with pytest.raises(WeftError) as refused:
        load(engine, planner.command(plan))
    assert refused.value.kind is ErrorKind.UNSUPPORTED
    assert planner.code_would_help(plan, refused.value)
    assert not ran.exists()

    code = planner.code(model)
    assert code.files == ("configuration_own.py", "helper_own.py", "modeling_own.py")
    planner.allow_code(model, code.digest)
    assert load(engine, planner.command(plan)).tokens > 0
    assert ran.exists()

    ran.unlink()
    with Path(model.path, "helper_own.py").open("a") as helper:
        helper.write("X = 1\n")
    with pytest.raises(WeftError) as again:
        load(engine, planner.command(plan))
    assert planner.code_would_help(plan, again.value)
    assert not ran.exists()


def test_one_word_on_the_command_line_is_enough(
    planner: LoadPlanner, model: ModelEntry, ran: Path, engine: EngineClient
) -> None:
    plan = planner.plan(model, "", {"trust_remote_code": True})
    load(engine, planner.command(plan, allowed=True))
    assert ran.exists()
