"""Writing an adapter as PEFT reads it: staged beside its place, synced, renamed, so that it is complete when it appears."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.core.disk import sync_file, sync_folder
from app.core.errors import ErrorKind, WeftError

SPARE = 16 * 1024 * 1024  # bytes that a drive keeps free beside what is written


def refuse_existing(target: Path) -> None:
    """Raises WeftError BAD_INPUT when something lies there already."""
    if target.exists() or target.is_symlink():
        raise WeftError(ErrorKind.BAD_INPUT, f"{target} exists already.", "Choose another name, or move it away first.")


def write_peft(target: Path, config: Mapping[str, Any], tensors: Mapping[str, Any], card: str) -> None:
    """Write adapter_config.json, adapter_model.safetensors and README.md.

    Args:
        tensors: full names (`base_model.model.….lora_A.weight`) to CPU tensors.
        card: the README, in Markdown.

    Raises:
        WeftError: BAD_INPUT (it exists), DISK_FULL; nothing is left behind then.
        OSError: what the operating system says; the engine's host puts it into words.
    """
    from safetensors.torch import save_file

    refuse_existing(target)
    stage = target.with_name(f".{target.name[:100]}.{os.getpid()}.incomplete")
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < size + SPARE:
            raise WeftError(
                ErrorKind.DISK_FULL,
                f"{target.parent} has {free / 1e6:.0f} MB free, and the adapter takes {size / 1e6:.0f} MB.",
                "Make room, or choose another place.",
            )
        stage.mkdir()
        save_file(
            {k: v.contiguous() for k, v in tensors.items()}, stage / "adapter_model.safetensors", {"format": "pt"}
        )
        (stage / "adapter_config.json").write_text(json.dumps(dict(config), indent=2, sort_keys=True) + "\n", "utf-8")
        (stage / "README.md").write_text(card, "utf-8")
        for file in stage.iterdir():
            sync_file(file)
        sync_folder(stage)
        stage.rename(target)
        sync_folder(target.parent)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
