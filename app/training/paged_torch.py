"""An optimizer's state in a file that is mapped into memory: paged optimizers where there is no graphics card. Imports torch.

bitsandbytes' paged optimizers rest on CUDA's managed memory, which leaves a full card. Main memory has the same by other means: pages of a
mapped file are written to the disk and taken back by the system, when it needs the room and without being asked. Nothing is computed
otherwise: the arithmetic is the plain optimizer's, and so are its bits and its checkpoints.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from app.core.amounts import readable_bytes
from app.core.errors import ErrorKind, WeftError

_ALIGNED = 64  # bytes: a tensor begins where vector loads like it
_SPARE = 64 * 1024 * 1024  # bytes of the disk that are left alone
_IN_MEMORY = frozenset({"tmpfs", "ramfs"})
_FULL = frozenset({errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)})


class StateFile:
    """Tensors of zeros in one nameless file, which goes with its last tensor, or with the process, however that ends.

    Args:
        size: bytes that all tensors together take. places: folders to choose from: the first on a disk that takes it, else the first of the others.

    Attributes:
        place: the folder that holds it. in_memory: its file system keeps files in memory, so that pages can only be swapped out.

    Raises:
        WeftError: DISK_FULL when no folder has room for it; PERMISSION when none takes it for another reason, in the system's words.
    """

    def __init__(self, size: int, places: Sequence[Path]) -> None:
        self.size = max(size, mmap.PAGESIZE)
        refused: list[tuple[Path, OSError]] = []
        for place in sorted(dict.fromkeys(places), key=in_memory):
            try:
                self._map = self._made(place)
            except OSError as error:
                refused.append((place, error))
                continue
            self.place, self.in_memory = place, in_memory(place)
            break
        else:
            raise self._nowhere(refused)
        self._end = 0
        self._tensors: dict[tuple[int, str], torch.Tensor] = {}

    def tensor(self, owner: torch.Tensor, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The tensor of that name, shaped as `owner` is; zeros when first asked for. It has a storage of its own, as others do."""
        key = (id(owner), name)
        if key not in self._tensors:
            count, start = owner.numel(), self._end
            self._end = start + aligned(count * dtype.itemsize)
            if self._end > self.size:
                raise ValueError(f"the state needs more than the {self.size} bytes that were reserved for it")
            flat = torch.frombuffer(self._map, dtype=dtype, count=count, offset=start) if count else torch.empty(0)
            self._tensors[key] = flat.view(owner.shape)
        return self._tensors[key]

    def write_out(self) -> None:
        """Ask the system to put all pages on the disk and out of memory, as it does by itself when that is short (Linux).

        Raises:
            OSError: the system cannot be asked.
        """
        self._map.flush()
        self._map.madvise(21)  # MADV_PAGEOUT

    def note(self) -> str:
        """Where it lies, for people."""
        size = readable_bytes(self.size)
        if self.in_memory:
            return (
                f"The optimizer's state ({size}) lies in a file in {self.place}, which is kept in memory itself: it leaves memory for "
                "the swap space only. Set TMPDIR to a folder on a disk, or take an output folder there."
            )
        return f"The optimizer's state ({size}) lies in a file in {self.place}, and leaves memory when that gets short."

    def _made(self, place: Path) -> mmap.mmap:
        """The file in that folder, mapped. Raises OSError."""
        if not place.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        if shutil.disk_usage(place).free < self.size + _SPARE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with tempfile.TemporaryFile(prefix="weft-state-", dir=place) as file:
            _reserve(file, self.size)
            return mmap.mmap(file.fileno(), self.size)

    def _nowhere(self, refused: Sequence[tuple[Path, OSError]]) -> WeftError:
        """What to say where no folder takes it, with each one's own reason."""
        size = readable_bytes(self.size)
        where = "; ".join(f"{place}: {error.strerror or error}" for place, error in refused)
        if any(error.errno in _FULL for _, error in refused):
            return WeftError(
                ErrorKind.DISK_FULL,
                f"The paged optimizer's state takes {size}, for which there is no room ({where}).",
                'Free some space, set TMPDIR to a folder with more, or take optimizer = "adamw_8bit" or a smaller rank.',
            )
        return WeftError(
            ErrorKind.PERMISSION,
            f"The paged optimizer's state ({size}) cannot be kept in a file ({where}).",
            'Set TMPDIR to a folder that can be written to, take an output folder in one, or take optimizer = "adamw_8bit".',
        )


