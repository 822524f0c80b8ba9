#!/usr/bin/env python3
"""Start, test or drive Weft from a source folder. Needs nothing but Python 3.11 or newer.

python3 run.py                 open the window (the first time: make .venv and install what the window needs)
python3 run.py test            install what tests need and run them; see `python3 run.py test --help`
python3 run.py --launcher      put an icon to double-click into the desktop's menu
python3 run.py chat starter    anything else is passed on to Weft's command line; see `python3 run.py --help`
"""

# This file must be readable by any Python, however old, so that it can say what is wrong: no newer syntax here.
import os
import sys

OLDEST, TOO_NEW = (3, 11), (3, 15)


def wrong_python(version):
    """Why this Python cannot run Weft, in words; "" when it can."""
    found = ".".join(str(part) for part in tuple(version)[:3])
    if tuple(version)[:2] < OLDEST:
        problem = "Weft needs Python 3.11 or newer, and this is Python %s." % found
    elif tuple(version)[:2] >= TOO_NEW:
        problem = "Weft's window toolkit does not support Python %s yet; 3.11 to 3.14 will do." % found
    else:
        return ""
    if sys.platform == "win32":
        return problem + "\nInstall one with:  winget install Python.Python.3.12\nthen run:          py -3.12 run.py"
    if sys.platform == "darwin":
        return problem + "\nInstall one from python.org or with:  brew install python@3.12\nthen run:  python3.12 run.py"
    return problem + (
        "\nInstall one (Debian 12, Ubuntu 24.04 and newer have it:  apt-get install python3 python3-venv),"
        "\nthen run this file with it, such as:  python3.12 run.py"
    )


def main():
    problem = wrong_python(sys.version_info)
    if problem:
        sys.stderr.write(problem + "\n")
        return 1
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    from installer.launcher import start

    return start.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
