"""A child that merges, kills itself with SIGKILL at a random call to the operating system, and merges again.

    python merge_killed.py BASE ADAPTER FOLDER POINTS SEED

Every point is a fork of one process that has the libraries loaded. Prints what it found as JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

CALLS = ("pwrite", "copy_file_range", "fsync", "fdatasync", "write", "rename", "replace", "ftruncate", "posix_fallocate", "mkdir", "unlink", "rmdir", "open")  # fmt: skip


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of each file below a folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def count_calls(stop_at: int) -> list[int]:
    """Count calls that change something on the disk; die at the `stop_at`th (0: never)."""
    seen = [0]
    for name in CALLS:
        real = getattr(os, name)

        def counted(*arguments: Any, real: Any = real, **more: Any) -> Any:
            seen[0] += 1
            if seen[0] == stop_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **more)

        setattr(os, name, counted)
    return seen


def main() -> None:
    base, adapter, folder, points, seed = sys.argv[1:]
    import torch

    from app.core.merge_plan import MergePlan
    from app.core.stack import AdapterStack, StackedAdapter
    from app.tasks import merge
    from tests.engine.merge_kit import Report

    torch.set_num_threads(1)
    os.environ["WEFT_MERGE_THREADS"] = "2"
    home = Path(folder)

    def run(target: Path, stop_at: int = 0) -> dict[str, Any] | int:
        """Merge in a fork. Returns its result, or the number of the signal that it died of."""
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            seen = count_calls(stop_at)
            stack = AdapterStack(adapters=(StackedAdapter(path=adapter, weight=0.8),))
            try:
                done = merge.run(MergePlan(model=base, stack=stack, target=str(target), shard_size=150_000), Report())
                answer: dict[str, Any] = {"resumed": done.resumed, "bytes": done.bytes, "notes": done.notes}
            except BaseException as error:
                answer = {"error": repr(error)}
            seen[0] = -(10**9)
            os.write(writing, json.dumps({**answer, "calls": seen[0]}).encode())
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            text = pipe.read()
        status = os.waitpid(child, 0)[1]
        return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else json.loads(text)

    expected_at = home / "whole" / "merged"  # of the same name: the card says it
    expected_at.parent.mkdir()
    first = run(expected_at)
    assert isinstance(first, dict) and "error" not in first, first
    expected = hashes(expected_at)
    # How many calls a whole run makes: found by looking for the last one that still kills it.
    low, high = 1, 2
    while run(home / f"count{high}", high) == -signal.SIGKILL:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if run(home / f"n{middle}", middle) == -signal.SIGKILL else (low, middle)
    rng = random.Random(int(seed))
    found = []
    for number in range(int(points)):
        place = home / f"point{number}"
        place.mkdir()
        target = place / "merged"
        stop_at = rng.randrange(1, low + 1)
        died = run(target, stop_at)
        visible = [p.name for p in place.iterdir() if not p.name.startswith(".")]
        complete = hashes(target) == expected if target.exists() else None
        again = run(target)
        left = sorted(p.name for p in place.iterdir())
        found.append({
            "stop_at": stop_at, "died": died, "visible": visible, "complete": complete, "again": again, "left": left,
            "right": hashes(target) == expected,
        })  # fmt: skip
    print(json.dumps({"calls": low, "points": found}))


if __name__ == "__main__":
    main()
