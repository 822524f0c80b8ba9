"""What a child is started into: a clean environment and an empty working folder.

Children import nothing but what they are meant to: no file that lies in the working folder, no setting of
the user's own Python. They get no secret: neither in the environment nor as an argument.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

import app

_SECRET = re.compile(
    r"(^|_)(TOKENS?|SECRETS?|PASSWORD|PASSWD|API_?KEYS?|CREDENTIALS?|PRIVATE_KEY|AUTH)(_|$)", re.IGNORECASE
)
_FOREIGN = (
    "PYTHONHOME",
    "PYTHONSTARTUP",
    "PYTHONINSPECT",
    "PYTHONDEVMODE",
    "PYTHONWARNINGS",
    "PYTHONBREAKPOINT",
    "VIRTUAL_ENV",
)
_FEW_CPUS = 4


def child_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment variables of a child; `extra` (calibrated settings such as OMP_NUM_THREADS) goes over all."""
    environment = {
        name: value for name, value in os.environ.items() if not _SECRET.search(name) and name not in _FOREIGN
    }
    if "LD_LIBRARY_PATH_ORIG" in environment:  # a frozen window points this at its own libraries
        environment["LD_LIBRARY_PATH"] = environment.pop("LD_LIBRARY_PATH_ORIG")
    environment.update(
        PYTHONSAFEPATH="1",
        PYTHONPATH=str(Path(app.__file__).resolve().parents[1]),
        PYTHONUNBUFFERED="1",
        PYTHONNOUSERSITE="1",
        PYTHONUTF8="1",
        PYTHONFAULTHANDLER="1",  # a crash in native code leaves its Python stack in the log
        HF_HUB_DISABLE_IMPLICIT_TOKEN="1",
        HF_HUB_DISABLE_TELEMETRY="1",
    )
    if (os.cpu_count() or 1) <= _FEW_CPUS:
        # OpenMP threads that spin while they wait cost a busy small machine up to 12 times; see docs on calibration.
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return environment | dict(extra or {})


def empty_folder(beside: Path) -> Path:
    """An empty folder for a child to stand in, `beside/empty`; a fresh one where something lies in that."""
    folder = beside / "empty"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not any(folder.iterdir()):
            return folder
    except OSError:
        pass  # a read-only place: the system's folder for temporary files serves
    return Path(tempfile.mkdtemp(prefix="weft-empty-"))
