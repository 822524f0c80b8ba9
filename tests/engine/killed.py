"""Work that dies half way, in a child of this process: what it leaves on the disk is what a kill leaves."""

from __future__ import annotations

import os
from collections.abc import Callable


def killed(work: Callable[[], object]) -> bool:
    """Run `work` in a forked child that ends itself with `os._exit(9)` somewhere. Whether it did."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)  # nothing of the tests' own is tidied up twice
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
