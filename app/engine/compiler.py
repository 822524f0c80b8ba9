"""Whether llama.cpp can be compiled here, and the exact command that makes it possible."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

_INSTALLERS = {
    "apt-get": "apt-get install -y build-essential cmake",
    "dnf": "dnf install -y gcc-c++ make cmake",
    "zypper": "zypper install -y gcc-c++ make cmake",
    "pacman": "pacman -S --needed base-devel cmake",
    "apk": "apk add build-base cmake linux-headers",
}
_WINDOWS = (
    "winget install Microsoft.VisualStudio.2022.BuildTools --override "
    '"--passive --wait --add Microsoft.VisualStudio.Workload.VCTools --includeRecommended"'
)


def has_compiler() -> bool:
    """Whether a C and a C++ compiler are at hand."""
    if sys.platform == "win32":
        installer = Path(os.environ.get("ProgramFiles(x86)", "C:/Program Files (x86)")) / "Microsoft Visual Studio/Installer"  # noqa: SIM112
        return bool(shutil.which("cl") or (installer / "vswhere.exe").exists())
    if sys.platform == "darwin":
        # /usr/bin/c++ exists on every Mac and asks to install the tools; only this says whether they are there.
        return subprocess.run(["xcode-select", "-p"], capture_output=True, check=False).returncode == 0
    c = any(shutil.which(name) for name in (os.environ.get("CC", ""), "cc", "gcc", "clang") if name)
    cxx = any(shutil.which(name) for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++") if name)
    return c and cxx


def nvcc() -> str:
    """NVIDIA's compiler, as CUDACXX, PATH, CUDA_PATH or the usual folder have it; "" when there is none."""
    places = [os.environ.get("CUDACXX", ""), shutil.which("nvcc") or ""]
    name = "nvcc.exe" if sys.platform == "win32" else "nvcc"
    roots = [os.environ.get("CUDA_PATH", ""), os.environ.get("CUDA_HOME", ""), "" if sys.platform == "win32" else "/usr/local/cuda"]
    places += [str(Path(root) / "bin" / name) for root in roots if root]
    return next((place for place in places if place and Path(place).is_file()), "")


def has_nvidia() -> bool:
    """Whether there is an NVIDIA driver, without loading anything of it."""
    return bool(shutil.which("nvidia-smi")) or Path("/proc/driver/nvidia/version").exists()


def why_without_gpu() -> str:
    """Why a build of llama.cpp cannot use the NVIDIA card that is there, and what to do, as a sentence."""
    how = (
        "it was built when the CUDA toolkit was not there. Repair it to build it with GPU support."
        if nvcc()
        else "that needs NVIDIA's CUDA toolkit (nvcc), which is not there. Install that, then Repair."
    )
    return f"{how} Until then GGUF models run on the processor."


def command_to_get_one() -> str:
    """The command that installs a compiler on this system; "" when we do not know one."""
    if sys.platform == "win32":
        return _WINDOWS
    if sys.platform == "darwin":
        return "xcode-select --install"
    prefix = "" if hasattr(os, "geteuid") and os.geteuid() == 0 else "sudo "
    return next((prefix + line for tool, line in _INSTALLERS.items() if shutil.which(tool)), "")


def hint() -> str:
    """What to do when there is no compiler, as a sentence."""
    line = command_to_get_one()
    get = f"Run `{line}`" if line else "Install a C++ compiler and CMake with your system's package manager"
    return f"{get}, then install this environment again. Until then, models in safetensors format run through Transformers."
