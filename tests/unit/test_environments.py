"""Engine environments: what is installed when, what an interruption leaves, and what a failure says."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import threading
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from app.core.errors import ErrorKind, WeftError
from app.core.jobs import Progress
from app.core.paths import resources
from app.engine import compiler
from app.engine.environment_source import unpack
from app.engine.environments import Environments, EnvironmentState

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(os.name == "nt", reason="the fake uv is a POSIX script")

TWO_LAYERS = """
title = "Thing"
summary = "For tests."
bytes = 1000
minutes = 1
python = ["3.11", "3.99"]
probe = "PROBE"

[[layers]]
name = "base"
title = "the base"
requirements = ["one==1", "two==2"]

[[layers]]
name = "native"
title = "the native part"
compiles = "native"
requirements = ["native==3"]
GPU

[[layers]]
name = "extra"
title = "something more"
optional = true
requirements = ["extra==4"]
"""


class World:
    """A root, one definition `thing`, and a fake uv with a plan."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.definitions = folder / "definitions"
        self.definitions.mkdir()
        self.define()
        self.environments = Environments(folder / "environments", (self.definitions,))
        self.log = io.StringIO()
        self.seen: list[Progress] = []
        uv = folder / "uv"
        fake = ROOT / "tests" / "fakes" / "fake_uv.py"
        uv.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(fake))} {shlex.quote(str(folder))} "$@"\n')
        uv.chmod(0o755)

    def define(self, text: str = TWO_LAYERS, probe: str = "pass", gpu: str = "") -> None:
        text = text.replace("PROBE", probe).replace("GPU", f"gpu = {json.dumps(gpu)}" if gpu else "")
        (self.definitions / "thing.toml").write_text(text, encoding="utf-8")
        self.environments = Environments(self.folder / "environments", (self.definitions,))

    def plan(self, **plans: dict[str, object]) -> None:
        names = {"base": "one==1", "native": "native==3", "extra": "extra==4"}
        (self.folder / "plan.json").write_text(json.dumps({names[name]: plan for name, plan in plans.items()}))

    def install(self, cancelled: Callable[[], bool] = lambda: False, *, repair: bool = False) -> None:
        self.environments.install("thing", self.seen.append, self.log, cancelled, repair=repair)

    @property
    def state(self) -> EnvironmentState:
        return Environments(self.environments.root, (self.definitions,)).state("thing")

    @property
    def calls(self) -> list[dict]:
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def installed(self) -> list[str]:
        """Requirements that uv was asked for, in order."""
        return [part for call in self.calls if call["arguments"][0] == "pip" for part in call["arguments"] if "==" in part]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(tmp_path)
    monkeypatch.setenv("WEFT_UV", str(tmp_path / "uv"))
    monkeypatch.delenv("CMAKE_ARGS", raising=False)
    monkeypatch.setattr("app.engine.environment_install.package_sources", lambda: _sources())
    monkeypatch.setattr("app.engine.environment_install._FREE_RESERVE", 0)
    monkeypatch.setattr(compiler, "has_compiler", lambda: True)
    return made


def _sources(**fields: object) -> object:
    from app.engine.package_sources import Sources

    return Sources(**{"variables": {}, **fields})


# From nothing to ready --------------------------------------------------------------------------


def test_an_environment_is_installed_layer_by_layer_and_then_ready(world: World) -> None:
    assert world.state is EnvironmentState.MISSING
    with pytest.raises(WeftError) as missing:
        world.environments.python("thing")
    assert missing.value.kind is ErrorKind.ENVIRONMENT
    assert "environments install thing" in missing.value.hint
    world.install()
    assert world.state is EnvironmentState.READY
    assert world.installed() == ["one==1", "two==2", "native==3", "extra==4"]
    python = world.environments.python("thing")
    assert subprocess.run([python, "-c", "print(6 * 7)"], capture_output=True, text=True).stdout == "42\n"
    assert not world.environments.marker("thing").exists()
    assert "native==3" in world.log.getvalue()
    assert {"Making the environment", "Installing the base", "Installing the native part", "Trying it out"} <= {p.phase for p in world.seen}


