"""Stands in for uv: makes environments of symlinks at once, and installs, stalls or fails as `plan.json` beside it says.

`plan.json` maps a requirement to `{"say": [...], "fail": text, "sleep": seconds, "child": true}`; what was
asked is appended to `calls.jsonl`. Written by the test into a folder of its own, with a line that starts it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path


def main(folder: Path, arguments: list[str]) -> int:
    """Behave like uv, as far as Weft uses it."""
    if arguments[:2] == ["cache", "dir"]:
        print(folder / "cache")
        return 0
    with (folder / "calls.jsonl").open("a", encoding="utf-8") as calls:
        kept = {name: value for name, value in os.environ.items() if name.startswith(("UV_", "CMAKE", "CUDA"))}
        calls.write(json.dumps({"arguments": arguments, "environment": kept}) + "\n")
    if arguments[0] == "venv":
        return make(Path(arguments[-1]))
    path = folder / "plan.json"
    plan = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for requirement in arguments:
        status = install(folder, plan.get(requirement, {}))
        if status:
            return status
    print("Installed 1 package in 1ms", file=sys.stderr)
    return 0


def make(environment: Path) -> int:
    """A virtual environment whose Python is this one."""
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "python").symlink_to(sys.executable)
    return 0


def install(folder: Path, plan: dict) -> int:
    """Do what the plan says for one requirement."""
    for line in plan.get("say", []):
        print(line, file=sys.stderr, flush=True)
    if plan.get("child"):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        (folder / "child.pid").write_text(str(child.pid), encoding="utf-8")
    time.sleep(plan.get("sleep", 0))
    if "fail" in plan:
        print(plan["fail"], file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
