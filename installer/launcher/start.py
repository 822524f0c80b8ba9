"""`run.py`'s arguments: the window, the tests, the icon in the menu, or the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from installer.launcher import system_libraries, virtual_environment
from installer.launcher.say import Stop


def main(arguments: list[str]) -> int:
    """Do what the arguments say. Returns the exit status (on POSIX, opening Weft replaces this process)."""
    try:
        if arguments[:1] == ["test"]:
            from installer.launcher import checks

            return checks.main(arguments[1:])
        if arguments == ["--launcher"]:
            from installer.launcher import menu

            virtual_environment.ensure()
            return menu.install()
        yes = "--yes" in arguments
        return open_weft([a for a in arguments if a != "--yes"], yes=yes)
    except Stop as stop:
        print(f"\n{stop.text}", file=sys.stderr)
        return stop.status
    except PermissionError as error:
        print(
            f"\nerror: {error.filename} cannot be written.\nhint: Copy Weft's folder to a place of your own and start it there.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. Start again to go on where this stopped.", file=sys.stderr)
        return 130


def open_weft(arguments: list[str], *, yes: bool = False) -> int:
    """The window when there are no arguments (or only files to open), else the command line."""
    # As app.__main__.wants_window, which cannot be asked yet: a bare word is a command, not a file.
    if all(a.startswith("weft://") or (Path(a).exists() and (Path(a).name != a or Path(a).suffix)) for a in arguments):
        if no_display():
            raise Stop(
                "error: There is no display here for the window.\n"
                "hint: Use the command line instead, such as `python3 run.py chat starter`."
            )
        system_libraries.ensure(yes=yes)
    module = ["-m", "app"]
    if arguments[:1] == ["environments"]:
        module, arguments = ["-m", "app.engine.environment_command"], arguments[1:]
    python = virtual_environment.ensure()
    if os.name == "nt" and Path(sys.executable).name.lower() == "pythonw.exe":
        python = python.with_name("pythonw.exe")  # started from the menu: no console
    return become([str(python), *module, *arguments])


def no_display() -> bool:
    """Whether this is a Linux session without any screen for a window."""
    wanted = ("DISPLAY", "WAYLAND_DISPLAY", "QT_QPA_PLATFORM")
    return sys.platform.startswith("linux") and not any(os.environ.get(name) for name in wanted)


def become(command: list[str]) -> int:
    """Replace this process by another program; on Windows, where that detaches it, wait for it."""
    environment = {**os.environ, "PYTHONPATH": str(virtual_environment.ROOT), "PYTHONSAFEPATH": "1"}
    if os.name == "nt":
        return subprocess.call(command, env=environment)
    sys.stdout.flush()
    sys.stderr.flush()
    return os.execve(command[0], command, environment)
