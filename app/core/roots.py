"""Where programs keep their models: the roots that the library knows by itself."""

from __future__ import annotations

import os
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

import msgspec

from app.core.paths import Paths, resources


class RootKind(StrEnum):
    """Whose layout a root has."""

    STARTER = "starter"  # what ships with Weft; read only
    OWN = "own"
    HUGGING_FACE = "hugging_face"
    LM_STUDIO = "lm_studio"
    OLLAMA = "ollama"  # read only
    TEXT_GENERATION_WEBUI = "text_generation_webui"
    FOLDER = "folder"  # any other, added by the user


TITLES: dict[RootKind, str] = {
    RootKind.STARTER: "Weft's starter",
    RootKind.OWN: "Weft",
    RootKind.HUGGING_FACE: "Hugging Face cache",
    RootKind.LM_STUDIO: "LM Studio",
    RootKind.OLLAMA: "Ollama",
    RootKind.TEXT_GENERATION_WEBUI: "text-generation-webui",
    RootKind.FOLDER: "Folder",
}


class Root(msgspec.Struct, frozen=True, kw_only=True):
    """A folder that the library indexes in place. `path` is absolute."""

    path: str
    kind: RootKind = RootKind.FOLDER

    @property
    def title(self) -> str:
        return TITLES[self.kind]


def own_roots(paths: Paths) -> list[Root]:
    """The starter, and Weft's own folders."""
    return [
        Root(path=str(resources() / "starter"), kind=RootKind.STARTER),
        Root(path=str(paths.models), kind=RootKind.OWN),
        Root(path=str(paths.adapters), kind=RootKind.OWN),
    ]


def found_roots(environment: Mapping[str, str] | None = None, home: Path | None = None) -> list[Root]:
    """Folders of other programs that exist on this machine."""
    env = os.environ if environment is None else environment
    home = home or Path.home()
    cache = Path(env.get("XDG_CACHE_HOME") or home / ".cache")
    hub = env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE")
    hub_home = env.get("HF_HOME")
    places: list[tuple[RootKind, Path]] = [
        (RootKind.HUGGING_FACE, Path(hub) if hub else (Path(hub_home) if hub_home else cache / "huggingface") / "hub"),
        (RootKind.LM_STUDIO, home / ".lmstudio" / "models"),
        (RootKind.LM_STUDIO, cache / "lm-studio" / "models"),
        (RootKind.OLLAMA, Path(env.get("OLLAMA_MODELS") or home / ".ollama" / "models")),
        (RootKind.OLLAMA, Path("/usr/share/ollama/.ollama/models")),
    ]
    for name in ("text-generation-webui", "oobabooga", "textgen", "text-generation-webui-main"):
        for base in (home, home / "Documents", home / "Downloads"):
            if (base / name / "server.py").is_file():
                places.append((RootKind.TEXT_GENERATION_WEBUI, base / name))
    result: list[Root] = []
    for kind, place in places:
        try:
            path = str(place.expanduser().absolute())
            if place.is_dir() and path not in [root.path for root in result]:
                result.append(Root(path=path, kind=kind))
        except OSError:
            continue  # a home of somebody else, which may not even be looked at
    return result