def test_installing_again_does_nothing(world: World) -> None:
    world.install()
    before = len(world.calls)
    world.install()
    assert len(world.calls) == before


def test_what_uv_says_becomes_the_phase(world: World) -> None:
    said = ["Resolved 2 packages in 3ms", "Downloading torch (180.1MiB)", "Downloading numpy (15.9MiB)", " Downloaded numpy"]
    world.plan(base={"say": said, "sleep": 1.0}, native={"say": ["   Building native==3"], "sleep": 1.0})
    world.install()
    phases = [p.phase for p in world.seen]
    assert "Downloading torch (180.1MiB)" in phases
    assert "Compiling native" in phases


def test_an_installation_that_does_not_run_is_not_ready(world: World) -> None:
    world.define(probe="raise SystemError('illegal instruction')")
    with pytest.raises(WeftError, match=r"does not run.*illegal instruction"):
        world.install()
    assert world.state is EnvironmentState.INCOMPLETE


# Interruptions and failures ---------------------------------------------------------------------


@pytest.mark.fault
def test_an_installation_that_failed_goes_on_where_it_stopped(world: World) -> None:
    world.plan(native={"fail": "error: Failed to fetch: `native`\n  Caused by: dns error"})
    with pytest.raises(WeftError) as failed:
        world.install()
    assert failed.value.kind is ErrorKind.NETWORK
    assert "install again" in failed.value.hint
    assert world.state is EnvironmentState.INCOMPLETE
    assert world.environments.marker("thing").exists()
    world.plan()
    done = len(world.installed())
    world.install()
    assert world.installed()[done:] == ["native==3", "extra==4"]
    assert world.state is EnvironmentState.READY


def test_an_optional_layer_of_a_newer_weft_is_added_by_the_next_installation(world: World) -> None:
    world.install()
    stamp = world.environments.read_stamp("thing")
    del stamp.layers["extra"]  # as a Weft that did not know it left it
    world.environments.write_stamp("thing", stamp)
    assert world.state is EnvironmentState.OUTDATED
    done = len(world.installed())
    world.install()
    assert world.installed()[done:] == ["extra==4"]
    assert world.state is EnvironmentState.READY


@pytest.mark.fault
def test_a_failed_optional_layer_leaves_the_rest_usable_and_is_tried_again(world: World) -> None:
    world.plan(extra={"fail": "error: no wheel of extra for this system"})
    world.install()
    assert world.state is EnvironmentState.READY
    assert world.environments.python("thing").exists()
    assert "no wheel of extra" in world.environments.failed_layers("thing")["something more"]
    world.plan()
    world.install()
    assert world.environments.failed_layers("thing") == {}
    assert world.installed()[-1] == "extra==4"


@pytest.mark.fault
def test_cancelling_ends_the_whole_tree_at_once(world: World) -> None:
    world.plan(native={"child": True, "sleep": 60})
    cancel = threading.Event()
    pid_file = world.folder / "child.pid"

    def cancelled() -> bool:
        if pid_file.exists() and pid_file.read_text():
            cancel.set()
        return cancel.is_set()

    started = time.monotonic()
    with pytest.raises(WeftError) as stopped:
        world.install(cancelled)
    assert stopped.value.kind is ErrorKind.CANCELLED
    assert time.monotonic() - started < 20
    assert not _runs(int(pid_file.read_text()))
    assert world.state is EnvironmentState.INCOMPLETE


@pytest.mark.fault
def test_a_killed_installer_leaves_something_that_can_be_completed(world: World) -> None:
    world.plan(native={"sleep": 60})
    program = (
        "import sys; from pathlib import Path; from app.engine.environments import Environments\n"
        "Environments(Path(sys.argv[1]), (Path(sys.argv[2]),)).install('thing', lambda p: None, sys.stderr, lambda: False)"
    )
    command = [sys.executable, "-c", program, str(world.environments.root), str(world.definitions)]
    installer = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
    try:
        _wait(lambda: "native==3" in world.installed())
        with pytest.raises(WeftError) as busy:
            world.install()
        assert busy.value.kind is ErrorKind.BUSY
    finally:
        tree = psutil.Process(installer.pid).children(recursive=True)
        installer.send_signal(signal.SIGKILL)
        installer.wait()
    _wait(lambda: not any(_runs(process.pid) for process in tree))
    assert world.state is EnvironmentState.INCOMPLETE
    world.plan()
    done = len(world.installed())
    world.install()
    assert world.installed()[done:] == ["native==3", "extra==4"]
    assert world.state is EnvironmentState.READY


