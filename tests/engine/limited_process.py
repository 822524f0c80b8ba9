"""A process of a launched run; to the second of them the system grants only so much memory from the step without effect on."""

from __future__ import annotations

import os
import sys
from typing import Any

from app.training import run_launched, run_torch
from tests.engine import fork_kit

try_out = run_torch.try_out


def limited(*given: Any) -> Any:
    if os.environ["RANK"] == "1":
        fork_kit.allow_only(int(os.environ["WEFT_TEST_SPARE"]))
    return try_out(*given)


if __name__ == "__main__":
    run_torch.try_out = limited
    raise SystemExit(run_launched.main(sys.argv[1:]))
