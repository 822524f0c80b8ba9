"""From a loader's id to an engine that can be started."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path

from app.core.errors import ErrorKind, WeftError
from app.core.paths import Paths
from app.engine.client import EngineClient
from app.engine.environments import Environments


def engine_for(loader_id: str, paths: Paths, environment: Mapping[str, str] | None = None) -> EngineClient:
    """An engine for a loader, not started.

    Args:
        environment: variables for the child, such as the calibrated OMP_NUM_THREADS and OMP_WAIT_POLICY.

    Raises:
        WeftError: NOT_FOUND when there is no such loader; ENVIRONMENT when its environment is not installed.
    """
    # Backends lie above this room: they are found by name, never imported.
    specs = importlib.import_module("app.backends").specs()
    if loader_id not in specs:
        raise WeftError(ErrorKind.NOT_FOUND, f"There is no loader {loader_id!r}.", f"Loaders are: {', '.join(specs)}.")
    python = Environments(paths.environments).python(specs[loader_id].environment)
    # Backends keep there what they converted, and do not know our folders otherwise.
    variables = {
        "WEFT_CACHE": str(paths.cache),
        "TORCHINDUCTOR_CACHE_DIR": str(
            paths.cache / "torchinductor"
        ),  # else compiled anew with each engine's scratch folder
        **(environment or {}),
    }
    return EngineClient(
        python=python, backend=loader_id, log_path=paths.logs / f"engine-{loader_id}.log", environment=variables
    )


def task_engine(
    environment_name: str, paths: Paths, log_name: str, environment: Mapping[str, str] | None = None
) -> EngineClient:
    """An engine that runs tasks in the environment of this name, not started. Its log is `<logs>/<log_name>.log`.

    Raises:
        WeftError: ENVIRONMENT when the environment is not installed.
    """
    python = Environments(paths.environments).python(environment_name)
    return EngineClient(python=python, backend="", log_path=paths.logs / f"{log_name}.log", environment=environment)


def own_engine(paths: Paths, log_name: str, environment: Mapping[str, str] | None = None) -> EngineClient:
    """An engine that runs tasks with what the window itself has installed, not started: downloads, questions to the hub."""
    return EngineClient(
        python=Path(sys.executable), backend="", log_path=paths.logs / f"{log_name}.log", environment=environment
    )
