"""One Python environment per loader family, made and repaired with uv.

A layer is stamped when it is in, so that an interrupted installation goes on where it stopped, and the failure of a later,
optional layer leaves the earlier ones usable. What is to be installed stands in `resources/environments/<name>.toml`; where
it lies, in `environment_folders.py`.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from app.core.errors import ErrorKind, WeftError
from app.core.jobs import Progress
from app.core.paths import resources
from app.engine import compiler
from app.engine.compiler import has_nvidia
from app.engine.environment_folders import (
    EnvironmentFolders,
    discard,
    discard_later,
    folder_bytes,
    translated_os_errors,
)
from app.engine.environment_spec import EnvironmentSpec, read_specs
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


class Environments(EnvironmentFolders):
    """The engine environments under one root.

    Args:
        root: folder that holds them; made on the first installation.
        definitions: folders of `<name>.toml`; what a later one defines may extend what an earlier one does.
    """

    def __init__(self, root: Path, definitions: Sequence[Path] | None = None) -> None:
        super().__init__(root)
        self.definitions = tuple(definitions) if definitions is not None else (resources() / "environments",)
        self._specs: dict[str, EnvironmentSpec] | None = None

    def specs(self) -> dict[str, EnvironmentSpec]:
        """Every environment by name. The files are read once."""
        if self._specs is None:
            self._specs = read_specs(self.definitions)
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
            with contextlib.suppress(WeftError, OSError), self.locked(name, name):
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
            discard_later(aside)
        else:
            discard_later(self.folder(name))
            aside.rename(self.folder(name))
        self.marker(name).unlink(missing_ok=True)

    def failed_layers(self, name: str) -> dict[str, str]:
        """Parts that could not be installed, but are not needed: title to reason. GPU support of a build is one."""
        titles = {"gpu": "GPU support"} | {layer.name: layer.title for layer in self.spec(name).layers}
        found = {titles.get(layer, layer): reason for layer, reason in self.read_stamp(name).failed.items()}
        if titles["gpu"] not in found and has_nvidia() and self.gpu(name) is False:
            found[titles["gpu"]] = compiler.why_without_gpu()
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
                ErrorKind.ENVIRONMENT,
                f"{variable} names {override}, which does not exist.",
                f"Correct or unset {variable}.",
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

        spec = self.spec(name)
        with translated_os_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            with self.locked(name, spec.title):
                self.sweep(name)
                self.put_back(name)
                expected = self.expected_bytes(name)
                Installation(self, name, spec, expected, report, log, cancelled).run(repair=repair)

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
        with self.locked(name, spec.title):
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


def variable_of(name: str) -> str:
    """The variable that overrides an environment's interpreter: `WEFT_PYTHON_CORE`."""
    return "WEFT_PYTHON_" + re.sub(r"\W", "_", name).upper()


def _override(name: str) -> Path | None:
    path = os.environ.get(variable_of(name))
    return Path(path) if path else None