@pytest.mark.parametrize(
    ("last_words", "kind", "hint"),
    [
        ("error: Failed to write\n  Caused by: No space left on device (os error 28)", ErrorKind.DISK_FULL, "Make room"),
        ("error: Failed to fetch x\n  Caused by: tcp connect error: Connection refused", ErrorKind.NETWORK, "connection"),
        ("  × Failed to build\n  CMake Error: CMAKE_CXX_COMPILER not set", ErrorKind.ENVIRONMENT, "Transformers"),
        ("error: failed to create\n  Caused by: Permission denied (os error 13)", ErrorKind.PERMISSION, "owns the folder"),
        ("error: something new", ErrorKind.ENVIRONMENT, "log"),
    ],
)
@pytest.mark.fault
def test_a_failure_says_what_to_do_next(world: World, last_words: str, kind: ErrorKind, hint: str) -> None:
    world.plan(base={"fail": last_words})
    with pytest.raises(WeftError) as failed:
        world.install()
    assert failed.value.kind is kind
    assert hint in failed.value.hint
    assert failed.value.message


@pytest.mark.fault
def test_a_disk_without_room_is_refused_before_anything_is_written(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.engine.environment_install._FREE_RESERVE", 10**18)
    with pytest.raises(WeftError) as full:
        world.install()
    assert full.value.kind is ErrorKind.DISK_FULL
    assert world.calls == []


# Changes of pins, damage, repair, removal -------------------------------------------------------


def test_changed_pins_make_it_outdated_but_usable_and_only_they_are_installed(world: World) -> None:
    world.install()
    world.define(TWO_LAYERS.replace("native==3", "native==3.1"))
    later = Environments(world.environments.root, (world.definitions,))
    assert later.state("thing") is EnvironmentState.OUTDATED
    assert later.python("thing").exists()
    done = len(world.installed())
    later.install("thing", world.seen.append, world.log, lambda: False)
    assert world.installed()[done:] == ["native==3.1"]
    assert later.state("thing") is EnvironmentState.READY


@pytest.mark.fault
def test_a_python_that_has_gone_is_told_and_made_anew(world: World) -> None:
    world.install()
    world.environments.interpreter("thing").unlink()
    assert world.state is EnvironmentState.BROKEN
    with pytest.raises(WeftError, match="its Python is gone"):
        world.environments.python("thing")
    world.install()
    assert world.state is EnvironmentState.READY


@pytest.mark.fault
def test_a_repair_that_fails_gives_back_what_was_there(world: World) -> None:
    world.install()
    (world.environments.folder("thing") / "mine").touch()
    world.plan(native={"fail": "error: Connection refused"})
    with pytest.raises(WeftError):
        world.install(repair=True)
    assert world.state is EnvironmentState.READY
    assert (world.environments.folder("thing") / "mine").exists()
    world.plan()
    world.install(repair=True)
    assert world.state is EnvironmentState.READY
    assert not (world.environments.folder("thing") / "mine").exists()
    assert [path.name for path in world.environments.root.iterdir() if path.is_dir()] == ["thing"]


@pytest.mark.fault
def test_ctrl_c_during_a_repair_gives_back_what_was_there_and_ends_the_tree(world: World) -> None:
    world.install()
    (world.environments.folder("thing") / "mine").touch()
    world.plan(native={"child": True, "sleep": 60})
    pid_file = world.folder / "child.pid"

    def interrupted() -> bool:
        if pid_file.exists() and pid_file.read_text():
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        world.install(interrupted, repair=True)
    assert not _runs(int(pid_file.read_text()))
    assert world.state is EnvironmentState.READY
    assert (world.environments.folder("thing") / "mine").exists()


KILLED = """
import io, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from app.engine import environment_install
from app.engine.environments import Environments
from app.engine.package_sources import Sources
environment_install.package_sources = lambda: Sources(variables={})
environment_install._FREE_RESERVE = 0
environments = Environments(Path(sys.argv[2]), (Path(sys.argv[3]),))
environments.install("thing", lambda progress: None, io.StringIO(), lambda: False, repair=True)
"""


@pytest.mark.fault
@pytest.mark.parametrize("whole", [False, True], ids=["killed midway", "killed when all but done"])
def test_a_repair_that_is_killed_gives_back_what_was_there(world: World, whole: bool) -> None:
    world.install()
    (world.environments.folder("thing") / "mine").touch()
    if whole:
        world.install(repair=True)
        aside, new = world.environments.aside("thing"), world.environments.folder("thing")
        (aside / "bin").mkdir(parents=True)
        world.environments.marker("thing").touch()
        assert world.state is EnvironmentState.READY and new.exists()
    else:
        world.plan(native={"child": True, "sleep": 60})
        command = [sys.executable, "-c", KILLED, str(ROOT), str(world.environments.root), str(world.definitions)]
        with subprocess.Popen(command) as installer:
            _wait(lambda: world.environments.aside("thing").exists() and (world.folder / "child.pid").exists())
            assert world.state is EnvironmentState.INCOMPLETE  # it still runs: nothing is taken from under it
            installer.kill()
        _wait(lambda: world.state is EnvironmentState.READY)  # as soon as the dead one's lock is
        assert (world.environments.folder("thing") / "mine").exists()
    assert world.environments.python("thing").exists()
    assert not world.environments.aside("thing").exists() and not world.environments.marker("thing").exists()
    world.plan()
    world.install(repair=True)
    assert [path.name for path in world.environments.root.iterdir() if path.is_dir()] == ["thing"]


def test_removing_leaves_nothing_but_the_lock(world: World) -> None:
    world.environments.remove("thing")  # nothing there: nothing happens
    world.install()
    assert world.environments.size("thing") > 0
    world.environments.remove("thing")
    assert world.state is EnvironmentState.MISSING
    assert [path.name for path in world.environments.root.iterdir()] == ["thing.lock"]


@pytest.mark.fault
def test_a_damaged_stamp_counts_as_incomplete(world: World) -> None:
    world.install()
    (world.environments.folder("thing") / "weft-stamp.json").write_bytes(b"\xff{")
    assert world.state is EnvironmentState.INCOMPLETE
    world.install()
    assert world.state is EnvironmentState.READY


def test_a_variable_names_another_interpreter(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_PYTHON_THING", sys.executable)
    assert world.environments.state("thing") is EnvironmentState.READY
    assert world.environments.python("thing") == Path(sys.executable)
    monkeypatch.setenv("WEFT_PYTHON_THING", "/nowhere/python")
    with pytest.raises(WeftError, match="WEFT_PYTHON_THING"):
        world.environments.python("thing")


def test_the_command_line_shows_progress_and_waits(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.environments.install_for_command_line("thing")
    assert world.state is EnvironmentState.READY
    shown = capsys.readouterr()
    assert "Installing the base" in shown.err
    assert shown.out == ""


# Compiling --------------------------------------------------------------------------------------


def _native_call(world: World) -> dict:
    return next(call for call in world.calls if "native==3" in call["arguments"])


def test_without_a_compiler_only_a_ready_made_build_is_tried_and_the_command_named(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "has_compiler", lambda: False)
    monkeypatch.setattr(compiler.shutil, "which", lambda name: "/usr/bin/apt-get" if name == "apt-get" else None)
    monkeypatch.setattr(compiler.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(compiler.sys, "platform", "linux")
    world.plan(native={"fail": "error: native has no wheels with a matching platform tag"})
    with pytest.raises(WeftError) as refused:
        world.install()
    assert "--no-build-package" in _native_call(world)["arguments"]
    assert "sudo apt-get install -y build-essential cmake" in refused.value.hint
    assert "Transformers" in refused.value.hint


def test_a_wheel_that_pip_built_before_is_used(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "pip" / "wheels" / "a7" / "aa" / "8f" / "76"
    folder.mkdir(parents=True)
    (folder / "native-3-py3-none-linux_x86_64.whl").touch()
    monkeypatch.setattr("app.engine.environment_install.package_sources", lambda: _sources(pip_cache=tmp_path / "pip"))
    monkeypatch.setattr(compiler, "has_compiler", lambda: False)
    world.install()
    arguments = _native_call(world)["arguments"]
    assert arguments[arguments.index("--find-links") + 1] == str(folder)
    assert "--no-build-package" not in arguments


def test_cmake_arguments_of_the_user_decide_the_build(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_CUDA=on -DX='a b'")
    world.install()
    call = _native_call(world)
    assert "native:cmake.args=-DGGML_CUDA=on;-DX=a b" in call["arguments"]
    assert call["environment"]["CMAKE_ARGS"] == "-DGGML_CUDA=on -DX='a b'"
    assert int(call["environment"]["CMAKE_BUILD_PARALLEL_LEVEL"]) >= 1


# Graphics cards ---------------------------------------------------------------------------------

ABLE = "import sys; print('gpu True', file=sys.stderr)"
UNABLE = "import sys; print('gpu False', file=sys.stderr)"


@pytest.fixture
def nvidia(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a card and its compiler."""
    for module in ("environments", "environment_install"):
        monkeypatch.setattr(f"app.engine.{module}.has_nvidia", lambda: True)
    monkeypatch.setattr(compiler, "nvcc", lambda: "/cuda/bin/nvcc")


@pytest.mark.usefixtures("nvidia")
def test_with_a_card_and_its_compiler_the_native_part_is_built_for_it(world: World) -> None:
    world.define(gpu=ABLE)
    assert world.environments.gpu("thing") is True  # as it will be
    world.install()
    call = _native_call(world)
    assert "native:cmake.args=-DGGML_CUDA=on" in call["arguments"] and "--no-binary" in call["arguments"]
    assert call["environment"]["CUDACXX"] == "/cuda/bin/nvcc" and call["environment"]["CMAKE_ARGS"] == "-DGGML_CUDA=on"
    assert world.environments.gpu("thing") is True
    assert world.environments.failed_layers("thing") == {}


@pytest.mark.fault
@pytest.mark.usefixtures("nvidia")
def test_a_build_that_cannot_use_the_card_is_replaced_and_told(world: World) -> None:
    world.define(gpu=UNABLE)
    world.install()
    first, second = [call for call in world.calls if "native==3" in call["arguments"]]
    assert "CMAKE_ARGS" in first["environment"] and "CMAKE_ARGS" not in second["environment"]
    assert second["arguments"][second["arguments"].index("--reinstall-package") + 1] == "native"
    assert world.state is EnvironmentState.READY and world.environments.gpu("thing") is False
    assert "on the processor" in world.environments.failed_layers("thing")["GPU support"]


def test_a_card_without_its_compiler_is_told(world: World, nvidia: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "nvcc", lambda: "")
    world.define(gpu=UNABLE)
    assert world.environments.gpu("thing") is False
    world.install()
    assert len([call for call in world.calls if "native==3" in call["arguments"]]) == 1
    assert "CUDA toolkit" in world.environments.failed_layers("thing")["GPU support"]
    # The toolkit came later: Repair would use it.
    monkeypatch.setattr(compiler, "nvcc", lambda: "/cuda/bin/nvcc")
    assert "Repair it" in world.environments.failed_layers("thing")["GPU support"]


def test_without_a_card_nothing_is_said_of_one(world: World) -> None:
    world.define(gpu=UNABLE)
    world.install()
    assert world.environments.gpu("thing") is False and world.environments.failed_layers("thing") == {}


def test_the_machine_says_what_llama_cpp_was_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from app.core.memory import Gpu
    from app.engine import machine

    monkeypatch.delenv("WEFT_PYTHON_LLAMACPP", raising=False)
    monkeypatch.setattr(machine, "_gpus", lambda: (Gpu(name="x", total=2**34, free=2**33),))
    monkeypatch.setattr("app.engine.environments.has_nvidia", lambda: True)
    monkeypatch.setattr(compiler, "nvcc", lambda: "")
    assert machine._probe().gpus and not machine._probe().llama_gpu
    monkeypatch.setattr(compiler, "nvcc", lambda: "/cuda/bin/nvcc")
    assert machine._probe().llama_gpu


def test_an_interpreter_of_ones_own_is_asked_for_its_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environments = Environments(tmp_path / "none")
    python = tmp_path / "venv" / "bin" / "python"
    monkeypatch.setenv("WEFT_PYTHON_LLAMACPP", str(python))
    libraries = tmp_path / "venv" / "lib" / "python3.11" / "site-packages" / "llama_cpp" / "lib"
    libraries.mkdir(parents=True)
    assert environments.gpu("llamacpp") is False
    (libraries / "libggml-cuda.so").touch()
    assert environments.gpu("llamacpp") is True


# The lists --------------------------------------------------------------------------------------


def test_the_lists_and_the_extras_are_equal() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    specs = Environments(Path("nowhere")).specs()
    assert set(specs) == {"core", "llamacpp", "export"}
    for name in ("core", "llamacpp"):
        assert [r for layer in specs[name].layers for r in layer.requirements] == extras[name]
    # What is made of both needs no extra of its own, and its source is of the very version that runs.
    own = [layer for layer in specs["export"].layers if layer.name == "converter"]
    assert [layer.source for layer in own] == [r for r in extras["llamacpp"] if r.startswith("llama-cpp-python")]
    assert specs["export"].on_demand and not specs["core"].on_demand


def test_every_pin_agrees_with_the_constraints() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (resources() / "environments" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    constraints = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    extras = project["optional-dependencies"]
    pins = {*project["dependencies"], *extras["core"], *extras["llamacpp"], *extras["dev"]}
    for pin in pins:
        name, _, version = pin.partition("==")
        key = name.split("[")[0].lower().replace("_", "-")
        assert version, f"{pin} is not pinned"
        if key in constraints:
            assert constraints[key] == version


def test_the_tests_own_environment_extends_both() -> None:
    specs = Environments(Path("nowhere"), (resources() / "environments", ROOT / "tests" / "environments")).specs()
    requirements = [r for layer in specs["tests"].layers for r in layer.requirements]
    assert {"torch==2.13.0", "llama-cpp-python==0.3.36", "pytest==9.2.0"} <= set(requirements)


def test_an_unknown_environment_is_named_with_those_there_are() -> None:
    with pytest.raises(WeftError, match="nonsense") as unknown:
        Environments(Path("nowhere")).state("nonsense")
    assert "core" in unknown.value.hint


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _wait(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


# Parts of a source package ----------------------------------------------------------------------


def _archive(path: Path, members: dict[str, bytes], links: dict[str, str] | None = None) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            tar.addfile(info)
    return path


def test_only_the_wanted_parts_of_a_source_are_unpacked(tmp_path: Path) -> None:
    members = {"p-1/a/convert.py": b"1", "p-1/a/conversion/llama.py": b"2", "p-1/a/conversionist.py": b"3", "p-1/b.py": b"4"}
    archive = _archive(tmp_path / "p.tar.gz", members, {"p-1/a/conversion/link.py": "/etc/passwd"})
    unpack(archive, ["a/convert.py", "a/conversion"], tmp_path / "out")
    files = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if not p.is_dir())
    assert files == ["conversion/llama.py", "convert.py"]
    with pytest.raises(WeftError, match="lacks a/missing"):
        unpack(archive, ["a/missing"], tmp_path / "other")


@pytest.mark.attack
def test_a_source_that_leads_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    archive = _archive(tmp_path / "p.tar.gz", {"p-1/a/../../../../evil.py": b"1"})
    with pytest.raises(WeftError) as refused:
        unpack(archive, ["a"], tmp_path / "deep" / "er" / "out")
    assert refused.value.kind is ErrorKind.HOSTILE
    assert not list(tmp_path.rglob("evil.py"))
    (tmp_path / "cut.tar.gz").write_bytes(archive.read_bytes()[:60])
    with pytest.raises(WeftError, match="cannot be unpacked"):
        unpack(tmp_path / "cut.tar.gz", ["a"], tmp_path / "cut")
