"""The same model as GGUF, by llama.cpp's own converter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def make_gguf(converter: Path, model: Path, target: Path) -> None:
    """Run `convert_hf_to_gguf.py` on the model folder; the file is float16."""
    command = [
        sys.executable,
        str(converter),
        str(model),
        "--outfile",
        str(target),
        "--outtype",
        "f16",
        "--model-name",
        "Weft starter",
    ]
    subprocess.run(command, check=True)
