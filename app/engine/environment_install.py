"""One installation of one environment: which layers are missing, in which order, from where, and whether they work."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil

from app.core.errors import ErrorKind, WeftError
from app.core.jobs import Progress
from app.core.paths import resources
from app.engine import compiler
from app.engine.compiler import has_nvidia
from app.engine.environment_folders import EnvironmentFolders, Stamp, discard, folder_bytes
from app.engine.environment_source import fetch_source
from app.engine.environment_spec import EnvironmentSpec, Layer
from app.engine.package_sources import Sources, cached_wheels, local_wheels, package_sources
from app.engine.uv_process import LogFile, UvRun, find_uv

_FREE_RESERVE = 500_000_000  # bytes of disk that an installation leaves alone


class Installation:
    """Brings an environment to READY. The caller holds its lock, and has put back what a killed repair left aside.

    Args:
        expected: about how many bytes it will take on disk.
        report, log, cancelled: see Environments.install.
    """

    def __init__(
        self,
        folders: EnvironmentFolders,
        name: str,
        spec: EnvironmentSpec,
        expected: int,
        report: Callable[[Progress], None],
        log: LogFile,
        cancelled: Callable[[], bool],
    ) -> None:
        self._folders = folders
        self._name = name
        self._spec = spec
        self._expected = expected
        self._folder = folders.folder(name)
        self._report = report
        self._log = log
        self._cancelled = cancelled

    def run(self, *, repair: bool) -> None:
        """See Environments.install."""
        marker = self._folders.marker(self._name)
        marker.touch()
        aside = self._folders.aside(self._name)
        if repair and self._folder.exists():
            discard(aside, self._spec.title)
            self._folder.rename(aside)
        try:
            self._prepare()
            self._install_layers()
        except BaseException:  # Ctrl+C included
            if repair and aside.exists():
                discard(self._folder, self._spec.title)
                aside.rename(self._folder)
                marker.unlink(missing_ok=True)
            raise
        discard(aside, self._spec.title)
        marker.unlink(missing_ok=True)

    def _prepare(self) -> None:
        self._report(Progress(phase="Looking where packages come from"))
        self._uv = find_uv()
        self._sources = package_sources()
        free = shutil.disk_usage(self._folders.root).free
        have = folder_bytes(self._folder)
        if self._expected - have + _FREE_RESERVE > free:
            raise WeftError(
                ErrorKind.DISK_FULL,
                f"{self._spec.title} takes about {self._expected / 1e9:.1f} GB, and {self._folders.root} has "
                f"{free / 1e9:.1f} GB left.",
                "Make room, or set WEFT_ENVIRONMENTS to a folder on another disk.",
            )
        cache = _Cache(self._uv, self._sources)
        self._run = UvRun(
            variables=self._sources.variables,
            report=self._report,
            cancelled=self._cancelled,
            log=self._log,
            measure=lambda: max(cache.growth(), folder_bytes(self._folder)),
            expected=self._expected,
            folder=self._folders.root,
        )
        if not self._python_runs():
            discard(self._folder, self._spec.title)
            command = [self._uv, "venv", "--no-project", "--python", self._base_python(), self._folder]
            self._run.run(command, "Making the environment")

    def _python_runs(self) -> bool:
        interpreter = self._folders.interpreter(self._name)
        if not interpreter.exists():
            return False
        try:
            return subprocess.run([interpreter, "-c", ""], capture_output=True, check=False, timeout=60).returncode == 0
        except (OSError, subprocess.TimeoutExpired):
            return False

    def _base_python(self) -> str:
        """The Python that runs us, if the pins have wheels for it; else the newest that has, which uv finds or fetches."""
        oldest, newest = (tuple(int(part) for part in text.split(".")) for text in self._spec.python)
        if oldest <= sys.version_info[:2] <= newest and not getattr(sys, "frozen", False):
            return str(getattr(sys, "_base_executable", "") or sys.executable)
        return self._spec.python[1]

    # Layers -------------------------------------------------------------------------------------

    def _install_layers(self) -> None:
        stamp = self._folders.read_stamp(self._name)
        waiting = [layer for layer in self._spec.layers if stamp.layers.get(layer.name) != layer.fingerprint]
        for layer in waiting:  # taken back before anything changes: a layer may move packages of another
            stamp.layers.pop(layer.name, None)
        stamp.failed.clear()
        if waiting:
            stamp.probed = False
        self._folders.write_stamp(self._name, stamp)
        for layer in (layer for layer in waiting if not layer.optional):
            self._layer(layer, stamp)
        checks = [layer.gpu for layer in self._spec.layers if layer.gpu]
        if not stamp.probed or (checks and stamp.gpu is None):
            self._probe(self._spec.probe, "Trying it out")
            stamp.gpu = all(self._can_use_gpu(code) for code in checks) if checks else None
            stamp.probed = True
            self._folders.write_stamp(self._name, stamp)
        for layer in (layer for layer in waiting if layer.optional):
            try:
                self._layer(layer, stamp)
            except WeftError as error:
                if error.kind is ErrorKind.CANCELLED:
                    raise
                stamp.failed[layer.name] = error.message
                self._folders.write_stamp(self._name, stamp)

    def _layer(self, layer: Layer, stamp: Stamp) -> None:
        if layer.gpu and not os.environ.get("CMAKE_ARGS") and has_nvidia() and compiler.nvcc() and compiler.has_compiler():
            try:
                self._install_layer(layer, cuda=compiler.nvcc())
                if not self._can_use_gpu(layer.gpu):
                    raise WeftError(ErrorKind.ENVIRONMENT, "the build does not find the graphics card's libraries.")
            except WeftError as error:
                if error.kind is not ErrorKind.ENVIRONMENT:
                    raise
                stamp.failed["gpu"] = f"{error.message} GGUF models run on the processor."
                self._install_layer(layer, again=True)
        else:
            self._install_layer(layer)
        stamp.layers[layer.name] = layer.fingerprint
        self._folders.write_stamp(self._name, stamp)

    def _install_layer(self, layer: Layer, *, cuda: str = "", again: bool = False) -> None:
        """Install one layer.

        Args:
            cuda: the nvcc to compile it with; "" for a build for the processor.
            again: in place of a build of the same version.
        """
        options, variables = self._options(layer, cuda)
        if again:
            options += ["--reinstall-package", layer.compiles]
        command = [self._uv, "pip", "install", "--python", self._folders.interpreter(self._name)]
        command += ["--constraint", resources() / "environments" / "constraints.txt", *options, *layer.requirements]
        try:
            self._run.run(command, f"Installing {layer.title}", variables=variables)
        except WeftError as error:
            if "--no-build-package" in options and error.kind is ErrorKind.ENVIRONMENT:
                raise WeftError(
                    ErrorKind.ENVIRONMENT,
                    f"There is no ready-made build of {layer.title} for this system, and no C++ compiler to make one.",
                    compiler.hint(),
                ) from error
            raise
        if layer.source:
            interpreter = self._folders.interpreter(self._name)
            self._report(Progress(phase=f"Fetching {layer.title}"))
            fetch_source(layer.source, self._folder / layer.folder, layer.keep, interpreter, self._fetch)
        if layer.probe:
            self._probe(layer.probe, f"Trying {layer.title} out")

    def _fetch(self, command: list[str | Path]) -> object:
        # pip reads its own configuration; what somebody chose for uv alone counts too.
        variables = {"PYTHONSAFEPATH": "1"}
        for uv, pip in (("UV_INDEX_URL", "PIP_INDEX_URL"), ("UV_DEFAULT_INDEX", "PIP_INDEX_URL")):
            if os.environ.get(uv) and not os.environ.get(pip):
                variables[pip] = os.environ[uv]
        return self._run.run(command, "Fetching a package's source", variables=variables)

    def _options(self, layer: Layer, cuda: str) -> tuple[list[str | Path], dict[str, str]]:
        options: list[str | Path] = []
        variables: dict[str, str] = {}
        if any(requirement.startswith("torch==") for requirement in layer.requirements):
            options += torch_backend(self._sources)
        if layer.compiles:
            arguments = "-DGGML_CUDA=on" if cuda else os.environ.get("CMAKE_ARGS", "")
            if cuda:
                variables |= {"CMAKE_ARGS": arguments, "CUDACXX": cuda}
            pin = next(r for r in layer.requirements if r.startswith(f"{layer.compiles}=="))
            version = pin.partition("==")[2]
            if arguments:
                # uv remembers builds by their settings, not by our variables: said as a setting, other arguments build anew.
                cmake = ";".join(shlex.split(arguments))
                options += ["--no-binary", layer.compiles, "--config-settings-package", f"{layer.compiles}:cmake.args={cmake}"]
            else:
                for folder in cached_wheels(layer.compiles, version, self._sources.pip_cache):
                    options += ["--find-links", folder]
            ready_made = bool(options) or local_wheels(layer.compiles, version, self._sources.find_links)
            if (arguments or not ready_made) and not compiler.has_compiler():
                options += ["--no-build-package", layer.compiles]
            variables["CMAKE_BUILD_PARALLEL_LEVEL"] = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(psutil.cpu_count() or 1)
        return options, variables

    def _can_use_gpu(self, code: str) -> bool:
        """Ask what was installed. See Layer.gpu."""
        try:
            return "gpu True" in self._execute(code, "Looking for graphics cards")
        except WeftError as error:
            if error.kind is ErrorKind.CANCELLED:
                raise
            return False

    def _execute(self, code: str, phase: str) -> list[str]:
        variables = {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
        return self._run.run([self._folders.interpreter(self._name), "-c", code], phase, variables=variables)

    def _probe(self, code: str, phase: str) -> None:
        """Run code in the environment. Raises WeftError ENVIRONMENT with Python's last word when it does not run."""
        try:
            self._execute(code, phase)
        except WeftError as error:
            if error.kind is ErrorKind.CANCELLED:
                raise
            raise WeftError(
                ErrorKind.ENVIRONMENT,
                f"{self._spec.title} is installed but does not run: {error.message.removeprefix('The installation failed: ')}",
                "Read its log, then Repair it in Settings, under Engines.",
            ) from error


def torch_backend(sources: Sources) -> list[str | Path]:
    """uv's choice of a PyTorch build, unless somebody configured where packages come from or there is but one build."""
    if sources.configured or sys.platform == "darwin":
        return []
    return [f"--torch-backend={'auto' if has_nvidia() else 'cpu'}"]


class _Cache:
    """Watches uv's cache grow: there the downloads land before they are linked into the environment."""

    def __init__(self, uv: Path, sources: Sources) -> None:
        command = [uv, "cache", "dir"]
        environment = {**os.environ, **sources.variables, "NO_COLOR": "1"}
        try:
            answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=20).stdout
        except (OSError, subprocess.TimeoutExpired):
            answer = ""
        self._root = Path(answer.strip()) if answer.strip() else None
        self._before = self._entries()

    def _entries(self) -> set[Path]:
        """Archives that are complete, and temporary folders that are being filled."""
        if self._root is None:
            return set()
        folders = (self._root.glob(".tmp*"), (self._root / "archive-v0").glob("*"), (self._root / "builds-v0").glob("*"))
        return {path for found in folders for path in found}

    def growth(self) -> int:
        """Bytes that came since the start."""
        return sum(folder_bytes(path) for path in self._entries() - self._before)
