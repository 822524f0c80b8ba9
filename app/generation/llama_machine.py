"""What the llama.cpp loader has to know about the machine that its engine runs on."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

import psutil

_GPU = 1  # GGML_BACKEND_DEVICE_TYPE_GPU; integrated ones share the main memory and are no gain to count


def physical_cores() -> int:
    """Cores that this process may use, hyper-threads counted once, at least 1."""
    logical = psutil.cpu_count() or 1
    cores = psutil.cpu_count(logical=False) or logical
    if sys.platform.startswith("linux"):
        # An affinity or a container's quota may leave fewer: more threads than that would wait for one another.
        allowed = os.sched_getaffinity(0)
        cores = min(cores, len({_siblings(cpu) for cpu in allowed}))
    return max(1, min(cores, _quota() or cores))


def _siblings(cpu: int) -> str:
    """The hyper-threads that share a core with this one, as Linux writes them."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _quota() -> int:
    """Whole CPUs that a container's quota allows; 0 when there is none."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return 0 if quota == "max" else max(1, round(int(quota) / int(period)))
    except (OSError, ValueError):
        return 0


def free_memory() -> int:
    """Bytes of main memory that a load may take without swapping."""
    free = psutil.virtual_memory().available
    limit = _cgroup_free()
    return min(free, limit) if limit is not None else free


def _cgroup_free() -> int | None:
    """Bytes that a container's limit leaves; None when there is none."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        # Page cache counts as used there, but is given up when memory runs short.
        for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines():
            if line.startswith("inactive_file "):
                used -= int(line.split()[1])
        return max(0, int(limit) - used)
    except (OSError, ValueError):
        return None


def resident_memory() -> int:
    """Bytes of this process that lie in main memory, mapped pages of files included."""
    return int(psutil.Process().memory_info().rss)


def free_gpu_memory() -> int:
    """Bytes free on the GPUs that llama.cpp can use, all together; 0 without one.

    llama-cpp-python has no names for these functions, so they are taken from its ggml library.
    """
    from llama_cpp._ggml import libggml

    library: Any = libggml
    library.ggml_backend_dev_count.restype = ctypes.c_size_t
    library.ggml_backend_dev_get.restype = ctypes.c_void_p
    library.ggml_backend_dev_get.argtypes = [ctypes.c_size_t]
    library.ggml_backend_dev_type.argtypes = [ctypes.c_void_p]
    library.ggml_backend_dev_memory.restype = None
    library.ggml_backend_dev_memory.argtypes = [ctypes.c_void_p, *[ctypes.POINTER(ctypes.c_size_t)] * 2]
    together = 0
    for i in range(library.ggml_backend_dev_count()):
        device = library.ggml_backend_dev_get(i)
        if library.ggml_backend_dev_type(device) == _GPU:
            free, total = ctypes.c_size_t(0), ctypes.c_size_t(0)
            library.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
            together += free.value
    return together
