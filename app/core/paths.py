"""Where Weft keeps its things. `WEFT_HOME` moves them all; otherwise platformdirs decides."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import msgspec
import platformdirs


class Paths(msgspec.Struct, frozen=True, kw_only=True):
    """Folders of one installation. Nothing is created until somebody writes."""

    data: Path  # database, models, adapters, environments
    config: Path  # settings.toml
    cache: Path
    logs: Path
    runtime: Path  # the single-instance socket

    @property
    def models(self) -> Path:
        return self.data / "models"

    @property
    def adapters(self) -> Path:
        return self.data / "loras"

    @property
    def environments(self) -> Path:
        """WEFT_ENVIRONMENTS moves these alone, so that several homes can share what is costly to make."""
        override = os.environ.get("WEFT_ENVIRONMENTS")
        return Path(override).expanduser().absolute() if override else self.data / "environments"

    @property
    def unfinished(self) -> Path:
        """Notes of the folders in which command lines are making something."""
        return self.data / "unfinished"

    @property
    def database(self) -> Path:
        return self.data / "weft.sqlite"

    @property
    def settings(self) -> Path:
        return self.config / "settings.toml"


def default_paths() -> Paths:
    """The folders of this user, or those under WEFT_HOME."""
    home = os.environ.get("WEFT_HOME")
    if home:
        base = Path(home).expanduser().absolute()
        return Paths(data=base, config=base, cache=base / "cache", logs=base / "logs", runtime=base / "run")
    dirs = platformdirs.PlatformDirs("weft", appauthor=False)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # platformdirs warns where no session manager made a runtime folder; its choice will do
        runtime = dirs.user_runtime_path
    return Paths(
        data=dirs.user_data_path,
        config=dirs.user_config_path,
        cache=dirs.user_cache_path,
        logs=dirs.user_log_path,
        runtime=runtime,
    )


def resources() -> Path:
    """The folder of icons, the starter model and environment lists that ships beside `app`."""
    return Path(__file__).resolve().parents[2] / "resources"
