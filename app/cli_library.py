"""Models and adapters by the names that people type: `starter`, a name in the library, or a path."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from app.backends import specs
from app.backends.base import Capability, Spec
from app.core.errors import ErrorKind, WeftError
from app.core.library import AdapterEntry, ModelEntry, ModelFormat
from app.core.paths import default_paths
from app.core.stack import AdapterStack, StackedAdapter
from app.engine.environments import USABLE, Environments
from app.store.database import Database
from app.store.library import LibraryStore, starter
from app.store.refresh import library_roots, refresh
from app.store.settings import SettingsStore


def find_model(name: str, loader: str = "") -> ModelEntry:
    """A model. Raises WeftError NOT_FOUND, or BAD_INPUT for a name that several have.

    The starter is there in two formats: of these, the one that `loader` takes, or that an installed engine can run.
    """
    paths = default_paths()
    if name.strip().casefold() == "starter":
        twins = [starter("starter"), starter("starter (gguf)")]
        if loader in specs():
            return next((twin for twin in twins if twin.format in specs()[loader].formats), twins[0])
        environments = Environments(paths.environments)
        usable = [spec for spec in specs().values() if environments.state(spec.environment) in USABLE]
        return next((twin for twin in twins if any(twin.format in spec.formats for spec in usable)), twins[0])
    database = Database(paths.database)
    try:
        library = LibraryStore(database)
        try:
            return library.find(name)
        except WeftError as error:
            if error.kind is not ErrorKind.NOT_FOUND or Path(name).exists():
                raise
        # It may have come since the library was last read.
        refresh(library, library_roots(SettingsStore(paths.settings).settings, paths))
        return library.find(name)
    finally:
        database.close()


def find_folder(name: str, use: str, instead: str) -> ModelEntry:
    """A model that is a folder of safetensors, for what GGUF files do not serve.

    Args:
        use: what such folders are for, as in "adapters are merged into folders of safetensors". instead: the hint.

    Raises:
        WeftError: as `find_model`; UNSUPPORTED for a GGUF file.
    """
    model = find_model(name, "transformers")
    if model.format is ModelFormat.GGUF:
        raise WeftError(ErrorKind.UNSUPPORTED, f"{model.name} is a GGUF file; {use}.", instead)
    return model


def find_adapter(name: str) -> Path:
    """The path of an adapter. Raises WeftError NOT_FOUND, or BAD_INPUT for a name that several have."""
    path = Path(name).expanduser()
    if path.exists():
        return path.absolute()
    paths = default_paths()
    database = Database(paths.database)
    try:
        library = LibraryStore(database)
        if not (found := _named(library, name)):
            refresh(library, library_roots(SettingsStore(paths.settings).settings, paths))
            found = _named(library, name)
    finally:
        database.close()
    if not found:
        raise WeftError(
            ErrorKind.NOT_FOUND,
            f"There is no adapter {name!r} in the library, and no such file or folder.",
            "Name its folder or file, or see `weft adapters`.",
        )
    if len(found) > 1:
        places = ", ".join(entry.path for entry in found[:3])
        raise WeftError(ErrorKind.BAD_INPUT, f"Several adapters are called {name!r}: {places}.", "Give the path.")
    return Path(found[0].path)


def find_stack(given: Sequence[str]) -> AdapterStack:
    """The stack that `--adapter PATH[=WEIGHT]` options name.

    Raises:
        WeftError: as `find_adapter`; BAD_INPUT for a weight that is no number.
    """
    return AdapterStack(adapters=tuple(_stacked(text) for text in given))


def _stacked(text: str) -> StackedAdapter:
    name, equals, weight = text.rpartition("=")
    if not equals or Path(text).expanduser().exists():  # a path may have an equals sign of its own
        name, weight = text, "1"
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise WeftError(
            ErrorKind.BAD_INPUT,
            f"The weight of the adapter {name!r} is no number: {weight!r}.",
            "Write --adapter PATH=WEIGHT, such as --adapter my-adapter=0.7.",
        )
    path = find_adapter(name)
    return StackedAdapter(path=str(path), weight=number, name=path.stem if path.is_file() else path.name)


def require_adapters(spec: Spec, stack: AdapterStack) -> None:
    """Refuse a stack that the loader cannot serve. Raises WeftError UNSUPPORTED."""
    wanted = Capability.MULTI_LORA if len(stack.adapters) > 1 else Capability.LORA
    if stack.adapters and wanted not in spec.capabilities:
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            f"The loader {spec.title} cannot serve {wanted.value}.",
            "Choose another loader; `weft loaders` says which can.",
        )


def _named(library: LibraryStore, name: str) -> list[AdapterEntry]:
    return [entry for entry in library.adapters() if entry.name.casefold() == name.casefold()]
