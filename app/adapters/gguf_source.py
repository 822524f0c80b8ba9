"""llama.cpp's own converter, where the environment `export` keeps it. Its gguf-py goes before any other."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

from app.core.errors import ErrorKind, WeftError


def converter_folder() -> Path:
    """The folder of `convert_hf_to_gguf.py`. Raises WeftError ENVIRONMENT."""
    places = [Path(os.environ.get("WEFT_LLAMA_SOURCE") or "/nowhere"), Path(sys.prefix) / "llama.cpp"]
    for place in places:
        if (place / "conversion" / "base.py").is_file():
            return place
    raise WeftError(
        ErrorKind.ENVIRONMENT,
        "llama.cpp's converter is not installed in this environment.",
        "Install or repair the engine `GGUF export` in Settings, or run `python3 run.py environments install export`.",
    )


def converter() -> Any:
    """The converter's package `conversion`, of the version of the installed llama.cpp.

    Raises:
        WeftError: ENVIRONMENT when it is not there.
        RuntimeError: another gguf was imported in this process before.
    """
    folder = converter_folder()
    for place in (folder, folder / "gguf-py"):
        if place.is_dir() and str(place) not in sys.path:
            sys.path.insert(0, str(place))
    gguf = sys.modules.get("gguf")
    if gguf is not None and not str(getattr(gguf, "__file__", "")).startswith(str(folder)):
        raise RuntimeError("gguf was imported from elsewhere before the converter")
    os.environ["NO_LOCAL_GGUF"] = "1"  # the path is ours already
    return importlib.import_module("conversion")
