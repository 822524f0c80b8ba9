"""What a load will be: saved loader and options, what does not fit, whose code may run. Without Qt."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from app.core.errors import ErrorKind, WeftError
from app.core.library import ModelEntry, ModelFormat
from app.core.memory import Machine
from app.core.model_code import MAX_BYTES, MAX_FILES, check_references, read_code
from app.core.model_config import custom_code
from app.engine.protocol import Loaded
from app.store.database import Database
from app.store.model_settings import ModelSettings
from app.store.settings import SettingsStore
from app.workers.load_plan import LoadPlanner

GB = 10**9


class Desk:
    """A planner over stores of its own; `free` is what the machine has."""

    def __init__(self, folder: Path) -> None:
        self.database = Database(folder / "weft.sqlite")
        self.model_settings = ModelSettings(self.database)
        self.settings = SettingsStore(folder / "settings.toml")
        self.free = 16 * GB
        self.planner = LoadPlanner(
            self.model_settings,
            self.settings,
            is_ready=lambda _: True,
            machine=lambda: Machine(system="linux", cpu_count=2, ram_total=32 * GB, ram_free=self.free),
        )


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path)
    yield made
    made.database.close()


@pytest.fixture
def entry(tmp_path: Path) -> ModelEntry:
    """A model whose code imports a helper beside it."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "modeling.py").write_text("from .helper import x\n")
    (folder / "helper.py").write_text("x = 1\n")
    return ModelEntry(
        id=str(folder),
        name="model",
        path=str(folder),
        format=ModelFormat.SAFETENSORS,
        bytes=GB,
        weight_bytes=GB,
        custom_code=("modeling.py",),
    )


def test_planner_needs_no_qt() -> None:
    code = "import sys, app.workers.load_plan; sys.exit(any('PySide6' in name for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_saved_loader_and_options_are_taken_and_wrong_ones_refused(desk: Desk, entry: ModelEntry) -> None:
    desk.model_settings.set(entry.id, "transformers", {"threads": 1, "of_another_version": True})
    plan = desk.planner.plan(entry)
    assert (plan.spec.id, plan.options, plan.chosen) == ("transformers", {"threads": 1}, "")
    with pytest.raises(WeftError) as refused:
        desk.planner.plan(entry, "", {"threads": "many"})
    assert refused.value.kind is ErrorKind.BAD_INPUT


def test_what_does_not_fit_is_said_with_numbers(desk: Desk, entry: ModelEntry) -> None:
    plan = desk.planner.plan(entry)
    assert desk.planner.shortage(plan) is None
    desk.free = GB // 2
    short = desk.planner.shortage(plan)
    assert short is not None
    assert "500 MB is free" in short.message
    assert desk.planner.shortage(plan, freed=8 * GB) is None


def test_code_runs_only_with_a_yes_and_then_the_option_is_set_too(desk: Desk, entry: ModelEntry) -> None:
    planner = desk.planner
    plain = planner.plan(entry, "", {})
    command = planner.command(plain)
    assert (command.trust_remote_code, command.options) == (False, {})
    ticked = planner.plan(entry, "", {"trust_remote_code": True})
    assert not planner.wants_code(plain)
    assert planner.wants_code(ticked)
    assert not planner.command(ticked).trust_remote_code
    planner.allow_code(entry, planner.code(entry).digest)
    assert not planner.wants_code(ticked)
    for plan in (plain, ticked):
        command = planner.command(plan)
        assert (command.trust_remote_code, command.options["trust_remote_code"]) == (True, True)
    planner.allow_code(entry, "")
    assert not planner.command(ticked).trust_remote_code
    assert planner.command(ticked, allowed=True).trust_remote_code


