"""One file per loader. Dropping a file in adds the loader everywhere; nothing else names one.

A loader's file holds `SPEC` (a `base.Spec`) and a `Backend` subclass of `base.Backend`, and imports its
library inside its methods only, so that the window's process can read every SPEC without any of them.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil

from app.backends.base import Backend, Spec
from app.core.errors import ErrorKind, WeftError


@functools.cache
def specs() -> dict[str, Spec]:
    """Every loader by id, best first (`Spec.rank`)."""
    names = [m.name for m in pkgutil.iter_modules(__path__) if m.name != "base" and not m.ispkg]
    found = [importlib.import_module(f"{__name__}.{name}").SPEC for name in names]
    return {spec.id: spec for spec in sorted(found, key=lambda spec: (spec.rank, spec.id))}


def backend_class(loader: str) -> type[Backend]:
    """The Backend class of a loader, for the engine that is to hold one.

    Raises:
        WeftError: NOT_FOUND when no such loader exists.
    """
    if loader not in specs():
        raise WeftError(ErrorKind.NOT_FOUND, f"There is no loader {loader!r}.", f"Loaders are: {', '.join(specs())}.")
    return importlib.import_module(f"{__name__}.{loader}").Backend
