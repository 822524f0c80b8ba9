"""The same model as GGUF, by llama.cpp's own converter."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
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
    # The converter knows nothing of `do_sample` in generation_config.json: the likeliest token is temperature 0.
    with tempfile.TemporaryDirectory() as folder:
        metadata = Path(folder) / "metadata.json"
        metadata.write_text(json.dumps({"general.sampling.temp": 0.0}))
        subprocess.run([*command, "--metadata", str(metadata)], check=True)
