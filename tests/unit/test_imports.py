"""The window's process never holds a machine-learning library, and starts without waiting for one."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {
    "accelerate", "bitsandbytes", "datasets", "gguf", "llama_cpp", "matplotlib", "numpy", "peft", "pyqtgraph", "safetensors",
    "scipy", "sentencepiece", "tokenizers", "torch", "transformers",
}  # fmt: skip
# Rooms whose every module the window's process may import. `app.generation` and the engine's host run in children.
ROOMS = (
    "app.core", "app.store", "app.engine", "app.hub", "app.tasks", "app.workers", "app.viewmodels", "app.views", "app.backends",
    "app.house", "app.bootstrap", "app.cli",
)  # fmt: skip

IMPORT_ALL = """
import importlib, json, pkgutil, sys
wanted = sys.argv[1:]
names = []
for name in wanted:
    module = importlib.import_module(name)
    names.append(name)
    if hasattr(module, "__path__"):
        names += [m.name for m in pkgutil.walk_packages(module.__path__, name + ".") if not m.name.endswith("__main__")]
for name in names:
    importlib.import_module(name)
print(json.dumps([names, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


def _modules_after(*names: str) -> tuple[list[str], set[str]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "QT_QPA_PLATFORM": "offscreen"}
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", IMPORT_ALL, *names], env=environment, capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert ran.returncode == 0, ran.stderr
    imported, modules = json.loads(ran.stdout)
    return imported, set(modules)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_of_the_window_imports_nothing_heavy(room: str) -> None:
    imported, modules = _modules_after(room)
    assert imported
    assert not modules & HEAVY


def test_the_window_as_it_starts_imports_nothing_heavy() -> None:
    if not (ROOT / "app" / "bootstrap.py").exists():
        pytest.skip("there is no window yet")
    _, modules = _modules_after("app.bootstrap", "app.__main__")
    assert "PySide6" in modules
    assert not modules & HEAVY


def test_the_command_line_needs_no_window() -> None:
    _, modules = _modules_after("app.cli")
    assert not modules & (HEAVY | {"PySide6", "shiboken6", "qasync"})


@pytest.mark.parametrize("room", ["app.core", "app.store", "app.engine", "app.backends"])
def test_rooms_below_the_workers_know_no_qt(room: str) -> None:
    assert not _modules_after(room)[1] & {"PySide6", "shiboken6", "qasync"}


def test_workers_and_viewmodels_know_no_widgets() -> None:
    program = IMPORT_ALL.replace('{name.partition(".")[0] for name in sys.modules}', "sys.modules")
    ran = subprocess.run(
        [sys.executable, "-c", program, "app.workers", "app.viewmodels"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120, cwd=ROOT,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "PySide6.QtWidgets" not in json.loads(ran.stdout)[1]


def test_every_room_has_its_place_in_the_layers() -> None:
    """Commands (`cli_*`) and what ties the window together (`house_*`) come and go; nobody below may know them."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    layers = " ".join(next(c for c in contracts if c["type"] == "layers")["layers"])
    placed = set(re.findall(r"app\.\w+", layers))
    rooms = {f"app.{path.stem}" for path in (ROOT / "app").iterdir() if path.stem != "__init__" and path.name != "__pycache__"}
    free = {room for room in rooms - placed if not room.startswith(("app.cli_", "app.house_"))}
    assert not free, f"{free} stand in no layer of pyproject.toml"
    above = {"cli_": ("__main__.py", "cli"), "house": ("bootstrap.py", "house")}
    for path in (ROOT / "app").rglob("*.py"):
        place = path.relative_to(ROOT / "app").as_posix()
        for name in _full_names(path):
            for mark, allowed in above.items():
                if name.startswith(f"app.{mark}"):
                    assert place.startswith(allowed), f"app/{place} imports {name}"


def _full_names(path: Path) -> set[str]:
    """Modules that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


DISTRIBUTIONS = {
    "PySide6": "pyside6-essentials", "markdown_it": "markdown-it-py", "pynvml": "nvidia-ml-py", "huggingface_hub": "huggingface-hub",
}  # fmt: skip


def _imported(*folders: str) -> dict[str, str]:
    """Top-level names that are imported anywhere below, each with a file that does."""
    found: dict[str, str] = {}
    for folder in folders:
        for path in (ROOT / folder).rglob("*.py") if (ROOT / folder).is_dir() else [ROOT / folder]:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            optional = {id(inner) for node in ast.walk(tree) if _may_be_missing(node) for inner in ast.walk(node)}
            for node in ast.walk(tree):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if id(node) in optional:
                    continue
                if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    names = [node.module]
                found |= {name.partition(".")[0]: str(path.relative_to(ROOT)) for name in names}
    return {name: path for name, path in found.items() if name not in sys.stdlib_module_names and name not in ("app", "__future__")}


def _may_be_missing(node: ast.AST) -> bool:
    """Whether this is a `try`, or a `with suppress(…)`, that does without what it imports."""
    caught: list[ast.AST] = []
    if isinstance(node, ast.Try):
        caught = [handler.type for handler in node.handlers if handler.type is not None]
    elif isinstance(node, ast.With):
        caught = [item.context_expr for item in node.items]
    names = {name.id for found in caught for name in ast.walk(found) if isinstance(name, ast.Name)}
    return bool(names & {"ImportError", "ModuleNotFoundError"})


def _names(requirements: list[str]) -> set[str]:
    return {r.split("==")[0].split("[")[0].lower().replace("_", "-") for r in requirements}


def test_what_the_window_imports_is_declared() -> None:
    children = {"app/adapters", "app/generation", "app/backends", "app/tasks", "app/training"}
    rooms = [f"app/{path.name}" for path in (ROOT / "app").iterdir() if path.name != "__pycache__"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = _names(project["dependencies"])
    for name, path in _imported(*(room for room in rooms if room not in children)).items():
        assert DISTRIBUTIONS.get(name, name).lower().replace("_", "-") in declared, f"{path} imports {name}"


def test_what_engines_import_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = _names([*project["optional-dependencies"]["core"], *project["optional-dependencies"]["llamacpp"]])
    # What those bring along in a version of our choice will do too.
    pins = (ROOT / "resources" / "environments" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    declared |= _names([line for line in pins if "==" in line])
    for name, path in _imported("app/adapters", "app/generation", "app/backends", "app/training").items():
        known = {"llama_cpp": "llama-cpp-python"}.get(name, name).lower().replace("_", "-")
        assert known in declared, f"{path} imports {name}"


def test_the_first_page_is_painted_without_what_only_later_steps_need() -> None:
    """Each of these takes 5 to 50 ms; a start waits for none of them."""
    later = (
        "markdown_it",
        "pygments",
        "psutil",
        "app.core.adapter_import",
        "app.core.scan",
        "app.core.recognise",
        "app.engine.client",
        "app.views.chat.message_view",
        "app.views.chat.side_panel",
        "app.views.chat.find",
        "app.views.dialogs",
    )
    code = (
        "import sys, app.bootstrap, app.house, app.views.chat.page, app.views.loadout_bar\n"
        f"print(*[name for name in {later!r} if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert found.stdout.split() == []