def aligned(size: int) -> int:
    """Bytes that a tensor of `size` bytes takes in the file."""
    return -(-size // _ALIGNED) * _ALIGNED


def _reserve(file: Any, size: int) -> None:
    """Have the disk hold the room now: a page that finds none later ends the process with SIGBUS. Raises OSError."""
    allocate = getattr(os, "posix_fallocate", None)
    if allocate is not None:
        allocate(file.fileno(), 0, size)
        return
    zeros = bytes(min(size, 8 * 2**20))  # macOS and Windows
    for start in range(0, size, len(zeros)):
        file.write(zeros[: size - start])
    file.flush()


def in_memory(place: Path) -> bool:
    """Whether a folder's file system keeps its files in memory (Linux; elsewhere False)."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        lines = Path("/proc/self/mountinfo").read_text("utf-8", "replace").splitlines()
        device = place.stat().st_dev
    except OSError:
        return False
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in lines:
        mounted, _, kind = line.partition(" - ")
        if mounted.split()[2] == wanted:
            return kind.split()[0] in _IN_MEMORY
    return False


# AdamW -----------------------------------------------------------------------------------------------

_MOMENTS = ("exp_avg", "exp_avg_sq")
_EIGHT_BIT = ("state1", "state2")


def paged_adamw(
    parameters: list[torch.nn.Parameter], places: Sequence[Path], **arguments: Any
) -> tuple[torch.optim.AdamW, StateFile]:
    """PyTorch's AdamW, both moments of each parameter in a file. Raises WeftError DISK_FULL."""
    sizes = [aligned(p.numel() * p.element_size()) for p in parameters for _ in _MOMENTS]
    file = StateFile(sum(sizes), places)
    made = torch.optim.AdamW(parameters, **arguments)

    def begin(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for parameter in _parameters(optimizer):
            if parameter.grad is not None and parameter not in optimizer.state:  # as AdamW itself begins
                state = optimizer.state[parameter]
                state["step"] = torch.tensor(0.0, dtype=torch.float32)
                state.update({name: file.tensor(parameter, name, parameter.dtype) for name in _MOMENTS})

    def load(optimizer: torch.optim.Optimizer, kept: dict[str, Any]) -> dict[str, Any]:
        found: dict[Any, Any] = {}
        for key, parameter in zip(_keys(kept), _parameters(optimizer), strict=True):
            if key in kept["state"]:
                state = kept["state"][key]
                found[key] = {"step": state["step"].clone()}
                for name in _MOMENTS:
                    found[key][name] = file.tensor(parameter, name, parameter.dtype).copy_(state[name])
        return {**kept, "state": found}

    made.register_step_pre_hook(begin)
    made.register_load_state_dict_pre_hook(load)
    return made, file


def paged_adamw_8bit(
    kind: Any, parameters: list[torch.nn.Parameter], places: Sequence[Path], **arguments: Any
) -> tuple[torch.optim.Optimizer, StateFile]:
    """bitsandbytes' 8-bit AdamW, both moments in a file; the scale of each 256 numbers of them stays in memory.

    Args:
        kind: its class.

    Raises:
        WeftError: DISK_FULL.
    """
    smallest = arguments.get("min_8bit_size", 4096)
    widths = [1 if p.numel() >= smallest else 4 for p in parameters]
    sizes = [aligned(p.numel() * width) for p, width in zip(parameters, widths, strict=True) for _ in _EIGHT_BIT]
    file = StateFile(sum(sizes), places)
    return _in_file(kind, file)(parameters, **arguments), file


def _in_file(kind: Any, file: StateFile) -> Callable[..., Any]:
    class InFile(kind):
        def get_state_buffer(self, p: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            # Asked for once for each of the two, in this order.
            return file.tensor(p, _EIGHT_BIT["state1" in self.state[p]], dtype)

        def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
            # The original copies all it is given, and the copy would lie in memory: the moments go past it.
            moments: list[tuple[torch.Tensor, str, torch.Tensor]] = []
            light: dict[Any, Any] = {}
            for key, parameter in zip(_keys(state_dict), _parameters(self), strict=True):
                if key not in state_dict["state"]:
                    continue
                whole = _unwrapped(state_dict["state"][key])
                whole.pop(self._FSDP_WRAPPED_QUANT_STATE_KEY, None)
                for name in _EIGHT_BIT:
                    value = whole.pop(name)
                    moments.append((parameter, name, file.tensor(parameter, name, value.dtype).copy_(value)))
                light[key] = whole
            super().load_state_dict({**state_dict, "state": light}, move_to_device)
            for parameter, name, value in moments:
                self.state[parameter][name] = value

    return InFile


def load_state(optimizer: Any, kept: dict[str, Any]) -> None:
    """`load_state_dict` for every optimizer of a run, also where the state was made on a machine with a card and this has none, or back.

    On a card bitsandbytes would load a paged state into the card's own memory, all of it; here it becomes paged again.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    theirs = any(_unwrapped(state).keys() & set(_EIGHT_BIT) for state in kept["state"].values())
    ours = hasattr(inner, "get_state_buffer")  # bitsandbytes
    if kept["state"] and theirs != ours:
        kept = _translated(inner, kept, ours)
    if not getattr(inner, "is_paged", False):
        optimizer.load_state_dict(kept)
        return
    inner.load_state_dict(kept, move_to_device=False)
    for parameter in _parameters(inner):
        state = inner.state.get(parameter, {})
        for name, value in list(state.items()):
            if name in _EIGHT_BIT:
                state[name] = inner.get_state_buffer(parameter, value.dtype).copy_(value)
            elif isinstance(value, torch.Tensor):
                state[name] = value.to(parameter.device)


def _translated(optimizer: Any, kept: dict[str, Any], to_bitsandbytes: bool) -> dict[str, Any]:
    """A 32-bit AdamW's state in the other library's words; the settings are this optimizer's own."""
    old, new = (_MOMENTS, _EIGHT_BIT) if to_bitsandbytes else (_EIGHT_BIT, _MOMENTS)
    states: dict[Any, Any] = {}
    for key, state in kept["state"].items():
        state = _unwrapped(state)
        step = int(state["step"]) if to_bitsandbytes else torch.tensor(float(state["step"]), dtype=torch.float32)
        states[key] = {"step": step, **{name: state[was] for was, name in zip(old, new, strict=True)}}
    groups = [
        {**own, "params": group["params"]}
        for own, group in zip(optimizer.param_groups, kept["param_groups"], strict=True)
    ]
    return {"state": states, "param_groups": groups}


def _unwrapped(state: dict[str, Any]) -> dict[str, Any]:
    """One parameter's state, without what bitsandbytes wraps around its moments for FSDP."""
    found = dict(state)
    for value in state.values():
        if isinstance(value, dict):
            found.update(value)
    return found


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[torch.nn.Parameter]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _keys(kept: dict[str, Any]) -> list[Any]:
    """What a saved state calls the optimizer's parameters, in order."""
    return [key for group in kept["param_groups"] for key in group["params"]]
