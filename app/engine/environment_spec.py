"""What engine environments are to hold: `resources/environments/<name>.toml`, read and put together."""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Sequence
from pathlib import Path

import msgspec


class Layer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Requirements that are installed together.

    Attributes:
        optional: its failure leaves the environment usable.
        compiles: the package in it that may have to be compiled here; "" for none.
        gpu: Python code that prints `gpu True` on stderr when what was installed can use a graphics card; "" where
            that does not depend on how it was built.
        probe: Python code that runs only when the layer works; "" for none.
        source: `name==version` of a package of whose source parts are unpacked into the environment; "" for none.
        folder: where in the environment. keep: the parts, as paths in the package.
    """

    name: str
    title: str
    requirements: tuple[str, ...]
    source: str = ""
    folder: str = ""
    keep: tuple[str, ...] = ()
    optional: bool = False
    compiles: str = ""
    gpu: str = ""
    probe: str = ""

    @property
    def fingerprint(self) -> str:
        """Changes when a pin does."""
        source = [self.source, *self.keep] if self.source else []
        return hashlib.sha256("\0".join([*self.requirements, *source]).encode()).hexdigest()[:16]


class EnvironmentSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an environment is to hold.

    Attributes:
        bytes, minutes: about how large it is on disk, and how long it takes on two cores where all must be fetched.
        bytes_cuda: the same with NVIDIA's libraries, 0 when these change nothing.
        python: oldest and newest Python for it, as `3.11`.
        extends: environments whose layers come first.
        probe: Python code that runs only when the environment works.
        on_demand: installed when something asks for it, not by the first start.
    """

    name: str = ""
    title: str
    summary: str
    bytes: int
    minutes: int
    python: tuple[str, str]
    probe: str
    layers: tuple[Layer, ...]
    extends: tuple[str, ...] = ()
    bytes_cuda: int = 0
    on_demand: bool = False


def read_specs(folders: Sequence[Path]) -> dict[str, EnvironmentSpec]:
    """Every environment that the folders define, by name, with the layers of those that it extends before its own."""
    read = {
        path.stem: msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), EnvironmentSpec)
        for folder in folders
        for path in sorted(folder.glob("*.toml"))
    }
    specs: dict[str, EnvironmentSpec] = {}

    def whole(name: str) -> EnvironmentSpec:
        if name not in specs:
            spec = read[name]
            bases = [whole(base) for base in spec.extends]
            layers = {layer.name: layer for base in bases for layer in base.layers} | {
                layer.name: layer for layer in spec.layers
            }
            probe = "\n".join([*(base.probe for base in bases), spec.probe])
            specs[name] = msgspec.structs.replace(spec, name=name, layers=tuple(layers.values()), probe=probe)
        return specs[name]

    return {name: whole(name) for name in read}
