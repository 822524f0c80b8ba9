"""The shared libraries that Qt loads on Linux and that a bare system lacks, and the Debian packages that hold them."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from installer.launcher.say import Stop, say

# soname: Debian package. What Qt's core, gui and widgets need on any display.
NEEDED = {
    "libGL.so.1": "libgl1",
    "libEGL.so.1": "libegl1",
    "libxkbcommon.so.0": "libxkbcommon0",
    "libglib-2.0.so.0": "libglib2.0-0",
    "libfreetype.so.6": "libfreetype6",
    "libfontconfig.so.1": "libfontconfig1",
    "libdbus-1.so.3": "libdbus-1-3",
}
# What Qt's X11 platform needs besides.
NEEDED_ON_X11 = {
    "libX11-xcb.so.1": "libx11-xcb1",
    "libxkbcommon-x11.so.0": "libxkbcommon-x11-0",
    "libxcb-cursor.so.0": "libxcb-cursor0",
    "libxcb-icccm.so.4": "libxcb-icccm4",
    "libxcb-image.so.0": "libxcb-image0",
    "libxcb-keysyms.so.1": "libxcb-keysyms1",
    "libxcb-randr.so.0": "libxcb-randr0",
    "libxcb-render-util.so.0": "libxcb-render-util0",
    "libxcb-shape.so.0": "libxcb-shape0",
    "libxcb-xkb.so.1": "libxcb-xkb1",
}


def can_load(soname: str) -> bool:
    """Whether the dynamic loader finds a library."""
    try:
        ctypes.CDLL(soname)
    except OSError:
        return False
    return True


def missing(*, x11: bool, can_load: Callable[[str], bool] = can_load) -> dict[str, str]:
    """What is not there: soname to Debian package. Empty on anything but Linux."""
    if not sys.platform.startswith("linux"):
        return {}
    wanted = NEEDED | (NEEDED_ON_X11 if x11 else {})
    return {soname: package for soname, package in wanted.items() if not can_load(soname)}


def ensure(*, yes: bool = False, x11: bool | None = None, more: tuple[str, ...] = ()) -> None:
    """See to it that Qt will start.

    Args:
        yes: run apt-get without asking, if we are root. `CI` in the environment means the same.
        x11: whether X11 will be used; None: whether there is a DISPLAY and Qt is not told otherwise.
        more: further Debian packages that are missing (a compiler).

    Raises:
        Stop: with the exact line that installs what is missing.
    """
    if x11 is None:
        x11 = bool(os.environ.get("DISPLAY")) and os.environ.get("QT_QPA_PLATFORM", "xcb").startswith("xcb")
    libraries = missing(x11=x11)
    packages = sorted({*libraries.values(), *more})
    if not packages:
        return
    what = "Qt, the window's toolkit, needs shared libraries that this system lacks: " + ", ".join(libraries)
    if not libraries:
        what = "These packages are missing: " + ", ".join(packages)
    if not shutil.which("apt-get"):
        raise Stop(f"{what}.\nInstall them with your system's package manager (in Debian they are {' '.join(packages)}).")
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    if not (root and (yes or os.environ.get("CI"))):
        line = f"{'' if root else 'sudo '}apt-get install -y {' '.join(packages)}"
        raise Stop(f"{what}.\nRun:  {line}\nand start again.{'  (Or pass --yes, and this is done for you.)' if root else ''}")
    install(packages)
    if still := missing(x11=x11):
        raise Stop(f"apt-get ran, but these are still missing: {', '.join(still)}.")


def install(packages: list[str]) -> None:
    """Install Debian packages, as root. Raises Stop when apt-get fails."""
    say(f"installing Debian packages: {' '.join(packages)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update", "-q"], ["apt-get", "install", "-y", "-q", "--no-install-recommends", *packages]):
        if subprocess.run(command, env=environment, stdout=sys.stderr, check=False).returncode and command[1] == "install":
            raise Stop(f"{' '.join(command)} failed; its reason stands above.")


def has_compiler() -> bool:
    """Whether a C++ compiler is at hand."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++") if name)


def has_fonts() -> bool:
    """Whether any font is installed (without one, Qt draws boxes)."""
    folders = (Path("/usr/share/fonts"), Path("/usr/local/share/fonts"), Path.home() / ".local/share/fonts", Path.home() / ".fonts")
    return any(next(folder.rglob("*.[to]tf"), None) for folder in folders if folder.is_dir())
