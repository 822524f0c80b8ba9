"""What this machine has to run models on, free memory included; limits of a container respected."""

from __future__ import annotations

import functools
import importlib
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from app.core.memory import Gpu, Machine

_FRESH = 1.0  # seconds for which a probe is good

_lock = threading.Lock()
_last: tuple[float, Machine] | None = None


def probe() -> Machine:
    """The machine as it is now; figures are at most a second old. Takes well under 50 ms after the first call."""
    global _last
    with _lock:
        now = time.monotonic()
        if _last is None or now - _last[0] > _FRESH:
            _last = (now, _probe())
        return _last[1]


def _probe() -> Machine:
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    for limit, used in _memory_limits(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")):
        total = min(total, limit)
        free = min(free, max(0, limit - used))
    system = "windows" if sys.platform == "win32" else "darwin" if sys.platform == "darwin" else "linux"
    gpus = _gpus()
    return Machine(
        system=system, cpu_count=_cpu_count(), ram_total=total, ram_free=free, gpus=gpus, llama_gpu=bool(gpus) and _llama_gpu()
    )


def _llama_gpu() -> bool:
    """Whether llama.cpp's build can use the cards; as said when it was installed."""
    from app.core.paths import default_paths  # here: an engine's interpreter lacks what these import
    from app.engine.environments import Environments

    return bool(Environments(default_paths().environments).gpu("llamacpp"))


def _cpu_count() -> int:
    """CPUs that this process may use: its affinity, cut down by a container's quota."""
    if sys.platform == "linux":
        count = len(os.sched_getaffinity(0))
        for folder in _cgroup_folders(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")):
            quota, _, period = _read(folder / "cpu.max").partition(" ")
            if quota.isdigit() and period.isdigit() and int(period):
                count = min(count, max(1, -(-int(quota) // int(period))))
        return count
    return os.cpu_count() or 1


def _memory_limits(mount: Path, membership: Path) -> list[tuple[int, int]]:
    """(limit, used) of every control group above this process that has a limit; page cache counts as free."""
    found: list[tuple[int, int]] = []
    for folder in _cgroup_folders(mount, membership):
        for limit_name, used_name, cache_name in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, used = _read(folder / limit_name), _read(folder / used_name)
            if limit.isdigit() and used.isdigit():
                statistics = dict(
                    line.split(" ", 1) for line in _read(folder / "memory.stat").splitlines() if " " in line
                )
                cache = statistics.get(cache_name, "0").strip()
                found.append((int(limit), max(0, int(used) - (int(cache) if cache.isdigit() else 0))))
    return found


def _cgroup_folders(mount: Path, membership: Path) -> list[Path]:
    """The control groups that hold this process, innermost first, of version 2 and of version 1's memory part."""
    folders: list[Path] = []
    for line in _read(membership).splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            base = mount
        elif "memory" in controllers.split(","):
            base = mount / "memory"
        else:
            continue
        folder = base / path.lstrip("/")
        while True:
            folders.append(folder)
            if folder == base or base not in folder.parents:
                break
            folder = folder.parent
        if base not in folders:
            folders.append(base)  # inside a container the path often starts above the mount
    return folders


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


@functools.cache
def _nvml() -> Any:
    """The NVIDIA management library, initialised; None where there is no driver or no binding."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    return nvml


def _gpus() -> tuple[Gpu, ...]:
    nvml = _nvml()
    if nvml is None:
        return ()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    wanted = None if visible is None else {part.strip() for part in visible.split(",")}
    gpus: list[Gpu] = []
    try:
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            identity = _text(nvml.nvmlDeviceGetUUID(handle))
            if (
                wanted is not None
                and str(index) not in wanted
                and not any(w and identity.startswith(w) for w in wanted)
            ):
                continue
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            gpus.append(Gpu(name=_text(nvml.nvmlDeviceGetName(handle)), total=int(memory.total), free=int(memory.free)))
    except nvml.NVMLError:
        return tuple(gpus)  # a card that fell off the bus is a card that cannot be used
    return tuple(gpus)


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
