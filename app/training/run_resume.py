"""Whether a run may begin or go on where it is told to. No ML."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import msgspec

from app.core.errors import ErrorKind, WeftError
from app.training.run_config import TrainParameters

SUFFIX = ".training"
# What may change between the parts of a run without changing what is learnt.
_FREE = {
    "train": {"samples", "sample_tokens", "keep_checkpoints", "checkpoint_every"},
    "output": {"dir", "overwrite"},
    "model": {"path"},
}


def folder_of(target: Path) -> Path:
    """The folder of the unfinished run, beside where its adapter will appear."""
    return target.parent / (target.name + SUFFIX)


def check_place(target: Path, parameters: TrainParameters) -> None:
    """Refuse a place where something lies that this run must not touch.

    Raises:
        WeftError: BAD_INPUT for an adapter or unfinished run that is there; NOT_FOUND when there is nothing to resume.
    """
    unfinished = folder_of(target)
    begun = (unfinished / "run.json").exists()
    if target.exists() and not parameters.config.output.overwrite:
        raise WeftError(
            ErrorKind.BAD_INPUT,
            f"{target} is there already.",
            "Choose another folder, or set overwrite = true under [output].",
        )
    if target.exists() and not (
        target.is_dir() and ((target / "adapter_config.json").exists() or not any(target.iterdir()))
    ):
        raise WeftError(
            ErrorKind.BAD_INPUT, f"{target} is no adapter, so it is not replaced.", "Choose another folder."
        )
    if parameters.resume == "yes" and not begun:
        raise WeftError(
            ErrorKind.NOT_FOUND, f"There is no unfinished run at {unfinished}.", "Start it without --resume."
        )
    if parameters.resume == "no" and begun and any((unfinished / "checkpoints").glob("step-*")):
        raise WeftError(
            ErrorKind.BAD_INPUT,
            f"An unfinished run lies at {unfinished}.",
            "Go on with --resume, choose another folder, or delete that one.",
        )


def claim(target: Path, parameters: TrainParameters) -> None:
    """Take a place for a run, once nothing lies there that it must not touch. Raises WeftError, see `check_place`."""
    check_place(target, parameters)
    unfinished = folder_of(target)
    if parameters.resume == "no" and (unfinished / "run.json").exists():
        shutil.rmtree(unfinished, ignore_errors=True)  # it died before its first checkpoint: nothing to go on from


def fingerprint(parameters: TrainParameters, base: list[Path], data: list[Path]) -> dict[str, Any]:
    """What has to be the same for a run to go on: config, base and data."""
    config = msgspec.to_builtins(parameters.config)
    for section, names in _FREE.items():
        for name in names:
            config[section].pop(name, None)
    config["data"].pop("files", None)
    config["data"].pop("held_out_files", None)
    return {
        "config": json.loads(json.dumps(config)),
        "base": [_quick(path) for path in base],
        "data": [_whole(path) for path in data],
    }


def check_same(asked: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises WeftError BAD_INPUT, naming what differs from the run that was begun."""
    different: list[str] = []
    for section, values in now["config"].items():
        old = asked.get("config", {}).get(section, {})
        different += [f"[{section}] {key}" for key in values if old.get(key) != values[key]]
    if asked.get("base") != now["base"]:
        different.append("the base model")
    if asked.get("data") != now["data"]:
        different.append("the data")
    if different:
        raise WeftError(
            ErrorKind.BAD_INPUT,
            f"The unfinished run was begun otherwise: {', '.join(different[:8])} changed since.",
            "Put it back as it was to resume, or start anew in another folder.",
        )


def _quick(path: Path) -> list[Any]:
    """Size and a hash of both ends: enough to tell one model file from another."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(1024 * 1024))
        file.seek(max(0, size - 1024 * 1024))
        digest.update(file.read())
    return [size, digest.hexdigest()]


def _whole(path: Path) -> list[Any]:
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]
