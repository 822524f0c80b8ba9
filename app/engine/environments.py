"""One Python environment per loader family, made and repaired with uv.

Under the root lie, for an environment `core`: `core/` (a virtual environment, with a stamp that says which layers
are complete), `core.incomplete` (exists while an installation has begun and not ended), `core.lock` (held while one
runs), `core.log`, and `core.before-repair` while a repair runs: what was there, for the case that it fails. A layer is stamped when it is in, so that an interrupted installation goes on where it stopped,
and the failure of a later, optional layer leaves the earlier ones usable. What is to be installed stands in
`resources/environments/<name>.toml`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Generator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from app.core.errors import ErrorKind, WeftError
from app.core.jobs import Progress
from app.core.paths import resources
from app.terminal import ProgressLine

if TYPE_CHECKING:
    from app.engine.uv_process import LogFile


class EnvironmentState(StrEnum):
    """What there is of an environment."""

    MISSING = "missing"
    INCOMPLETE = "incomplete"  # an installation has begun and not ended well; installing goes on with it
    READY = "ready"
    OUTDATED = "outdated"  # complete, but this Weft pins other versions; usable, better installed again
    BROKEN = "broken"  # it was complete, and its Python is gone


USABLE = (EnvironmentState.READY, EnvironmentState.OUTDATED)


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


class Stamp(msgspec.Struct, kw_only=True):
    """What is complete in an environment.

    Attributes:
        layers: layer to fingerprint.
        failed: optional layers that failed, and `gpu` for GPU support, to the reason.
        probed: it was tried out and works.
        gpu: what was compiled can use a graphics card; None while nobody asked it.
    """

    layers: dict[str, str] = {}
    failed: dict[str, str] = {}
    probed: bool = False
    gpu: bool | None = None


class Environments:
    """The engine environments under one root.

    Args:
        root: folder that holds them; made on the first installation.
        definitions: folders of `<name>.toml`; what a later one defines may extend what an earlier one does.
    """

    def __init__(self, root: Path, definitions: Sequence[Path] | None = None) -> None:
        self.root = root
        self.definitions = tuple(definitions) if definitions is not None else (resources() / "environments",)
        self._specs: dict[str, EnvironmentSpec] | None = None

    def specs(self) -> dict[str, EnvironmentSpec]:
        """Every environment by name. The files are read once."""
        if self._specs is None:
            self._specs = _read_specs(self.definitions)
        return self._specs

    def spec(self, name: str) -> EnvironmentSpec:
        """One environment. Raises WeftError NOT_FOUND."""
        found = self.specs().get(name)
        if found is None:
            known = ", ".join(self.specs())
            raise WeftError(ErrorKind.NOT_FOUND, f"There is no environment {name!r}.", f"Environments are: {known}.")
        return found

    def state(self, name: str) -> EnvironmentState:
        """What there is of it. Reads a stamp: a fraction of a millisecond.

        What a killed repair left aside is put back first, unless that repair still runs.
        """
        self.spec(name)
        override = _override(name)
        if override is not None:
            return EnvironmentState.READY if override.exists() else EnvironmentState.BROKEN
        if self.aside(name).exists():
            with contextlib.suppress(WeftError, OSError), _locked(self.root / f"{name}.lock", name):
                self.put_back(name)
        return self._found(name)

    def _found(self, name: str) -> EnvironmentState:
        spec = self.spec(name)
        if not self.folder(name).is_dir():
            return EnvironmentState.INCOMPLETE if self.marker(name).exists() else EnvironmentState.MISSING
        stamp = self.read_stamp(name)
        required = [layer for layer in spec.layers if not layer.optional]
        if not stamp.probed or any(layer.name not in stamp.layers for layer in required):
            return EnvironmentState.INCOMPLETE
        if not self.interpreter(name).exists():
            return EnvironmentState.BROKEN
        known = {layer.name: layer.fingerprint for layer in spec.layers}
        if any(known.get(done, mark) != mark for done, mark in stamp.layers.items()):
            return EnvironmentState.OUTDATED
        # A layer that came with a newer Weft: wanted, and never tried.
        if any(name not in stamp.layers and name not in stamp.failed for name in known):
            return EnvironmentState.OUTDATED
        return EnvironmentState.READY

    def put_back(self, name: str) -> None:
        """Give an environment back that a killed repair left aside, or drop it when the new one is whole. Under its lock."""
        aside = self.aside(name)
        if not aside.exists():
            return
        if self._found(name) in USABLE:
            _discard_later(aside)
        else:
            _discard_later(self.folder(name))
            aside.rename(self.folder(name))
        self.marker(name).unlink(missing_ok=True)

    def failed_layers(self, name: str) -> dict[str, str]:
        """Parts that could not be installed, but are not needed: title to reason. GPU support of a build is one."""
        titles = {"gpu": "GPU support"} | {layer.name: layer.title for layer in self.spec(name).layers}
        found = {titles.get(layer, layer): reason for layer, reason in self.read_stamp(name).failed.items()}
        if titles["gpu"] not in found and has_nvidia() and self.gpu(name) is False:
            found[titles["gpu"]] = without_gpu()
        return found

    def gpu(self, name: str) -> bool | None:
        """Whether what was compiled in it can use a graphics card; None where there is no such question, or no answer.

        While it is not installed: whether it will.
        """
        if not any(layer.gpu for layer in self.spec(name).layers):
            return None
        if override := _override(name):
            return any(override.parent.parent.glob("[Ll]ib*/**/site-packages/llama_cpp/lib/*ggml-cuda*"))
        if self.state(name) in USABLE:
            return self.read_stamp(name).gpu
        from app.engine import compiler

        return has_nvidia() and bool(compiler.nvcc()) and compiler.has_compiler()

    def python(self, name: str) -> Path:
        """The interpreter of a usable environment.

        Raises:
            WeftError: ENVIRONMENT when it is not installed, with the next step; NOT_FOUND for an unknown name.
        """
        state = self.state(name)
        if state in USABLE:
            return _override(name) or self.interpreter(name)
        if override := _override(name):
            variable = variable_of(name)
            raise WeftError(
                ErrorKind.ENVIRONMENT, f"{variable} names {override}, which does not exist.", f"Correct or unset {variable}."
            )
        what = {
            EnvironmentState.MISSING: "is not installed yet",
            EnvironmentState.INCOMPLETE: "is only partly installed",
        }.get(state, "is broken: its Python is gone")
        verb = "Repair" if state is EnvironmentState.BROKEN else "Install"
        raise WeftError(
            ErrorKind.ENVIRONMENT,
            f"The engine environment {self.spec(name).title!r} {what}.",
            f"{verb} it in Settings, under Engines, or run `python3 run.py environments install {name}`.",
        )

    def install(
        self,
        name: str,
        report: Callable[[Progress], None],
        log: LogFile,
        cancelled: Callable[[], bool],
        *,
        repair: bool = False,
    ) -> None:
        """Install an environment, or go on with an installation. Blocks for minutes.

        Args:
            report: told how far it is: the phase in words, and the bytes brought so far out of about how many.
            log: gets everything that uv says.
            cancelled: asked several times a second; when true, every process is ended.
            repair: make it anew; what was there comes back when that fails.

        Raises:
            WeftError: BUSY when another process installs it; CANCELLED; NETWORK, DISK_FULL, PERMISSION or ENVIRONMENT
                when a required layer cannot be installed. What is complete stays, and installing again goes on from there.
        """
        from app.engine.environment_install import Installation  # here: it needs what only an installation needs

        self.spec(name)
        with _translated_os_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            with _locked(self.root / f"{name}.lock", self.spec(name).title):
                Installation(self, name, report, log, cancelled).run(repair=repair)

    def install_for_command_line(self, name: str, *, repair: bool = False) -> None:
        """The same, with its progress on stderr and its log in `log_path(name)`. Waits while another process does it."""
        spec = self.spec(name)
        if self.state(name) is EnvironmentState.READY and not repair:
            return
        line = ProgressLine()
        print(
            f"Installing the engine environment {spec.title!r}, once: about {spec.minutes} minutes and "
            f"{self.expected_bytes(name) / 1e9:.1f} GB. Ctrl+C stops it; next time it goes on from there.",
            file=sys.stderr,
        )
        while repair or self.state(name) is not EnvironmentState.READY:
            self.root.mkdir(parents=True, exist_ok=True)
            try:
                with self.log_path(name).open("a", encoding="utf-8") as log:
                    self.install(name, line.show, log, lambda: False, repair=repair)
                repair = False
            except WeftError as error:
                if error.kind is ErrorKind.BUSY:
                    line.show(Progress(phase="Waiting for another Weft that is installing it"))
                    time.sleep(1)
                    continue
                line.clear()
                if error.kind not in (ErrorKind.CANCELLED, ErrorKind.BAD_INPUT):
                    print(f"log: {self.log_path(name)}", file=sys.stderr)
                raise
            finally:
                line.clear()
        for title, reason in self.failed_layers(name).items():
            print(f"note: {title} could not be installed: {reason}", file=sys.stderr)

    def remove(self, name: str) -> None:
        """Delete an environment. Does nothing when there is none.

        Raises:
            WeftError: BUSY while it is being installed, or while an engine runs in it (on Windows); PERMISSION.
        """
        spec = self.spec(name)
        if not self.root.is_dir():
            return
        with _locked(self.root / f"{name}.lock", spec.title):
            self.sweep(name)
            discard(self.aside(name), spec.title)
            discard(self.folder(name), spec.title)
            self.marker(name).unlink(missing_ok=True)

    def expected_bytes(self, name: str) -> int:
        """About what it will take on this machine's disk."""
        spec = self.spec(name)
        return max(spec.bytes, spec.bytes_cuda) if has_nvidia() else spec.bytes

    def size(self, name: str) -> int:
        """Bytes that it takes on disk. Walks tens of thousands of files: not for the window's thread."""
        return folder_bytes(self.folder(name))

    # Where things lie ---------------------------------------------------------------------------

    def folder(self, name: str) -> Path:
        return self.root / name

    def marker(self, name: str) -> Path:
        """Exists from the beginning of an installation to its good end."""
        return self.root / f"{name}.incomplete"

    def aside(self, name: str) -> Path:
        """Where what was there lies while a repair runs."""
        return self.root / f"{name}.before-repair"

    def sweep(self, name: str) -> None:
        """Delete what was about to be deleted when somebody was killed. Under its lock."""
        for left in self.root.glob(f"{name}.*removing-*"):
            shutil.rmtree(left, ignore_errors=True)

    def log_path(self, name: str) -> Path:
        return self.root / f"{name}.log"

    def interpreter(self, name: str) -> Path:
        """Where the environment's Python lies, whether or not it is there."""
        folder = self.folder(name)
        return folder / "Scripts" / "python.exe" if os.name == "nt" else folder / "bin" / "python"

    def read_stamp(self, name: str) -> Stamp:
        """What is complete; an empty stamp when there is none or it cannot be read."""
        try:
            return msgspec.json.decode((self.folder(name) / "weft-stamp.json").read_bytes(), type=Stamp)
        except (OSError, msgspec.DecodeError):
            return Stamp()

    def write_stamp(self, name: str, stamp: Stamp) -> None:
        """Write the stamp in one step."""
        target = self.folder(name) / "weft-stamp.json"
        beside = target.with_suffix(".part")
        beside.write_bytes(msgspec.json.encode(stamp))
        beside.replace(target)


