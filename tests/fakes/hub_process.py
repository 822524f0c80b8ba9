"""A fake hub in a process of its own, for benchmarks: `python -m tests.fakes.hub_process FILE COPIES RATE` until stdin ends.

Serves FILE as model.gguf of the repositories user/m0, user/m1, … and prints one JSON line that says where.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.fakes.hub import FakeHub
from tests.fakes.hub_content import make_file


def main() -> None:
    path, copies, rate = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    with FakeHub(total_rate=rate) as hub:
        file = make_file("model.gguf", path)  # hashed once
        for number in range(copies):
            hub.add(f"user/m{number}", {}).revisions["main"]["model.gguf"] = file
        commits = [hub.repos[f"user/m{number}"].commit("main") for number in range(copies)]
        print(
            json.dumps({"endpoint": hub.endpoint, "commits": commits, "size": file.size, "sha256": file.sha256}),
            flush=True,
        )
        sys.stdin.read()


if __name__ == "__main__":
    main()