@pytest.mark.attack
@pytest.mark.parametrize("changed", ["modeling.py", "helper.py", "new.py", "deep/er/new.py"])
def test_yes_is_for_every_file_that_could_be_imported(desk: Desk, entry: ModelEntry, changed: str) -> None:
    planner = desk.planner
    assert planner.code(entry).files == ("helper.py", "modeling.py")
    planner.allow_code(entry, planner.code(entry).digest)
    assert planner.trusts_code(entry)
    path = Path(entry.path, changed)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("import os; os.system('evil')")
    assert not planner.trusts_code(entry)
    assert not planner.command(planner.plan(entry, "", {"trust_remote_code": True})).trust_remote_code


@pytest.mark.attack
def test_yes_is_for_files_behind_links_too(desk: Desk, entry: ModelEntry, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "linked.py").write_text("x = 1")
    Path(entry.path, "package").symlink_to(elsewhere)
    Path(entry.path, "round").symlink_to(entry.path)  # must end
    assert desk.planner.code(entry).files == ("helper.py", "modeling.py", "package/linked.py")
    desk.planner.allow_code(entry, desk.planner.code(entry).digest)
    (elsewhere / "linked.py").write_text("x = 2")
    assert not desk.planner.trusts_code(entry)


@pytest.mark.attack
@pytest.mark.parametrize(
    ("reference", "kind"),
    [
        ("..etc.passwd.X", ErrorKind.HOSTILE),
        ("/tmp/evil.X", ErrorKind.HOSTILE),
        ("../evil.X", ErrorKind.HOSTILE),
        ("C:/evil.X", ErrorKind.HOSTILE),
        ("a\\b.X", ErrorKind.HOSTILE),
        (".X", ErrorKind.HOSTILE),
        ("org/repo--x.X", ErrorKind.UNSUPPORTED),
    ],
)
def test_code_from_elsewhere_is_refused_in_words(
    desk: Desk, entry: ModelEntry, reference: str, kind: ErrorKind
) -> None:
    config = Path(entry.path, "config.json")
    config.write_bytes(msgspec.json.encode({"auto_map": {"AutoModelForCausalLM": reference}}))
    there = msgspec.structs.replace(entry, custom_code=custom_code(config.parent))
    assert there.custom_code
    with pytest.raises(WeftError) as refused:
        desk.planner.code(there)
    assert refused.value.kind is kind
    if kind is ErrorKind.UNSUPPORTED:
        assert "another repository, org/repo" in refused.value.message
    with pytest.raises(WeftError):
        desk.planner.command(desk.planner.plan(there, "", {}), allowed=True)
    assert not desk.planner.trusts_code(there)


def test_ordinary_references_are_the_folder_s(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoConfig": "configuration_x.C", "AutoModel": "sub.m.M"}}')
    assert custom_code(tmp_path) == ("configuration_x.py", "sub/m.py")
    check_references("m", custom_code(tmp_path))


@pytest.mark.attack
def test_more_code_than_anybody_reads_is_refused(entry: ModelEntry) -> None:
    folder = Path(entry.path)
    (folder / "padded.py").write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(WeftError, match="larger than"):
        read_code(folder)
    (folder / "padded.py").unlink()
    for number in range(MAX_FILES):
        (folder / f"m{number}.py").touch()
    with pytest.raises(WeftError, match="Python files"):
        read_code(folder)


def test_what_was_measured_here_goes_along_with_the_next_load(desk: Desk, entry: ModelEntry) -> None:
    plan = desk.planner.plan(entry, "transformers")
    assert desk.planner.command(plan).calibration == {}
    desk.planner.remember(plan, Loaded(context=8, calibration={"threads/8/29": 4}))
    desk.planner.remember(plan, Loaded(context=8, calibration={"threads/8/31": 8}))
    assert desk.planner.command(plan).calibration == {"threads/8/29": 4, "threads/8/31": 8}
    again = SettingsStore(desk.settings.path)
    assert again.settings.calibration == desk.settings.settings.calibration
    # What another machine with the same home measured is not ours.
    desk.settings.update(calibration={"elsewhere/transformers/threads/8/29": 2})
    assert desk.planner.command(plan).calibration == {}