def variable_of(name: str) -> str:
    """The variable that overrides an environment's interpreter: `WEFT_PYTHON_CORE`."""
    return "WEFT_PYTHON_" + re.sub(r"\W", "_", name).upper()


def has_nvidia() -> bool:
    """Whether there is an NVIDIA driver, without loading anything of it."""
    return bool(shutil.which("nvidia-smi")) or Path("/proc/driver/nvidia/version").exists()


def without_gpu() -> str:
    """Why a build of llama.cpp cannot use the NVIDIA card that is there, and what to do, as a sentence."""
    from app.engine import compiler

    how = (
        "it was built when the CUDA toolkit was not there. Repair it to build it with GPU support."
        if compiler.nvcc()
        else "that needs NVIDIA's CUDA toolkit (nvcc), which is not there. Install that, then Repair."
    )
    return f"{how} Until then GGUF models run on the processor."


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; what vanishes meanwhile is not counted."""
    total = 0
    stack = [folder]
    while stack:
        with contextlib.suppress(OSError), os.scandir(stack.pop()) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if entry.is_dir(follow_symlinks=False):
                        stack.append(Path(entry.path))
                    else:
                        total += entry.stat(follow_symlinks=False).st_size
    return total


def discard(folder: Path, title: str) -> None:
    """Delete a folder so that it never looks whole while half of it is gone. Raises WeftError BUSY."""
    if not folder.exists():
        return
    away = _away(folder)
    try:
        folder.rename(away)
        shutil.rmtree(away)
    except OSError as error:
        raise WeftError(
            ErrorKind.BUSY, f"The environment {title!r} cannot be removed: {error}", "Unload the model that runs in it and try again."
        ) from error


def _discard_later(folder: Path) -> None:
    """The same without waiting for the deletion; if this process ends meanwhile, `sweep` does it."""
    if folder.exists():
        away = folder.rename(_away(folder))
        threading.Thread(target=shutil.rmtree, args=(away, True), name="discard", daemon=True).start()


def _away(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.removing-{os.getpid()}-{time.monotonic_ns()}")


def _override(name: str) -> Path | None:
    path = os.environ.get(variable_of(name))
    return Path(path) if path else None


def _read_specs(folders: Sequence[Path]) -> dict[str, EnvironmentSpec]:
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
            layers = {layer.name: layer for base in bases for layer in base.layers} | {layer.name: layer for layer in spec.layers}
            probe = "\n".join([*(base.probe for base in bases), spec.probe])
            specs[name] = msgspec.structs.replace(spec, name=name, layers=tuple(layers.values()), probe=probe)
        return specs[name]

    return {name: whole(name) for name in read}


@contextlib.contextmanager
def _locked(path: Path, title: str) -> Generator[None]:
    """Hold a lock that the operating system drops with this process. Raises WeftError BUSY when another holds it."""
    with path.open("a+b") as lock:
        try:
            if sys.platform == "win32":
                import msvcrt

                msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise WeftError(
                ErrorKind.BUSY, f"The environment {title!r} is being installed or removed by another Weft.", "Wait until that is done."
            ) from error
        yield


@contextlib.contextmanager
def _translated_os_errors(place: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (28, 122):  # ENOSPC, EDQUOT
            kind, hint = ErrorKind.DISK_FULL, "Make room and install again; what was downloaded is kept."
        else:
            kind, hint = ErrorKind.PERMISSION, "Check that the folder can be written, or set WEFT_ENVIRONMENTS to another."
        raise WeftError(kind, f"{error.filename or place}: {error.strerror or error}", hint) from error
