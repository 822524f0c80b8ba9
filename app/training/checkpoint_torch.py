"""The folder of an unfinished run: `<adapter>.training`. What a run needs to go on, bit for bit.

    run.json              what was asked, on what, with which versions: a resume that differs is refused
    init/                 the adapter's resolved config, its first A and B, before the first step
    checkpoints/step-N/   trained tensors, optimizer, random states, counters; each complete when it bears its name
    best/                 trained tensors of the lowest held-out loss

Every folder is written under a temporary name, fsynced file by file, and renamed; older ones go after that.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import load_file, save_file

from app.core.disk import sync_folder, sync_tree
from app.core.errors import ErrorKind, WeftError
from app.training.run_resume import SUFFIX

_PARTIAL = ".partial-"


class Counters(msgspec.Struct, kw_only=True):
    """Where a run stands after a step. losses: one per step. held_out: (step, loss)."""

    step: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    losses: list[float] = []
    held_out: list[tuple[int, float]] = []
    best: float | None = None
    best_step: int = 0
    without_progress: int = 0
    split: int = 1
    scaler: dict[str, Any] = {}


class RunFolder:
    """Locks and fills the folder of an unfinished run.

    Raises:
        WeftError: BUSY when another process holds it; PERMISSION when it cannot be made.
    """

    def __init__(self, adapter: Path, say: Callable[[str], None]) -> None:
        self.path = adapter.parent / (adapter.name + SUFFIX)
        self._say = say
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WeftError(
                ErrorKind.PERMISSION,
                f"The folder {self.path} cannot be made: {error.strerror}.",
                "Choose another output folder.",
            ) from error
        self._lock = _lock(self.path / "lock")
        for rest in [*self.path.glob(f"{_PARTIAL}*"), *(self.path / "checkpoints").glob(f"{_PARTIAL}*")]:
            _clear(rest)

    def close(self) -> None:
        """Let go of the lock. Where there is no checkpoint to go on from, the folder goes: it would only hold the name."""
        idle = not self._lock.closed and not self.checkpoints()
        self._lock.close()
        if idle:
            shutil.rmtree(self.path, ignore_errors=True)

    def remove(self) -> None:
        """The run is complete: its folder goes."""
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)

    # What was asked

    def asked(self) -> dict[str, Any] | None:
        """run.json; None when nothing was begun here."""
        path = self.path / "run.json"
        try:
            return json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            return None  # written before the first checkpoint: nothing is lost by beginning anew

    def ask(self, value: dict[str, Any]) -> None:
        """Write run.json."""
        write_text(self.path / "run.json", json.dumps(value, indent=1))

    # The first values

    def save_init(self, settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Keep the adapter's resolved config and first values."""

        def fill(folder: Path) -> None:
            (folder / "adapter_config.json").write_text(json.dumps(settings, indent=1), "utf-8")
            save_file(tensors, folder / "first.safetensors")

        self._put(self.path / "init", fill)

    def load_init(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
        """What `save_init` kept; None when a run died before that."""
        folder = self.path / "init"
        if not folder.is_dir():
            return None
        return json.loads((folder / "adapter_config.json").read_text("utf-8")), load_file(folder / "first.safetensors")

    # Checkpoints

    def save(
        self, counters: Counters, trained: dict[str, torch.Tensor], optimizer: Any, random: Any, keep: int
    ) -> Path | None:
        """Write a checkpoint, then remove older ones. None when the disk has no room for it, which is said.

        Raises:
            OSError: what is not a full disk.
        """
        root = self.path / "checkpoints"
        root.mkdir(exist_ok=True)
        target = root / f"step-{counters.step:08d}"
        need = sum(t.numel() * t.element_size() for t in trained.values()) * 4
        free = shutil.disk_usage(root).free
        if free < need + 64 * 1024 * 1024:
            self._say(
                f"No checkpoint at step {counters.step}: the disk has {free // 2**20} MiB left. The run goes on; free some space."
            )
            return None

        def fill(folder: Path) -> None:
            save_file(trained, folder / "trained.safetensors")
            torch.save(optimizer, folder / "optimizer.pt")
            torch.save(random, folder / "random.pt")
            sums = {path.name: _digest(path) for path in sorted(folder.iterdir())}
            state = {"counters": msgspec.to_builtins(counters), "sha256": sums}
            (folder / "state.json").write_text(json.dumps(state), "utf-8")

        try:
            self._put(target, fill)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._say(f"No checkpoint at step {counters.step}: the disk is full. The run goes on; free some space.")
            return None
        for old in self.checkpoints()[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
        return target

    def checkpoints(self) -> list[Path]:
        """Complete ones, oldest first."""
        return sorted((self.path / "checkpoints").glob("step-*"))

    def load(self, *, mapped: bool = False) -> tuple[Counters, dict[str, torch.Tensor], Any, Any] | None:
        """The newest checkpoint that is whole: counters, trained tensors, optimizer, random states.

        Args:
            mapped: the optimizer's tensors lie in the file, to be copied out and dropped soon.
        """
        return newest(self.path, self._say, mapped=mapped)

    def save_best(self, trained: dict[str, torch.Tensor]) -> None:
        """Keep these tensors as the best so far."""
        self._put(self.path / "best", lambda folder: save_file(trained, folder / "trained.safetensors"))

    def load_best(self) -> dict[str, torch.Tensor] | None:
        """The best so far."""
        path = self.path / "best" / "trained.safetensors"
        return load_file(path) if path.is_file() else None

    def _put(self, target: Path, fill: Callable[[Path], None]) -> None:
        """Fill a folder under another name, make it last, and give it its name, in place of an older one."""
        staged = target.parent / f"{_PARTIAL}{target.name}"
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        try:
            fill(staged)
            sync_tree(staged)
            replace_folder(staged, target)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise


def newest(
    run: Path, say: Callable[[str], None] = lambda text: None, *, mapped: bool = False
) -> tuple[Counters, dict[str, torch.Tensor], Any, Any] | None:
    """The newest checkpoint of a run's folder that is whole; damaged ones are told and passed over."""
    for folder in sorted((run / "checkpoints").glob("step-*"), reverse=True):
        try:
            state = json.loads((folder / "state.json").read_text("utf-8"))
            for name, digest in state["sha256"].items():
                if _digest(folder / name) != digest:
                    raise ValueError(f"{name} is damaged")
            return (
                msgspec.convert(state["counters"], Counters),
                load_file(folder / "trained.safetensors"),
                torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu", mmap=mapped),
                torch.load(folder / "random.pt", weights_only=True, map_location="cpu"),
            )
        except (OSError, ValueError, KeyError) as error:
            say(f"The checkpoint {folder.name} cannot be used ({error}); the one before it is taken.")
    return None


def replace_folder(staged: Path, target: Path) -> None:
    """Rename `staged` to `target`; one that is there steps aside first and goes last."""
    aside = target.parent / f"{_PARTIAL}old-{target.name}"
    shutil.rmtree(aside, ignore_errors=True)
    if target.exists():
        target.rename(aside)
    staged.rename(target)
    sync_folder(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _clear(rest: Path) -> None:
    """Remove what a killed run left half written; put back what it had moved aside to replace it."""
    name = rest.name.removeprefix(_PARTIAL)
    target = rest.parent / name.removeprefix("old-")
    if name.startswith("old-") and not target.exists():
        rest.rename(target)
    elif rest.is_dir():
        shutil.rmtree(rest, ignore_errors=True)
    else:
        rest.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    staged = path.with_name(f"{_PARTIAL}{path.name}")
    with staged.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    staged.replace(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _lock(path: Path) -> Any:
    file = path.open("a+")
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise WeftError(
            ErrorKind.BUSY,
            f"Another run is at work in {path.parent}.",
            "Wait for it, stop it, or choose another output folder.",
        ) from error
    return file


# Random states ---------------------------------------------------------------------------------------


def random_states() -> dict[str, Any]:
    """The states that dropout draws from."""
    found: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state_all()
    return found


def set_random_states(states: dict[str, Any]) -> None:
    """Put `random_states` back."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
