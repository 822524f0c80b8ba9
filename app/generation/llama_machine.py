"""What the llama.cpp loader has to know about the machine, from the standard library alone (no psutil in its environment)."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path


def physical_cores() -> int:
    """Cores that this process may use, hyper-threads counted once, at least 1."""
    allowed = _allowed_cpus()
    cores = _linux_cores(allowed) if sys.platform.startswith("linux") else _other_cores()
    quota = _cgroup_cpus()
    return max(1, min(cores or len(allowed), quota or 2**16))


def _allowed_cpus() -> set[int]:
    if sys.platform.startswith("linux"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _linux_cores(allowed: set[int]) -> int:
    siblings: set[str] = set()
    for cpu in allowed:
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            siblings.add(path.read_text().strip())
        except OSError:
            return 0
    return len(siblings)


def _other_cores() -> int:
    if sys.platform == "darwin":
        # Performance cores alone: threads on the slow ones make all others wait.
        return _sysctl("hw.perflevel0.physicalcpu") or _sysctl("hw.physicalcpu")
    # Windows: hyper-threading is the rule; asking exactly takes a page of structures, calibration does the rest.
    return max(1, (os.cpu_count() or 2) // 2)


def _cgroup_cpus() -> int:
    """Whole CPUs that a container's quota allows; 0 when there is none."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return 0 if quota == "max" else max(1, round(int(quota) / int(period)))
    except (OSError, ValueError):
        return 0


def free_memory() -> int:
    """Bytes of main memory that a load may take without swapping; 0 when unknown."""
    if sys.platform.startswith("linux"):
        free = _meminfo("MemAvailable")
        limit = _cgroup_free()
        return min(free, limit) if free and limit else free or limit
    if sys.platform == "darwin":
        return _sysctl("hw.memsize") * 7 // 10  # macOS counts its caches as used; this is what it will give up
    return _windows_free()


def resident_memory() -> int:
    """Bytes of this process that lie in main memory, mapped file pages included; 0 when unknown."""
    return _status("VmRSS")


def peak_memory() -> int:
    """The most bytes that `resident_memory` has been so far; 0 when unknown."""
    return _status("VmHWM")


def _status(name: str) -> int:
    return _field(Path("/proc/self/status"), name)


def _meminfo(name: str) -> int:
    return _field(Path("/proc/meminfo"), name)


def _field(path: Path, name: str) -> int:
    try:
        for line in path.read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return 0
    return 0


def _cgroup_free() -> int:
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit == "max":
            return 0
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        # Page cache counts as used there, but is given up when memory runs short.
        for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines():
            if line.startswith("inactive_file "):
                used -= int(line.split()[1])
        return max(0, int(limit) - used)
    except (OSError, ValueError):
        return 0


def _sysctl(name: str) -> int:
    value = ctypes.c_int64(0)
    size = ctypes.c_size_t(ctypes.sizeof(value))
    try:
        libc = ctypes.CDLL(None)
        failed = libc.sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0))
    except (OSError, AttributeError):
        return 0
    return 0 if failed else value.value


class _MemoryStatus(ctypes.Structure):
    _fields_ = [
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        ("total_physical", ctypes.c_uint64),
        ("free_physical", ctypes.c_uint64),
        ("total_page", ctypes.c_uint64),
        ("free_page", ctypes.c_uint64),
        ("total_virtual", ctypes.c_uint64),
        ("free_virtual", ctypes.c_uint64),
        ("free_extended", ctypes.c_uint64),
    ]


def _windows_free() -> int:
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    windll = getattr(ctypes, "windll", None)
    if windll is None or not windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        return 0
    return int(status.free_physical)
