"""One file per loader. Dropping a file in adds the loader everywhere; nothing else names one.

A loader's file holds `SPEC` (a `base.Spec`) and a `Backend` subclass of `base.Backend`, and imports its
library inside its methods only, so that the window's process can read every SPEC without any of them.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable

from app.backends.base import Backend, Spec
from app.core.errors import ErrorKind, WeftError
from app.core.library import ModelEntry


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


def refusal(spec: Spec, model: ModelEntry, *, cuda: bool) -> str:
    """Why a loader cannot take a model on this machine, in a sentence; "" when it can."""
    if model.problem:
        return model.problem
    if model.format not in spec.formats:
        return f"{spec.title} does not load {model.format.value} models."
    if spec.needs_cuda and not cuda:
        return f"{spec.title} needs an NVIDIA graphics card."
    return spec.refuses(model)


def choose(model: ModelEntry, *, ready: Callable[[str], bool], cuda: bool = False, preferred: str = "") -> Spec:
    """The loader for a model: the preferred one if it can; else the best whose environment is ready; else the best.

    Args:
        ready: whether the environment of this name is installed.
        preferred: a loader's id, chosen by the user or saved with the model.

    Raises:
        WeftError: UNSUPPORTED when no loader takes the model (or the preferred one does not), with the reason.
    """
    if preferred:
        spec = specs().get(preferred)
        if spec is None:
            raise WeftError(
                ErrorKind.NOT_FOUND, f"There is no loader {preferred!r}.", f"Loaders are: {', '.join(specs())}."
            )
        if reason := refusal(spec, model, cuda=cuda):
            raise WeftError(
                ErrorKind.UNSUPPORTED, f"{model.name}: {reason}", "Choose another loader, or leave it to Weft."
            )
        return spec
    able = [spec for spec in specs().values() if not refusal(spec, model, cuda=cuda)]
    if not able:
        reasons = {refusal(spec, model, cuda=cuda) for spec in specs().values() if model.format in spec.formats}
        raise WeftError(
            ErrorKind.CORRUPT if model.problem else ErrorKind.UNSUPPORTED,
            f"{model.name}: {' '.join(sorted(reasons)) or f'no loader takes {model.format.value} models yet.'}",
            "Download the model again." if model.problem else "Run `weft loaders` to see what each loader takes.",
        )
    return next((spec for spec in able if ready(spec.environment)), able[0])
