"""The adapter's card: weft_run.json for programs, README.md for people. No ML."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from app.core.library import ModelEntry
from app.training.run_config import RunConfig

RECORD = "weft_run.json"


class FileHash(msgspec.Struct, frozen=True, kw_only=True):
    """One file as it was when the run read it."""

    path: str
    bytes: int
    sha256: str


class RunRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a run was and came to: `weft_run.json`, in the adapter's folder.

    Attributes:
        base, base_files: the model and the hashes of its weight files. data_files: of the data.
        losses: training loss, one per step. held_out_losses: (step, loss); step 0 is the base.
        result: how it ended. data: what became of the rows (DataReport's numbers). versions: of the libraries.
    """

    format: int = 1
    name: str
    config: RunConfig
    base: str
    base_architecture: str = ""
    base_files: tuple[FileHash, ...] = ()
    data_files: tuple[FileHash, ...] = ()
    data: dict[str, Any] = {}
    ended: str = "complete"
    steps: int = 0
    total_steps: int = 0
    losses: tuple[float, ...] = ()
    held_out_loss: float | None = None
    held_out_losses: tuple[tuple[int, float], ...] = ()
    trained_parameters: int = 0
    tokens: int = 0
    seconds: float = 0.0
    device: str = ""
    threads: int = 0
    finished: str = ""
    versions: dict[str, str] = {}
    notes: tuple[str, ...] = ()


def read_record(folder: Path) -> RunRecord | None:
    """The record of an adapter's folder; None where there is none, or one of another format."""
    try:
        return msgspec.json.decode((folder / RECORD).read_bytes(), type=RunRecord)
    except (OSError, msgspec.MsgspecError, ValueError):
        return None


def hash_files(
    paths: list[Path], say: Callable[[int, int], None], cancelled: Callable[[], bool]
) -> tuple[FileHash, ...]:
    """Hashes of files; `say` hears bytes done of all. Ends early, with what it has, when cancelled."""
    total = sum(path.stat().st_size for path in paths)
    done = 0
    found: list[FileHash] = []
    for path in paths:
        digest = hashlib.sha256()
        size = 0
        with path.open("rb") as file:
            while block := file.read(4 * 1024 * 1024):
                digest.update(block)
                size += len(block)
                done += len(block)
                say(done, total)
                if cancelled():
                    return tuple(found)
        found.append(FileHash(path=str(path), bytes=size, sha256=digest.hexdigest()))
    return tuple(found)


def card(record: RunRecord, model: ModelEntry) -> str:
    """README.md: front matter as the hub reads it, then what a person wants to know."""
    config = record.config
    method, train = config.method, config.train
    head = {
        "base_model": model.name,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", *(["dora"] if method.dora else []), "weft"],
    }
    out = ["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items()), "---", "", f"# {record.name}", ""]
    out.append(f"A LoRA adapter for **{model.name}**, trained with Weft on {data_words(record)}.")
    out += [
        "",
        "## How it went",
        "",
        f"- Ended: {_ENDED.get(record.ended, record.ended)} after {record.steps} of {record.total_steps} steps",
    ]
    if record.losses:
        out.append(f"- Training loss: {record.losses[0]:.4f} at the first step, {_last(record.losses):.4f} at the end")
    if record.held_out_losses and record.held_out_loss is not None:
        step, first = record.held_out_losses[0]
        before = (
            f"{first:.4f} {'for the base alone' if step == 0 else f'at step {step}'}, "
            if first != record.held_out_loss
            else ""
        )
        out.append(f"- Held-out loss: {before}{record.held_out_loss:.4f} with the adapter")
    out.append(f"- {record.tokens:,} trained tokens in {record.seconds / 60:.1f} minutes on {record.device}")
    out += ["", "## Settings", "", "| setting | value |", "| --- | --- |"]
    rows = {
        "rank, alpha": f"{method.r}, {method.alpha:g}",
        "modules": method.target_regex or method.targets,
        "start": method.init,
        "variant": ", ".join([n for n, on in (("rsLoRA", method.rslora), ("DoRA", method.dora)) if on]) or "LoRA",
        "base held in": _held_in(config, record.device),
        "objective": train.objective,
        "optimizer, schedule": f"{train.optimizer}, {train.scheduler}",
        "learning rate": f"{train.learning_rate:g}",
        "batch × accumulation": f"{train.batch_size} × {train.gradient_accumulation}",
        "maximal length, packing": f"{train.max_length}, {train.packing}",
        "epochs, seed": f"{train.epochs:g}, {train.seed}",
        "trained parameters": f"{record.trained_parameters:,}",
    }
    out += [f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in rows.items()]
    out += ["", "## Made of", ""]
    out += [f"- base `{Path(f.path).name}`, {f.bytes:,} bytes, sha256 `{f.sha256}`" for f in record.base_files]
    out += [f"- data `{Path(f.path).name}`, {f.bytes:,} bytes, sha256 `{f.sha256}`" for f in record.data_files]
    out.append("- " + ", ".join(f"{name} {version}" for name, version in record.versions.items()))
    if record.notes:
        out += ["", "## Notes", "", *(f"- {note}" for note in record.notes)]
    return "\n".join(out) + "\n"


def _held_in(config: RunConfig, device: str) -> str:
    """The precision of the base; `auto` in words."""
    if config.model.quantization != "none":
        return config.model.quantization
    on_card = not device.startswith("the processor")
    return {"auto": "16 bits, as the graphics card has it" if on_card else "fp32"}.get(
        config.train.precision, config.train.precision
    )


_ENDED = {
    "complete": "complete",
    "stopped": "stopped by hand",
    "early": "early, as the held-out loss no longer fell",
    "nan": "the loss was no longer a number; the last good checkpoint is kept",
}


def data_words(record: RunRecord) -> str:
    """The names of the data's files, the first few."""
    files = record.data_files
    names = [f"`{Path(f.path).name}`" for f in files[:5]]
    return ", ".join(names) + (f" and {len(files) - 5} more files" if len(files) > 5 else "") if names else "its data"


def _last(losses: tuple[float, ...]) -> float:
    """The mean of the last tenth, at least of one."""
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)
