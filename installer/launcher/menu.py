"""`run.py --launcher`: an icon to double-click in the desktop's menu, which starts Weft from this folder."""

from __future__ import annotations

import os
import plistlib
import shutil
import subprocess
import sys
from pathlib import Path

from installer.launcher.say import Stop, say
from installer.launcher.virtual_environment import ROOT, python_of

NAME = "Weft"
SUMMARY = "Run language models on your own machine"
ICON = ROOT / "resources" / "icons" / "weft.svg"


def install() -> int:
    """Write the icon for this system. Returns the exit status."""
    if sys.platform == "darwin":
        written = write_mac_application(Path.home() / "Applications")
    elif os.name == "nt":
        written = write_windows_shortcut()
    else:
        data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
        written = write_desktop_file(data)
    say(f"{NAME} is in the menu now: {written}")
    return 0


def write_desktop_file(data: Path) -> Path:
    """Linux: a desktop entry and an icon below `data` (`~/.local/share`)."""
    icons = data / "icons" / "hicolor" / "scalable" / "apps"
    if ICON.exists():
        icons.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ICON, icons / "weft.svg")
    applications = data / "applications"
    applications.mkdir(parents=True, exist_ok=True)
    target = applications / "weft.desktop"
    lines = [
        "[Desktop Entry]",
        "Type=Application",
        f"Name={NAME}",
        f"Comment={SUMMARY}",
        f"Exec={quote(sys.executable)} {quote(str(ROOT / 'run.py'))} %F",
        f"Path={ROOT}",
        "Icon=weft",
        "Terminal=false",
        "Categories=Utility;Science;ArtificialIntelligence;",
        "StartupWMClass=weft",
    ]
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    target.chmod(0o755)
    write_link_handler(applications)
    if updater := shutil.which("update-desktop-database"):
        subprocess.run([updater, str(applications)], check=False, capture_output=True)
    return target


def write_link_handler(applications: Path) -> Path:
    """Linux: `weft://` links of web pages open Weft, which asks first. An entry of its own: the menu's takes files (%F)."""
    target = applications / "weft-link.desktop"
    lines = [
        "[Desktop Entry]",
        "Type=Application",
        f"Name={NAME} link",
        f"Exec={quote(sys.executable)} {quote(str(ROOT / 'run.py'))} %u",
        f"Path={ROOT}",
        "Icon=weft",
        "Terminal=false",
        "NoDisplay=true",
        "MimeType=x-scheme-handler/weft;",
    ]
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    target.chmod(0o755)
    if chooser := shutil.which("xdg-mime"):
        subprocess.run([chooser, "default", target.name, "x-scheme-handler/weft"], check=False, capture_output=True)
    return target


def quote(argument: str) -> str:
    """An argument as a desktop entry's Exec line wants it (Desktop Entry Specification, "The Exec key")."""
    escaped = argument.replace("\\", "\\\\").replace('"', '\\"').replace("`", "\\`").replace("$", "\\$")
    return '"' + escaped.replace("\\", "\\\\").replace("%", "%%") + '"'


def write_mac_application(applications: Path) -> Path:
    """macOS: a small application bundle whose program starts run.py."""
    bundle = applications / f"{NAME}.app" / "Contents"
    (bundle / "MacOS").mkdir(parents=True, exist_ok=True)
    script = bundle / "MacOS" / "weft"
    line = " ".join("'" + part.replace("'", "'\\''") + "'" for part in (sys.executable, str(ROOT / "run.py")))
    script.write_text(f'#!/bin/sh\nexec {line} "$@"\n', encoding="utf-8")
    script.chmod(0o755)
    information = {
        "CFBundleName": NAME,
        "CFBundleExecutable": "weft",
        "CFBundleIdentifier": "weft.source",
        "CFBundlePackageType": "APPL",
        "NSHighResolutionCapable": True,
    }
    (bundle / "Info.plist").write_bytes(plistlib.dumps(information))
    return bundle.parent


def write_windows_shortcut() -> Path:
    """Windows: a shortcut in the Start menu, made by the shell's own scripting object."""
    target = Path(os.environ["APPDATA"]) / "Microsoft" / "Windows" / "Start Menu" / "Programs" / f"{NAME}.lnk"
    pythonw = python_of().with_name("pythonw.exe")  # the console-less Python of .venv, which `--launcher` has just made
    values = {
        "WEFT_LNK": str(target),
        "WEFT_TARGET": str(pythonw),
        "WEFT_ARGUMENTS": f'"{ROOT / "run.py"}"',
        "WEFT_FOLDER": str(ROOT),
        "WEFT_SUMMARY": SUMMARY,
    }
    script = (
        "$s = (New-Object -ComObject WScript.Shell).CreateShortcut($env:WEFT_LNK);"
        "$s.TargetPath = $env:WEFT_TARGET; $s.Arguments = $env:WEFT_ARGUMENTS;"
        "$s.WorkingDirectory = $env:WEFT_FOLDER; $s.Description = $env:WEFT_SUMMARY; $s.Save()"
    )
    command = ["powershell", "-NoProfile", "-NonInteractive", "-Command", script]
    ran = subprocess.run(command, env={**os.environ, **values}, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise Stop(f"The shortcut could not be made: {ran.stderr.strip()}")
    return target
